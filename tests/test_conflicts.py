"""Judging adapters: every figure against dense fp64 matrices, and the advice against cases made to deserve it."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch

from lora_studio import blend, conflicts
from lora_studio.errors import BlendError
from lora_studio.lowrank import LowRank


def module(seed: int, rank: int = 3, shape=(70, 40), scale: float = 0.7) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rank, shape[1], generator=draw, dtype=torch.float64),
        torch.randn(shape[0], rank, generator=draw, dtype=torch.float64),
        scale,
    )


def convolution(seed: int, groups: int = 1) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(4, 6, 3, 3, generator=draw, dtype=torch.float64),
        torch.randn(8, 4 // groups, 1, 1, generator=draw, dtype=torch.float64),
        1.3,
        "conv",
    )


def embedding(seed: int) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(3, 50, generator=draw, dtype=torch.float64), torch.randn(16, 3, generator=draw, dtype=torch.float64), 0.9, "embedding"
    )


def dense(found: LowRank) -> np.ndarray:
    """B·A with its scale, as fp64 (out, in)."""
    return (found.delta().T if found.kind == "embedding" else found.delta().flatten(1)).double().numpy()


def near(value: float, meant: float) -> bool:
    return value == pytest.approx(meant, rel=1e-5, abs=1e-5)


def told(*adapters: dict) -> dict:
    return conflicts.judge(list(adapters), [chr(ord("A") + number) for number in range(len(adapters))])


ONE = {
    "model.layers.0.q": module(1),
    "model.layers.0.v": module(2, rank=5),
    "model.layers.1.q": convolution(3),
    "model.embed": embedding(4),
}
TWO = {
    "model.layers.0.q": module(5, rank=6),
    "model.layers.0.v": module(6),
    "model.layers.1.q": convolution(7),
    "model.embed": embedding(8),
}
THREE = {"model.layers.0.q": module(9), "other": module(10)}


def test_norms_ranks_and_spectra_are_those_of_the_dense_update():
    found = told(ONE, TWO, THREE)
    for row, name in enumerate(found["layers"]):
        for column, adapter in enumerate((ONE, TWO, THREE)):
            cells = {key: found["by_layer"][key][row][column] for key in ("norm", "stable_rank", "effective_rank", "spectrum")}
            if name not in adapter:
                assert set(cells.values()) == {None}
                continue
            meant = np.linalg.svd(dense(adapter[name]), compute_uv=False)
            count = len(cells["spectrum"])
            assert count == adapter[name].rank and cells["spectrum"] == pytest.approx(meant[:count], rel=1e-5, abs=1e-5)
            shares = meant[meant > 1e-9] / meant.sum()
            assert near(cells["norm"], np.sqrt((meant**2).sum())) and near(cells["stable_rank"], (meant**2).sum() / meant[0] ** 2)
            assert near(cells["effective_rank"], np.exp(-(shares * np.log(shares)).sum()))
    assert near(found["adapters"][0]["norm"], np.sqrt(sum((dense(one) ** 2).sum() for one in ONE.values())))


def test_cosines_and_angles_are_those_of_the_dense_spaces():
    found = told(ONE, TWO)
    for row, name in enumerate(found["layers"]):
        left, right = dense(ONE[name]), dense(TWO[name])
        cells = {key: found["by_layer"][key][row][0] for key in conflicts.OF_PAIRS}
        assert near(cells["cosine"], (left * right).sum() / np.linalg.norm(left) / np.linalg.norm(right))
        for side, (one, two) in {"out": (left, right), "in": (left.T, right.T)}.items():
            ranks = ONE[name].rank, TWO[name].rank
            axes = [np.linalg.svd(matrix)[0][:, :rank] for matrix, rank in zip((one, two), ranks)]
            cosines = np.linalg.svd(axes[0].T @ axes[1], compute_uv=False)
            assert near(cells[f"overlap_{side}"], (cosines**2).mean())
            assert near(cells[f"angle_{side}"], np.degrees(np.arccos(min(1, cosines[0]))))


@pytest.mark.parametrize("chunk", [1 << 20, 100])
def test_sign_conflicts_are_counted_entry_by_entry(monkeypatch, chunk):
    monkeypatch.setattr(conflicts, "CHUNK", chunk)
    one, two = {**ONE, "grouped": convolution(11, groups=2)}, {**TWO, "grouped": convolution(12, groups=2)}
    found = told(one, two)
    sums = np.zeros(4)
    for row, name in enumerate(found["layers"]):
        left, right = dense(one[name]), dense(two[name])
        smaller = np.minimum(abs(left), abs(right))
        against = np.sign(left) * np.sign(right) < 0
        sums += (smaller * against).sum(), smaller.sum(), against.sum(), (smaller > 0).sum()
        assert near(found["by_layer"]["conflict"][row][0], (smaller * against).sum() / smaller.sum())
        assert near(found["by_layer"]["conflict_plain"][row][0], against.sum() / (smaller > 0).sum())
    assert near(found["pairs"][0]["conflict"], sums[0] / sums[1]) and near(found["pairs"][0]["conflict_plain"], sums[2] / sums[3])
    assert found["sampled"]["layers"] == 0


def test_a_sample_of_rows_stands_for_a_large_layer_and_says_so(monkeypatch):
    wide = {"large": module(1, rank=8, shape=(600, 500))}, {"large": module(2, rank=8, shape=(600, 500))}
    exact = told(*wide)["by_layer"]
    monkeypatch.setattr(conflicts, "ENTRIES", 100 * 500)
    found = told(*wide)
    assert found["sampled"] == {"layers": 1, "entries": 50_000, "seed": 0} and found == told(*wide)
    assert found["by_layer"]["conflict"][0][0] != exact["conflict"][0][0]
    assert found["by_layer"]["conflict"][0][0] == pytest.approx(exact["conflict"][0][0], abs=0.05)
    assert found["by_layer"]["cosine"] == exact["cosine"]


def test_blocks_and_the_whole_put_their_layers_together():
    found = told(ONE, TWO, THREE)
    assert found["blocks"] == ["model.embed", "model.layers.0", "model.layers.1", "other"] and found["block_of"] == [1, 1, 2, 0, 3]
    names = ["model.layers.0.q", "model.layers.0.v"]
    left, right = (np.concatenate([dense(adapter[name]).ravel() for name in names]) for adapter in (ONE, TWO))
    assert near(found["by_block"]["cosine"][1][0], left @ right / np.linalg.norm(left) / np.linalg.norm(right))
    assert near(found["by_block"]["norm"][1][1], np.linalg.norm(right))
    whole = blend.cosines([ONE, TWO, THREE])
    assert all(near(pair["cosine"], whole[pair["left"]][pair["right"]]) for pair in found["pairs"])
    assert found["by_block"]["cosine"][3] == [None] * 3 and found["pairs"][1]["shared"] == 1
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_copy_that_is_turned_by_its_factors_lies_at_angle_zero_and_never_disagrees():
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    turned = {"a": LowRank(turn @ module(1).A, module(1).B @ turn.T, 1.4)}
    (pair,) = told({"a": module(1)}, turned)["pairs"]
    assert (
        near(pair["cosine"], 1)
        and near(pair["overlap_out"], 1)
        and near(pair["overlap_in"], 1)
        and pair["conflict"] < 1e-9
        and pair["angle_in"] < 1e-3
    )


def test_a_doubled_column_is_no_second_direction():
    own = module(1, rank=1)
    twice = LowRank(torch.cat([own.A, own.A]), torch.cat([own.B, own.B], dim=1), 0.35)
    found = conflicts.frame(twice)
    assert found.out[0].shape[1] == 1 and conflicts.effective_rank(found.spectrum) == pytest.approx(1, abs=1e-9)


# ---- advice


def apart(seed: int, size: float = 1.0) -> dict:
    return {f"model.layers.{number}.q": module(seed + number, shape=(300, 300), scale=size) for number in range(3)}


def test_adapters_without_anything_in_common_are_simply_added():
    assert told(apart(1), apart(20))["advice"] == ["They have little in common, so the plain sum is right: each does what it does alone."]


def test_a_small_adapter_beside_a_large_one_is_raised():
    (sentence,) = told(apart(1), apart(20, size=8.0))["advice"]
    assert sentence.startswith("B is ") and "times as large as A and drowns it: raise the weight of A" in sentence


def test_adapters_that_do_the_same_are_halved():
    (sentence,) = told(apart(1), blend.stack([apart(1), apart(20)], [1.0, 0.3]))["advice"]
    assert sentence.startswith("A and B do much the same (cosine 0.9") and sentence.endswith("a weight of about 0.5 each.")


def test_fighting_blocks_are_named_and_only_those():
    left = apart(1)
    right = {**apart(20), "model.layers.1.q": blend.stack([{"x": left["model.layers.1.q"]}], [-0.8])["x"]}
    assert told(left, right)["advice"] == [
        "A and B pull against each other in model.layers.1: merge them with ties or knots, or lower one of the two there."
    ]


def test_shared_directions_to_different_ends_are_told():
    turn = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    base = {name: LowRank(torch.linalg.qr(one.A.T).Q.T, torch.linalg.qr(one.B).Q) for name, one in apart(1).items()}
    (sentence,) = told(base, {name: LowRank(turn @ one.A, one.B) for name, one in base.items()})["advice"]
    assert sentence.startswith("A and B use the same directions (100% of them) to different ends")


def test_one_adapter_or_one_without_effect_gets_a_plain_word():
    assert "one adapter only" in told(ONE)["advice"][0]
    assert told(apart(1), blend.stack([apart(1)], [0.0]))["advice"] == ["B changes nothing, so there is nothing to weigh."]


def test_three_adapters_are_compared_two_by_two():
    assert [(pair["left"], pair["right"]) for pair in told(ONE, TWO, THREE)["pairs"]] == list(combinations(range(3), 2))


def test_layers_of_other_shapes_are_named():
    with pytest.raises(BlendError, match="a is linear 70 × 40 in one adapter and linear 40 × 70 in another"):
        told({"a": module(1)}, {"a": module(2, shape=(40, 70))})
