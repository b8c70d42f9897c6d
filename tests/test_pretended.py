"""The pretended graphics card: what a real one refuses it refuses, what goes over to it and back comes back, and afterwards nothing is left of it."""

import pytest
import torch
from torch import nn

from tests import pretended

MIXED = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu"


@pytest.fixture
def card():
    with pretended.card() as found:
        yield found


@pytest.mark.parametrize("made", [
    lambda: torch.ones(3, device="cuda"), lambda: torch.tensor([1.0, 2, 3], device="cuda:0"), lambda: torch.arange(3.0).to("cuda"), lambda: torch.ones(3).cuda(),
    lambda: torch.ones(3, dtype=torch.float64).to(torch.ones(1, device="cuda")), lambda: torch.randn(3, generator=torch.Generator("cuda").manual_seed(0), device="cuda"),
    lambda: torch.ones(2, 3, device="cuda")[0], lambda: torch.ones(3, device="cuda").new_tensor([1.0, 2, 3]), lambda: torch.zeros_like(torch.ones(3, device="cuda")),
    lambda: nn.utils.rnn.pad_sequence([torch.ones(3, device="cuda")])[:, 0], lambda: nn.Linear(3, 3).to("cuda").weight[0],
])  # fmt: skip
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_what_is_put_or_made_there_lies_there(card, made, mode):
    with mode():
        found = made()
        assert found.device == torch.device("cuda:0") and found.is_cuda and not found.is_cpu and (found + 1).device == found.device
        back = found.cpu()
        assert back.device == torch.device("cpu") and torch.equal(back, found.to("cpu")) and card.operations.total() > 0


@pytest.mark.parametrize("act", [
    lambda here, there: here + there, lambda here, there: torch.cat([here, there]), lambda here, there: torch.stack([here.sum(), there.sum()]), lambda here, there: here * there.sum(),
    lambda here, there: nn.functional.linear(here, there[None]), lambda here, there: there.add_(here), lambda here, there: torch.where(there > 0, here, here),
    lambda here, there: nn.functional.embedding(here.long(), there[:, None]),
])  # fmt: skip
def test_what_lies_in_both_places_is_refused(card, act):
    with pytest.raises(RuntimeError, match=MIXED):
        act(torch.ones(3), torch.ones(3, device="cuda"))


def test_numbers_of_rows_and_single_numbers_may_lie_in_main_memory_but_not_the_other_way_round(card):
    there, rows = torch.ones(3, device="cuda"), torch.tensor([0, 2])
    assert there[rows].is_cuda and (there * torch.tensor(2.0)).is_cuda
    there[rows] = torch.tensor(5.0)
    assert there.tolist() == [5.0, 1.0, 5.0]
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device as the indexed tensor"):
        torch.ones(3)[rows.cuda()]
    for given in ({"generator": torch.Generator(), "device": "cuda"}, {"generator": torch.Generator("cuda")}):
        with pytest.raises(RuntimeError, match="generator is not on the device of what it fills"):
            torch.randn(2, **given)


def test_gradients_go_back_to_where_the_numbers_came_from(card):
    here, layer = torch.ones(3, requires_grad=True), nn.Linear(3, 2).to("cuda")
    layer(here.to("cuda"))[torch.tensor([1])].sum().backward()
    assert here.grad.is_cpu and layer.weight.grad.is_cuda and torch.equal(here.grad, layer.weight.detach()[1].cpu())
    torch.optim.AdamW(layer.parameters(), lr=1e-3).step()


@pytest.mark.parametrize("window", [(-1, 0), (3, 0)])
def test_its_attention_of_documents_is_that_of_each_with_its_gradient(card, window):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    lengths, draw = [5, 1, 9], torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(sum(lengths), heads, 8, generator=draw, dtype=torch.float64).to("cuda").requires_grad_() for heads in (4, 2, 2))
    ends = torch.tensor([0, 5, 6, 15], dtype=torch.int32, device="cuda")
    found = varlen.varlen_attn(query, key, value, ends, ends, 9, 9, window_size=window, enable_gqa=True, scale=0.3)
    parts = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths)):
        back = torch.arange(len(q), device="cuda")[:, None] - torch.arange(len(q), device="cuda")
        mask = (back >= 0) & ((back <= window[0]) if window[0] >= 0 else back >= 0)
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
        parts.append(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)[0].transpose(0, 1))
    meant = torch.cat(parts)
    assert torch.allclose(found, meant)
    towards = torch.randn(meant.shape, generator=draw, dtype=torch.float64).to("cuda")
    for one, other in zip(torch.autograd.grad(found, (query, key, value), towards), torch.autograd.grad(meant, (query, key, value), towards)):
        assert torch.allclose(one, other) and one.is_cuda


def test_afterwards_nothing_is_left_of_it():
    before = [torch.Tensor.to, torch.Tensor.device, torch.Generator, torch.cuda.is_available]
    with pretended.card():
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    assert before == [torch.Tensor.to, torch.Tensor.device, torch.Generator, torch.cuda.is_available] and torch.ones(2).device == torch.device("cpu")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(2, device="cuda")
