"""Ways to merge beside the exact sum: each against its paper's formula on dense matrices in fp64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_studio import blend, merging
from lora_studio.errors import BlendError
from lora_studio.lowrank import LowRank
from lora_studio.merging import Recipe


def module(seed: int, rank: int = 3, shape=(70, 40), scale: float = 0.7) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, shape[1], generator=draw), torch.randn(shape[0], rank, generator=draw), scale)


def dense(found: LowRank) -> torch.Tensor:
    return found.cast(torch.float64).delta().flatten(1)


def near(got: torch.Tensor, meant: torch.Tensor, limit: float = 1e-6) -> bool:
    return bool((got.double() - meant).norm() <= limit * meant.norm().clamp_min(1e-12))


PAIR = ({"a": module(1), "b": module(2)}, {"a": module(3, rank=5, scale=1.3), "b": module(4)})


LEFT, RIGHT = {"": 0.5, "b": -1.2}, {"a": 2.0, "b": 0.0}  # weights by layer


@pytest.mark.parametrize("method", [*merging.METHODS, "knots"])
def test_a_weight_by_layer_is_in_each_layer_the_number_it_has_there(method):
    def merged(weights) -> dict[str, torch.Tensor]:
        if method == "knots":
            return {name: dense(one) for name, one in merging.knots(list(PAIR), weights).items()}
        return {name: one.rows(0, 70) for name, one in merging.entrywise(list(PAIR), weights, Recipe(method, density=0.5)).items()}

    found = merged([LEFT, RIGHT])
    assert torch.equal(found["a"], merged([0.5, 2.0])["a"]) and torch.equal(found["b"], merged([-1.2, 0.0])["b"])
    assert not torch.equal(found["b"], merged([0.5, 0.0])["b"])


def test_slerp_may_stand_elsewhere_on_the_arc_in_each_layer():
    found = merging.slerp(*PAIR, {"a": 0.25, "b": 0.6})
    assert near(dense(found["a"]), dense(merging.slerp(*PAIR, 0.25)["a"])) and near(dense(found["b"]), dense(merging.slerp(*PAIR, 0.6)["b"]))


# ---- in factor space


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_goes_along_the_arc_in_each_layer(t):
    found = merging.slerp(*PAIR, t)
    for name in ("a", "b"):
        left, right = dense(PAIR[0][name]), dense(PAIR[1][name])
        angle = torch.arccos((left * right).sum() / left.norm() / right.norm())
        meant = (torch.sin((1 - t) * angle) * left + torch.sin(t * angle) * right) / torch.sin(angle)
        assert near(dense(found[name]), meant)


def test_slerp_between_like_directions_or_with_nothing_is_a_straight_line():
    one = {"a": module(1)}
    twice = blend.stack([one], [2.0])
    assert near(dense(merging.slerp(one, twice, 0.25)["a"]), 1.25 * dense(one["a"]))
    opposite = blend.stack([one], [-1.0])
    assert near(dense(merging.slerp(one, opposite, 0.25)["a"]), 0.5 * dense(one["a"]))
    assert near(dense(merging.slerp(one, {}, 0.25)["a"]), 0.75 * dense(one["a"]))


def test_what_is_orthogonal_shares_nothing_and_leaves_the_rest():
    found = merging.orthogonal(*PAIR)
    for name in ("a", "b"):
        left, right = dense(PAIR[0][name]), dense(PAIR[1][name])
        assert abs((dense(found[name]) * right).sum()) < 1e-5 * left.norm() * right.norm()
        assert near(dense(found[name]), left - (left * right).sum() / right.square().sum() * right)
    apart = merging.orthogonal(*PAIR, space="subspace")
    for name in ("a", "b"):
        left, right = dense(PAIR[0][name]), dense(PAIR[1][name])
        U, S, V = torch.linalg.svd(right, full_matrices=False)
        P, Q = U[:, S > 1e-9], V[S > 1e-9].T
        meant = (torch.eye(len(P)) - P @ P.T).double() @ left @ (torch.eye(len(Q)) - Q @ Q.T).double()
        assert near(dense(apart[name]), meant, 1e-5) and apart[name].rank == PAIR[0][name].rank
    assert merging.orthogonal(PAIR[0], {})["a"] is PAIR[0]["a"]


def reference_ties(values, sizes, density: float) -> torch.Tensor:
    """Yadav et al. 2023, section 4: trim, elect, disjoint mean; weights first, the mean over the |w| that agree."""
    trimmed = []
    for value in values:
        count = math.ceil(density * value.numel())
        limit = value.abs().flatten().sort(descending=True).values[count - 1]
        trimmed.append(torch.where(value.abs() >= limit, value, torch.zeros_like(value)))
    elected = torch.stack(trimmed).sum(0).sign()
    found = torch.zeros_like(elected)
    for row in range(found.shape[0]):
        for column in range(found.shape[1]):
            agree = [(value[row, column], abs(size)) for value, size in zip(trimmed, sizes) if value[row, column] * elected[row, column] > 0]
            if agree:
                found[row, column] = sum(value for value, _ in agree) / sum(size for _, size in agree)
    return found


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_knots_is_the_dense_svd_with_the_parts_merged_and_keeps_the_rank(density):
    adapters, weights = [PAIR[0], PAIR[1], {"a": module(6, rank=2)}], [1.0, 0.5, -0.7]
    found = merging.knots(adapters, weights, density=density, strength=1.5)
    for name in ("a", "b"):
        parts = [weight * dense(adapter[name]) for adapter, weight in zip(adapters, weights) if name in adapter]
        U, S, V = torch.linalg.svd(torch.cat(parts, dim=1), full_matrices=False)
        keep = S.max() * 1e-9 < S
        tasks = [part[keep] for part in V.split([part.shape[1] for part in parts], dim=1)]
        meant = 1.5 * (U[:, keep] * S[keep]) @ reference_ties(tasks, [1.0] * len(tasks), density)
        assert near(dense(found[name]), meant, 1e-5)
        assert found[name].rank == sum(adapter[name].rank for adapter in adapters if name in adapter)
    mean = merging.knots([PAIR[0], PAIR[1]], [1.0, 1.0], method="mean")
    assert near(dense(mean["a"]), (dense(PAIR[0]["a"]) + dense(PAIR[1]["a"])) / 2, 1e-5)


# ---- entry by entry


def test_ties_is_the_papers_with_weights_first():
    weights = [1.0, -0.6]
    for density in (0.2, 0.5, 1.0):
        merged = merging.entrywise(list(PAIR), weights, Recipe("ties", density=density, strength=0.8))
        for name, found in merged.items():
            values = [weight * dense(adapter[name]).float() for adapter, weight in zip(PAIR, weights)]
            assert near(found.rows(0, 70), 0.8 * reference_ties([value.double() for value in values], weights, density), 1e-5)


def test_magnitude_and_breadcrumbs_keep_the_entries_they_say():
    merged = merging.entrywise(list(PAIR), [1.0, 2.0], Recipe("magnitude", density=0.1))["a"]
    crumbs = merging.entrywise(list(PAIR), [1.0, 2.0], Recipe("breadcrumbs", density=0.1, gamma=0.05))["a"]
    kept = middle = torch.zeros(70, 40, dtype=torch.float64)
    for adapter, weight in zip(PAIR, (1.0, 2.0)):
        value = weight * dense(adapter["a"])
        order = value.abs().flatten().argsort(descending=True)
        for start, stop in ((0, 280), (140, 420)):
            mask = torch.zeros(2800, dtype=torch.bool)
            mask[order[start:stop]] = True
            picked = torch.where(mask.view(70, 40), value, torch.zeros_like(value))
            kept, middle = (kept + picked, middle) if start == 0 else (kept, middle + picked)
    assert near(merged.rows(0, 70), kept, 1e-5) and near(crumbs.rows(0, 70), middle, 1e-5)


def test_dare_drops_at_random_rescales_and_is_right_on_the_average():
    value = dense(PAIR[0]["a"])
    runs = [merging.entrywise([PAIR[0]], [1.0], Recipe("dare", density=0.25, seed=seed))["a"].rows(0, 70).double() for seed in range(60)]
    for found in runs[:3]:
        kept = found != 0
        assert abs(kept.double().mean() - 0.25) < 0.03 and near(found[kept], value[kept] / 0.25, 1e-5)
    assert (torch.stack(runs).mean(0) - value).norm() < 0.3 * value.norm()
    assert torch.equal(runs[0], merging.entrywise([PAIR[0]], [1.0], Recipe("dare", density=0.25, seed=0))["a"].rows(0, 70).double())
    assert not torch.equal(runs[0], runs[1])


def test_della_keeps_large_entries_of_a_row_more_often_and_rescales_each_by_its_chance():
    wide = {"a": module(9, shape=(64, 400))}
    runs = [merging.entrywise([wide], [1.0], Recipe("della", density=0.5, epsilon=0.3, seed=seed))["a"].rows(0, 64) for seed in range(30)]
    value = dense(wide["a"])
    rank = value.abs().argsort(dim=1).argsort(dim=1) / 399
    often = torch.stack([found != 0 for found in runs]).double().mean(0)
    assert abs(often[rank > 0.9].mean() - 0.77) < 0.03 and abs(often[rank < 0.1].mean() - 0.23) < 0.03
    kept = runs[0] != 0  # of one adapter the vote divides by |w| = 1
    assert near(runs[0][kept], (value / (0.2 + 0.6 * rank))[kept], 1e-5)


@pytest.mark.parametrize("method", merging.METHODS)
def test_any_stretch_of_rows_is_that_of_the_whole(method):
    merged = merging.entrywise(list(PAIR), [1.0, -0.5], Recipe(method, density=0.4, seed=5))["a"]
    whole = merged.rows(0, 70)
    assert torch.equal(merged.rows(13, 69), whole[13:69]) and torch.equal(merged.rows(64, 65), whole[64:65])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.001, 1.0))
def test_the_place_of_a_magnitude_is_exact(seed, share):
    merged = merging.entrywise([{"a": module(seed)}], [1.0], Recipe("magnitude", density=share))["a"]
    rows = torch.cat([merged._plain(0, start, min(start + merging.TILE, 70)) for start in range(0, 70, merging.TILE)])
    count = math.ceil(share * 2800)
    assert merged._limits[0][0] == float(rows.abs().flatten().sort(descending=True).values[count - 1])


def test_an_approximation_tells_its_true_loss_and_is_near_the_best():
    merged = merging.entrywise(list(PAIR), [1.0, 1.0], Recipe("ties", density=0.5))["a"]
    whole = merged.rows(0, 70).double()
    for rank in (1, 8, 40):
        found, loss = merging.approximate(merged, rank)
        best = torch.linalg.svdvals(whole)[rank:].norm() / whole.norm()
        assert loss == pytest.approx(float((dense(found) - whole).norm() / whole.norm()), rel=1e-6, abs=1e-7)
        assert loss <= 1.02 * best + 1e-6 and found.rank == rank


def test_convolutions_and_embeddings_merge_as_their_matrices():
    draw = torch.Generator().manual_seed(0)
    conv = {"c": LowRank(torch.randn(2, 3, 3, 3, generator=draw), torch.randn(8, 2, 1, 1, generator=draw), 0.5, "conv")}
    found, _ = merging.approximate(merging.entrywise([conv], [1.0], Recipe("magnitude", density=1.0))["c"], 2)
    assert found.kind == "conv" and near(found.cast(torch.float64).delta(), conv["c"].cast(torch.float64).delta(), 1e-5)
    grouped = {"c": LowRank(torch.randn(4, 6, 3, 3, generator=draw), torch.randn(8, 2, 1, 1, generator=draw), 0.5, "conv")}
    merged = merging.entrywise([grouped], [1.0], Recipe("magnitude", density=1.0))["c"]
    assert near(merged.rows(0, 8), dense(grouped["c"]), 1e-6)
    with pytest.raises(BlendError, match="is a grouped convolution"):
        merging.approximate(merged, 2)
    assert near(dense(merging.knots([grouped], [1.0], density=1.0)["c"]), dense(grouped["c"]), 1e-5)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: Recipe("average"), "average is no way to merge. Known: magnitude"),
        (lambda: Recipe("ties", density=0.0), "density 0.0 is no share"),
        (lambda: Recipe("ties", density=float("nan")), "density nan is no share"),
        (lambda: Recipe("della", density=0.95, epsilon=0.1), "do not go with the density 0.95"),
        (lambda: merging.knots([PAIR[0]], [1.0], method="dare"), "dare is no way to merge. Known: ties, mean"),
        (lambda: merging.orthogonal(*PAIR, space="rows"), "rows is no way to take"),
        (lambda: merging.entrywise(list(PAIR), [1.0], Recipe("ties")), "2 adapters"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(act, said):
    with pytest.raises(BlendError, match=said):
        act()
