"""Judging adapters before they are put together: how large and how rich each update is, and where two of them help or fight each other.

Everything is computed from the factors: an update's singular values and its column and row spaces follow from two QRs and the small core
between them, inner products from the Gram identity. Only the signs of entries need entries: they are read in blocks of rows, and of layers
with more than ENTRIES entries in a seeded sample of rows. Adapters are judged as they are given: weigh them first.
"""

from dataclasses import dataclass
from itertools import combinations
from math import acos, degrees, exp, sqrt

import torch
from torch import Tensor

from lora_studio import blend, weights
from lora_studio.lowrank import LowRank

ENTRIES = 1 << 19
CHUNK = 1 << 17  # what is looked at together stays in the processor's cache
SEED = 0
# What the advice goes by. These bounds are ours: no paper gives them. Updates of unlike tasks have cosines within ±0.1.
ALIKE, OPPOSED, SHARED, DROWNED = 0.7, -0.1, 0.5, 4.0
OF_ONE = ("norm", "stable_rank", "effective_rank")
OF_PAIRS = ("cosine", "overlap_out", "overlap_in", "angle_out", "angle_in", "conflict", "conflict_plain")


@dataclass(frozen=True, eq=False)
class Frame:
    """An update's own axes: its singular values (k,), falling, and orthonormal bases of its column space (out, k) and its row space
    (in, k), one of each for every group of a grouped convolution, which are independent matrices here as in blend.py."""

    spectrum: Tensor
    out: list[Tensor]
    into: list[Tensor]


def frame(module: LowRank) -> Frame:
    """The axes of one update in fp64; what is below the rounding of its largest singular value is not there."""
    values, out, into = [], [], []
    for B, A in module.blocks():
        left, R_left = torch.linalg.qr(B.double() * module.scale)
        right, R_right = torch.linalg.qr(A.double().T)
        U, S, V = torch.linalg.svd(R_left @ R_right.T, full_matrices=False)
        # Factors in fp32 bring rounding of their own, so that a second copy of a column is no second direction.
        kept = (torch.finfo(module.dtype).eps * max(module.A.shape[0], 1) * S[:1] < S) & (S > 0)
        values.append(S)
        out.append(left @ U[:, kept])
        into.append(right @ V[kept].T)
    return Frame(torch.cat(values).sort(descending=True).values, out, into)


def stable_rank(spectrum: Tensor) -> float:
    """‖ΔW‖²_F / ‖ΔW‖²₂ (Rudelson and Vershynin 2007): how many directions matter, the largest being 1. 0 for no update."""
    return float(spectrum.square().sum() / spectrum[0].square()) if len(spectrum) and spectrum[0] > 0 else 0.0


def effective_rank(spectrum: Tensor) -> float:
    """exp of the entropy of σ / Σσ (Roy and Vetterli 2007): how many directions there are, each by its share. 0 for no update."""
    shares = spectrum[spectrum > 0] / spectrum.sum()
    return exp(float(-(shares * shares.log()).sum())) if len(shares) else 0.0


def angles(left: list[Tensor], right: list[Tensor]) -> tuple[float, float]:
    """How two spaces lie to each other, from the cosines of their principal angles (Björck and Golub 1973), the singular values of UᵀV:
    the mean cos² over the smaller of the two (0 to 1), and the smallest angle in degrees. (0, 90) where one of them is nothing."""
    squares, least, largest = 0.0, 0, 0.0
    for U, V in zip(left, right):
        cosines = torch.linalg.svdvals(U.T @ V)
        squares += float(cosines.square().sum())
        largest = max(largest, float(cosines[:1].sum()))
        least += len(cosines)
    return (min(1.0, squares / least), degrees(acos(min(1.0, largest)))) if least else (0.0, 90.0)


# ---- signs


@dataclass(frozen=True)
class Signs:
    """What two updates' entries say of each other, over the entries where neither is 0: how many there are and how many disagree, and
    the same with each entry counting as the smaller of the two. `share` of the layer's rows was read."""

    both: float
    against: float
    heavy: float
    heavy_against: float
    share: float

    def conflict(self) -> tuple[float, float]:
        """The share of entries that disagree, weighted by the smaller of the two, and plain."""
        return (self.heavy_against / self.heavy if self.heavy else 0.0), (self.against / self.both if self.both else 0.0)


