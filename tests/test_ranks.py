"""Ranks by layer: within the loss or the bytes that were asked for, and better than one rank for all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_studio import blend, ranks
from lora_studio.errors import BlendError
from lora_studio.lowrank import LowRank


def uneven(seed: int = 0) -> dict[str, LowRank]:
    """Layers of different size, strength and spectrum."""
    draw, found = torch.Generator().manual_seed(seed), {}
    for number, (out, into, size, fall) in enumerate([(40, 30, 1.0, 0.9), (20, 60, 0.1, 0.5), (64, 64, 3.0, 0.3), (10, 12, 0.01, 0.99)]):
        strength = size * fall ** torch.arange(8.0)
        found[f"layer {number}"] = LowRank(torch.randn(8, into, generator=draw), torch.randn(out, 8, generator=draw) * strength, 0.5)
    A, B = torch.randn(4, 6, 3, 3, generator=draw), torch.randn(8, 2, 1, 1, generator=draw)
    return {**found, "grouped": LowRank(A, B, 0.5, "conv"), "nothing": LowRank(torch.randn(2, 5, generator=draw), torch.zeros(5, 2))}


def parameters(modules) -> int:
    return sum(module.parameters for module in modules.values())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), loss=st.sampled_from([0.01, 0.1, 0.3, 0.6]))
def test_the_whole_is_within_the_loss_and_smaller_than_with_one_rank_for_all(seed, loss):
    modules = uneven(seed)
    small, true = ranks.resize(modules, ranks.shared(modules, loss))
    assert true.overall <= loss * (1 + 1e-6) and "nothing" not in small
    same = blend.Preview([modules]).curve([1.0]).rank_for(loss)
    alike, _ = blend.compress({name: module for name, module in modules.items() if name != "nothing"}, same)
    assert parameters(small) <= parameters(alike)


@pytest.mark.parametrize("loss", [0.05, 0.4])
def test_each_layer_is_within_the_loss_and_no_rank_is_above_need(loss):
    modules = {name: module for name, module in uneven().items() if name != "nothing"}
    chosen = ranks.per_layer(modules, loss)
    _, true = ranks.resize(modules, chosen)
    assert all(value <= loss * (1 + 1e-6) for value in true.layers.values())
    less = {name: rank - modules[name].groups for name, rank in chosen.items()}
    for name, rank in less.items():
        if rank > 0:
            assert blend.compress({name: modules[name]}, rank)[1].overall > loss


@settings(max_examples=20, deadline=None)
@given(size=st.integers(600, 12_000))
def test_the_bytes_are_kept_and_spent(size):
    modules = uneven()
    small, true = ranks.resize(modules, ranks.within(modules, size))
    assert parameters(small) * 4 <= size
    more, better = ranks.resize(modules, ranks.within(modules, size * 2))
    assert better.overall <= true.overall and parameters(more) * 4 <= 2 * size


def test_everything_within_nothing_lost_and_what_makes_no_sense_is_refused():
    modules = uneven()
    small, true = ranks.resize(modules, ranks.within(modules, 10**9))
    assert true.overall < 1e-6 and set(small) == set(modules) - {"nothing"}
    assert ranks.resize(modules, ranks.shared(modules, 0.0))[1].overall < 1e-6
    with pytest.raises(BlendError, match="10 bytes hold nothing of this adapter; the smallest step takes 88"):
        ranks.within(modules, 10)
    for wrong in (1.0, -0.1, float("nan"), True):
        with pytest.raises(BlendError, match="is no share from 0 to below 1"):
            ranks.shared(modules, wrong)
