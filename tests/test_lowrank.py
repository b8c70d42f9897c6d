"""LowRank: the factors mean what PEFT means by them, and folding, balancing and padding change nothing."""

import pytest
import torch

from lora_studio.lowrank import LowRank


def draw(kind: str, *, groups: int = 1, rank: int = 4, seed: int = 0, dtype=torch.float32) -> LowRank:
    torch.manual_seed(seed)
    A, B = {
        "linear": ((rank, 12), (8, rank)),
        "embedding": ((rank, 12), (8, rank)),
        "conv": ((rank, 6, 3, 3), (8, rank // groups, 1, 1)),
    }[kind]
    return LowRank(torch.randn(A, dtype=dtype), torch.randn(B, dtype=dtype), scale=1.7, kind=kind)


KINDS = [("linear", 1), ("embedding", 1), ("conv", 1), ("conv", 2)]


def dense(module: LowRank) -> torch.Tensor:
    """The update as a matrix or kernel in fp64, written out entry by entry with einsum."""
    A, B = module.A.double(), module.B.double()
    if module.kind == "embedding":
        return torch.einsum("rv,wr->vw", A, B) * module.scale
    if module.kind == "linear":
        return torch.einsum("ri,or->oi", A, B) * module.scale
    per_group = A.shape[0] // module.groups
    rows = []
    for out in range(B.shape[0]):
        group = out // (B.shape[0] // module.groups)
        rows.append(torch.einsum("rikl,r->ikl", A[group * per_group : (group + 1) * per_group], B[out].flatten()))
    return torch.stack(rows) * module.scale


@pytest.mark.parametrize("kind,groups", KINDS)
def test_delta_is_the_sum_over_the_rank(kind, groups):
    module = draw(kind, groups=groups)
    assert module.groups == groups and module.delta().shape == module.shape
    torch.testing.assert_close(module.delta().double(), dense(module), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind,groups", KINDS)
def test_folding_balancing_and_padding_change_nothing(kind, groups):
    module = draw(kind, groups=groups)
    small = LowRank(module.A * 300, module.B / 7000, module.scale, kind)
    wanted = dense(small)
    for other in (small.folded(), small.balanced(), small.padded(8), small.balanced().padded(12)):
        assert (dense(other) - wanted).norm() <= 1e-7 * wanted.norm()
    assert small.balanced().scale == small.folded().scale == 1.0
    assert small.padded(8).rank == 8 and small.padded(8).groups == groups


def test_balancing_multiplies_by_powers_of_two_only():
    module = LowRank(*(draw("linear").A * 1e3, draw("linear").B * 1e-5))
    even = module.balanced()
    ratio = (even.A / module.A).log2()
    assert torch.equal(ratio, ratio.round()) and torch.equal(even.A.double().T @ torch.diag(torch.ones(4).double()), even.A.double().T)
    a, b = even.A.norm(dim=1), even.B.norm(dim=0)
    assert bool(((a / b > 0.49) & (a / b < 2.05)).all())
    assert torch.equal(dense(even), dense(module))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_keep_a_tiny_update_once_it_is_balanced(dtype):
    module = LowRank(draw("linear").A, draw("linear").B * 3e-8)
    lost = (dense(module.cast(dtype)) - dense(module)).norm() / dense(module).norm()
    kept = (dense(module.balanced().cast(dtype)) - dense(module)).norm() / dense(module).norm()
    assert kept < (1e-3 if dtype == torch.float16 else 8e-3)
    assert dtype == torch.bfloat16 or lost > 0.1  # so that the test could fail


@pytest.mark.parametrize("dtype,wide", [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_it_computes_in_fp32_or_wider_and_casts_at_the_edge(dtype, wide):
    module = draw("linear", dtype=torch.float64)
    module = LowRank(module.A.to(dtype), module.B.to(dtype), module.scale)
    assert module.delta().dtype == wide and module.delta(torch.bfloat16).dtype == torch.bfloat16
    exact = dense(module)
    assert (module.delta().double() - exact).norm() < (1e-6 if wide == torch.float32 else 1e-14) * exact.norm()


@pytest.mark.parametrize(
    "A,B,kind",
    [((4, 8), (8, 3), "linear"), ((4, 8), (8, 4, 1), "linear"), ((4, 8, 3, 3), (8, 4, 3, 3), "conv"), ((4, 8, 3), (8, 3, 1), "conv"), ((4, 8, 3), (7, 2, 1), "conv"), ((4, 8, 3), (8, 4, 1), "embedding")],
)
def test_factors_that_do_not_fit_are_refused(A, B, kind):
    with pytest.raises(ValueError):
        LowRank(torch.zeros(A), torch.zeros(B), kind=kind)


def test_padding_must_fit_the_groups():
    with pytest.raises(ValueError):
        draw("conv", groups=2).padded(7)
    with pytest.raises(ValueError):
        draw("linear").padded(3)


def peft_layer(kind: str, groups: int):
    """A PEFT layer with random factors on a base of zeros, its LowRank, and an input."""
    import peft

    base = {
        "linear": lambda: torch.nn.Linear(12, 8, bias=False),
        "embedding": lambda: torch.nn.Embedding(12, 8),
        "conv": lambda: torch.nn.Conv2d(6, 8, 3, groups=groups, bias=False),
    }[kind]()
    torch.nn.init.zeros_(base.weight)
    model = torch.nn.Sequential(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"])).base_model.model[0]
    ours = draw(kind, groups=groups)
    A, B = (wrapped.lora_embedding_A, wrapped.lora_embedding_B) if kind == "embedding" else (wrapped.lora_A, wrapped.lora_B)
    with torch.no_grad():
        (A["default"] if kind == "embedding" else A["default"].weight).copy_(ours.A)
        (B["default"] if kind == "embedding" else B["default"].weight).copy_(ours.B)
    return wrapped, LowRank(ours.A, ours.B, 6 / 4, kind)


@pytest.mark.parametrize("kind,groups", KINDS)
def test_a_layer_of_peft_computes_what_delta_says(kind, groups):
    wrapped, ours = peft_layer(kind, groups)
    torch.manual_seed(1)
    if kind == "linear":
        given = torch.randn(3, 12)
        expected = given @ ours.delta().T
    elif kind == "embedding":
        given = torch.tensor([1, 5, 11])
        expected = ours.delta()[given]
    else:
        given = torch.randn(2, 6, 5, 5)
        expected = torch.nn.functional.conv2d(given, ours.delta())
    torch.testing.assert_close(wrapped(given), expected, rtol=1e-5, atol=1e-5)
