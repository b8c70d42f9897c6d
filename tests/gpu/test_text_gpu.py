"""Language-model training on a GPU: a bfloat16 step, and packed attention without a dense mask."""

import pytest
import torch

from lora_studio.training import fused, packed
from tests.benchmarks import text as benchmark

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SMALL = benchmark.Size(vocabulary=8000, width=256, inner=704, layers=2, heads=4)


def model_on_gpu(dtype=torch.bfloat16, size=SMALL):
    """The benchmark's adapted model with a B that is not zero."""
    model = benchmark.own_model(size, dtype).cuda()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def loss_of(model, documents):
    """Mean loss of the next token, packed."""
    batch = packed.concatenate(documents, device="cuda")
    labelled = batch.position_ids[0] > 0
    with packed.attention(model):
        states = packed.hidden(model, batch)[labelled.roll(-1)]
    return fused.linear_cross_entropy(states, fused.head_weight(model), batch.input_ids[0][labelled]) / labelled.sum()


def attention_of(kernel, *, groups: int, window: int | None):
    """Relative errors of the output and the gradients of bfloat16 attention against float64."""
    batch = packed.concatenate([[0] * length for length in (70, 1, 300, 513)], device="cuda")
    tokens, generator = sum(batch.lengths), torch.Generator("cuda").manual_seed(0)
    shapes = [(1, 8, tokens, 64), (1, groups, tokens, 64), (1, groups, tokens, 64)]
    exact = [torch.randn(shape, generator=generator, device="cuda", dtype=torch.float64) for shape in shapes]
    exact = [tensor.bfloat16().double().requires_grad_() for tensor in exact]
    towards = torch.randn(1, tokens, 8, 64, generator=generator, device="cuda").bfloat16()
    mask = packed.DocumentMask(batch, window)
    plain = packed.by_document(*exact, mask, 0.2)
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    fast = kernel(*rounded, mask, 0.2)
    assert fast.shape == plain.shape
    expected = [plain, *torch.autograd.grad(plain, exact, towards.double())]
    found = [fast, *torch.autograd.grad(fast, rounded, towards)]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("window", [None, 64])
def test_the_varlen_kernel_is_attention_document_by_document(groups, window):
    query = torch.zeros(1, 8, 4, 64, device="cuda", dtype=torch.bfloat16)
    kernel = packed._kernel(query, query, window)
    if kernel is None:
        pytest.skip("no varlen kernel here: the loop over documents serves")
    assert max(attention_of(kernel, groups=groups, window=window)) < 0.02


def test_a_bfloat16_step_trains():
    model = model_on_gpu()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    documents = benchmark.samples(8, seed=7, size=SMALL)
    losses = []
    for _ in range(8):
        loss = loss_of(model, documents)
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_float32_on_the_gpu_equals_peft():
    """TF32 off: the same law as on the CPU."""
    model, documents = model_on_gpu(torch.float32), benchmark.samples(4, seed=3, size=SMALL, mean=40)
    loss = loss_of(model, documents)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    fused.remove(model)
    longest = max(map(len, documents))
    ids = torch.tensor([document + [0] * (longest - len(document)) for document in documents]).cuda()
    mask = torch.tensor([[1] * len(document) + [0] * (longest - len(document)) for document in documents]).cuda()
    plain = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=2e-6)
    for name, gradient in ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None):
        assert (found[name] - gradient).norm() <= 2e-5 * gradient.norm(), name


def test_bfloat16_loss_is_that_of_the_plain_model():
    model = model_on_gpu()
    assert fused.self_check(model, benchmark.samples(2, seed=1, size=SMALL, mean=40)) < 2e-2


def test_many_documents_need_no_dense_mask(capsys):
    """1,000 documents of 100 tokens: a dense mask of one byte a pair would take 10 GB, of bfloat16 twice that."""
    model = model_on_gpu()
    documents = [[(7 * i + j) % 7000 + 5 for j in range(100)] for i in range(1000)]
    loss_of(model, documents[:2]).backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_of(model, documents).backward()
    torch.cuda.synchronize()
    peak, dense = torch.cuda.max_memory_allocated() - before, (1000 * 100) ** 2
    with capsys.disabled():
        print(f"\n1000 documents, 100,000 tokens: peak {peak / 2**20:.0f} MiB; a dense mask alone {dense / 2**20:.0f} MiB")
    assert peak < dense / 2