def signs(modules: list[LowRank]) -> list[Signs]:
    """The signs of each two updates of one layer (those of combinations(modules, 2)), the figures standing for the whole layer."""
    out = modules[0].B.shape[0]
    width = modules[0].A.flatten(1).shape[1]
    rows = torch.arange(out)
    if out * width > ENTRIES:
        rows = torch.randperm(out, generator=torch.Generator().manual_seed(SEED))[: max(1, ENTRIES // width)].sort().values
    share = len(rows) / out
    pairs = list(combinations(range(len(modules)), 2))
    sums = torch.zeros(len(pairs), 4, dtype=torch.float64)
    for some in rows.split(max(1, CHUNK // width)):
        found = [_rows(module, some) for module in modules]
        sizes, ups = [entries.abs() for entries in found], [entries > 0 for entries in found]
        for number, (left, right) in enumerate(pairs):
            smaller = torch.minimum(sizes[left], sizes[right])
            against = ups[left] ^ ups[right]
            figures = smaller.count_nonzero(), (smaller.bool() & against).count_nonzero(), smaller.sum(), (smaller * against).sum()
            sums[number] += torch.stack([figure.double() for figure in figures])
    return [Signs(*(row / share).tolist(), share) for row in sums]


def _rows(module: LowRank, rows: Tensor) -> Tensor:
    """Those rows of B·A with its scale, (rows, in)."""
    found, start = [], 0
    for B, A in module.blocks():
        mine = rows[(rows >= start) & (rows < start + len(B))] - start
        found.append((B[mine] * module.scale) @ A)
        start += len(B)
    return torch.cat(found) if len(found) > 1 else found[0]


# ---- the judgement


def judge(adapters: list[blend.Modules], names: list[str], *, look=lambda: None) -> dict:
    """What there is to know before these adapters are put together, as plain values fit for a heat map: rows are layers (or blocks),
    columns are adapters (OF_ONE and spectrum) or pairs (OF_PAIRS); null where there is nothing to compare. `look` is called before every
    layer and may raise to stop. Raises BlendError when shapes do not fit."""
    layers = list(dict.fromkeys(name for adapter in adapters for name in adapter))
    blend.check_shapes(adapters, layers)
    places, blocks = [weights.blocks([name])[0] for name in layers], weights.blocks(layers)
    found = []
    for name in layers:
        look()
        found.append(_layer([adapter.get(name) for adapter in adapters]))
    pairs = list(combinations(range(len(adapters)), 2))
    members = [[layer for layer, place in zip(found, places) if place == block] for block in blocks]
    ones = [
        {
            "name": name,
            "rank": max((module.rank for module in adapter.values()), default=0),
            "layers": len(adapter),
            **_of_one(found, number),
        }
        for number, (name, adapter) in enumerate(zip(names, adapters))
    ]
    twos = [
        {
            "left": pair[0],
            "right": pair[1],
            "shared": sum(layer["pairs"][number] is not None for layer in found),
            **_of_two(found, number, pair),
        }
        for number, pair in enumerate(pairs)
    ]
    told = {
        "adapters": ones, "pairs": twos, "layers": layers, "blocks": blocks, "block_of": [blocks.index(place) for place in places],
        "by_layer": _table([[layer] for layer in found], len(adapters), pairs), "by_block": _table(members, len(adapters), pairs),
        "sampled": {"layers": sum(layer["share"] < 1 for layer in found), "entries": ENTRIES, "seed": SEED},
    }  # fmt: skip
    told["by_layer"]["spectrum"] = [[one["spectrum"] if one else None for one in layer["ones"]] for layer in found]
    return {**told, "advice": advise(told)}


def _layer(modules: list[LowRank | None]) -> dict:
    """One layer: what each adapter does there, and what each two do to each other; None where one is not there."""
    here = [number for number, module in enumerate(modules) if module is not None]
    frames = {number: frame(modules[number]) for number in here}
    ones: list[dict | None] = [None] * len(modules)
    for number, own in frames.items():
        ones[number] = {
            "norm": float(own.spectrum.norm()), "stable_rank": stable_rank(own.spectrum), "effective_rank": effective_rank(own.spectrum),
            "spectrum": [_short(value) for value in own.spectrum.tolist()],
        }  # fmt: skip
    read = dict(zip(combinations(here, 2), signs([modules[number] for number in here]))) if len(here) > 1 else {}
    twos = []
    for left, right in combinations(range(len(modules)), 2):
        seen = read.get((left, right))
        if seen is None:
            twos.append(None)
            continue
        out, into = angles(frames[left].out, frames[right].out), angles(frames[left].into, frames[right].into)
        twos.append({"inner": blend.inner(modules[left], modules[right]), "signs": seen, "out": out, "into": into})
    return {"ones": ones, "pairs": twos, "share": min((seen.share for seen in read.values()), default=1.0)}


def _of_one(layers: list[dict], number: int) -> dict:
    """An adapter over some layers: its norm, and its ranks, each layer counting as its norm²."""
    own = [layer["ones"][number] for layer in layers if layer["ones"][number]]
    square = sum(one["norm"] ** 2 for one in own)
    ranks = [sum(one["norm"] ** 2 * one[key] for one in own) / square if square else 0.0 for key in OF_ONE[1:]]
    return dict(zip(OF_ONE, map(_short, (sqrt(square), *ranks))))


def _of_two(layers: list[dict], number: int, pair: tuple[int, int]) -> dict:
    """Two adapters over some layers: the cosine over all of them; overlaps as means, each layer counting as the product of the norms;
    the smallest angles; the conflict over all entries. All None where they meet in no layer."""
    met = [(layer["pairs"][number], [layer["ones"][one]["norm"] for one in pair]) for layer in layers if layer["pairs"][number]]
    if not met:
        return dict.fromkeys(OF_PAIRS)
    norms = [sqrt(sum(layer["ones"][one]["norm"] ** 2 for layer in layers if layer["ones"][one])) for one in pair]
    size, weight = norms[0] * norms[1], sum(left * right for _, (left, right) in met)
    means = [sum(two[side][0] * left * right for two, (left, right) in met) / weight if weight else 0.0 for side in ("out", "into")]
    sums = Signs(*(sum(getattr(two["signs"], key) for two, _ in met) for key in ("both", "against", "heavy", "heavy_against")), 1.0)
    cosine = max(-1.0, min(1.0, sum(two["inner"] for two, _ in met) / size)) if size else 0.0
    figures = (cosine, *means, *(min(two[side][1] for two, _ in met) for side in ("out", "into")), *sums.conflict())
    return dict(zip(OF_PAIRS, map(_short, figures)))


def _table(rows: list[list[dict]], count: int, pairs: list[tuple[int, int]]) -> dict[str, list[list]]:
    """Heat maps: for every row (some layers together) what each adapter and each pair is there."""
    nothing = dict.fromkeys(OF_ONE)
    ones = [[_of_one(row, number) if any(layer["ones"][number] for layer in row) else nothing for number in range(count)] for row in rows]
    twos = [[_of_two(row, number, pair) for number, pair in enumerate(pairs)] for row in rows]
    singles = {key: [[cell[key] for cell in row] for row in ones] for key in OF_ONE}
    return singles | {key: [[cell[key] for cell in row] for row in twos] for key in OF_PAIRS}


def _short(value: float) -> float:
    return float(f"{value:.6g}")


# ---- advice


def advise(told: dict) -> list[str]:
    """One or two sentences that follow from a judgement, the gravest first: which adapter drowns which, which fight and where, which do the
    same thing twice, which share their directions; or that the plain sum is right."""
    names, norms = ([one[key] for one in told["adapters"]] for key in ("name", "norm"))
    empty = [name for name, norm in zip(names, norms) if not norm]
    if empty:
        return [f"{_and(empty)} {'changes' if len(empty) == 1 else 'change'} nothing, so there is nothing to weigh."]
    if len(names) < 2:
        return ["There is one adapter only, so nothing can stand in its way."]
    found = [*_drowned(names, norms), *_fights(told, names), *_doubles(told, names), *_crowds(told, names)]
    return found[:2] or ["They have little in common, so the plain sum is right: each does what it does alone."]


def _drowned(names: list[str], norms: list[float]) -> list[str]:
    small, large = norms.index(min(norms)), norms.index(max(norms))
    ratio = norms[large] / norms[small]
    if ratio < DROWNED:
        return []
    remedy = f"raise the weight of {names[small]} up to {ratio:.2g} times, or lower that of {names[large]}"
    return [f"{names[large]} is {ratio:.1f} times as large as {names[small]} and drowns it: {remedy}."]


def _fights(told: dict, names: list[str]) -> list[str]:
    """The pair that fights in most blocks."""
    found = []
    for number, pair in enumerate(told["pairs"]):
        cosines = {block: row[number] for block, row in zip(told["blocks"], told["by_block"]["cosine"]) if row[number] is not None}
        blocks = sorted((block for block, value in cosines.items() if value <= OPPOSED), key=cosines.get)
        if blocks:
            found.append((len(blocks) / len(cosines), blocks, pair))
    if not found:
        return []
    share, blocks, pair = max(found, key=lambda one: one[0])
    more = f" and {len(blocks) - 4} more" if len(blocks) > 4 else ""
    where = "nearly everywhere" if share > 0.8 and len(blocks) > 4 else f"in {', '.join(blocks[:4])}{more}"
    return [
        f"{names[pair['left']]} and {names[pair['right']]} pull against each other {where}: merge them with ties or knots, or lower one of the two there."
    ]


def _doubles(told: dict, names: list[str]) -> list[str]:
    pairs = [pair for pair in told["pairs"] if pair["cosine"] is not None and pair["cosine"] >= ALIKE]
    if not pairs:
        return []
    who = sorted({number for pair in pairs for number in (pair["left"], pair["right"])})
    worst = max(pair["cosine"] for pair in pairs)
    return [
        f"{_and([names[number] for number in who])} do much the same (cosine {worst:.2f}), so their plain sum overshoots: start with a weight of about {1 / len(who):.2g} each."
    ]


def _crowds(told: dict, names: list[str]) -> list[str]:
    def shared(pair: dict) -> float:
        return min(pair["overlap_out"], pair["overlap_in"]) if pair["shared"] and pair["cosine"] < ALIKE else 0.0

    pair = max(told["pairs"], key=shared)
    if shared(pair) < SHARED:
        return []
    return [
        f"{names[pair['left']]} and {names[pair['right']]} use the same directions ({shared(pair):.0%} of them) to different ends: try the sum, and knots where it disappoints."
    ]


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
