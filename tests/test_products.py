"""LoHa, LoKr and the Tucker form as low-rank updates: exactly what their definitions give, in fp64 to the last bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_studio import blend, products

SIZES = st.integers(1, 6)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(out=SIZES, into=SIZES, first=SIZES, second=SIZES)
def test_loha_is_the_product_entry_by_entry(out, into, first, second):
    w1a, w1b, w2a, w2b = drawn(1, out, first), drawn(2, first, into), drawn(3, out, second), drawn(4, second, into)
    found = products.loha(w1a, w1b, w2a, w2b, scale=0.3)
    assert torch.allclose(found.delta(), 0.3 * (w1a @ w1b) * (w2a @ w2b), rtol=1e-12, atol=1e-13) and found.rank == first * second


@given(a=SIZES, b=SIZES, c=SIZES, d=SIZES, rank=SIZES)
def test_lokr_is_the_kronecker_product_at_the_lower_of_both_ranks(a, b, c, d, rank):
    w1, w2a, w2b = drawn(1, a, b), drawn(2, c, rank), drawn(3, rank, d)
    found = products.lokr(w1, w2a, w2b, scale=2.0)
    assert torch.allclose(found.delta(), 2.0 * torch.kron(w1, w2a @ w2b), rtol=1e-12, atol=1e-13) and found.rank == min(a, b) * rank
    whole = products.lokr(w1, drawn(4, c, d))
    assert torch.allclose(whole.delta(), torch.kron(w1, drawn(4, c, d)), rtol=1e-12, atol=1e-13) and whole.rank == min(a, b) * min(c, d)


def test_convolutions_with_and_without_a_core():
    shape, k = (6, 8, 3, 3), (3, 3)
    w1a, w1b, w2a, w2b = drawn(1, 6, 2), drawn(2, 2, 72), drawn(3, 6, 3), drawn(4, 3, 72)
    found = products.loha(w1a, w1b, w2a, w2b, shape=shape)
    assert found.kind == "conv" and torch.allclose(found.delta(), ((w1a @ w1b) * (w2a @ w2b)).view(shape), rtol=1e-12, atol=1e-13)

    def rebuilt(core, wa, wb):
        return torch.einsum("ijkl,ip,jr->prkl", core, wa, wb)

    cores = [(drawn(5, 2, 2, *k), drawn(6, 2, 6), drawn(7, 2, 8)), (drawn(8, 3, 3, *k), drawn(9, 3, 6), drawn(10, 3, 8))]
    (a1, b1), (a2, b2) = (products.tucker(*core) for core in cores)
    found = products.loha(a1, b1, a2, b2, shape=shape)
    assert torch.allclose(found.delta(), rebuilt(*cores[0]) * rebuilt(*cores[1]), rtol=1e-12, atol=1e-13)

    w1, core = drawn(11, 2, 4), (drawn(12, 2, 2, *k), drawn(13, 2, 3), drawn(14, 2, 2))
    found = products.lokr(w1, *products.tucker(*core), shape=(6, 8, 3, 3))
    meant = torch.kron(w1[:, :, None, None], rebuilt(*core).contiguous())
    assert torch.allclose(found.delta(), meant, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rank", [1, 4])
def test_they_blend_with_plain_updates_exactly(rank):
    loha = products.loha(drawn(1, 8, 2), drawn(2, 2, 9), drawn(3, 8, 2), drawn(4, 2, 9))
    lokr = products.lokr(drawn(5, 2, 3), drawn(6, 4, rank), drawn(7, rank, 3))
    found = blend.stack([{"x": loha}, {"x": lokr}], [0.5, -1.5])["x"]
    assert torch.allclose(found.delta(), 0.5 * loha.delta() - 1.5 * lokr.delta(), rtol=1e-12, atol=1e-13)
