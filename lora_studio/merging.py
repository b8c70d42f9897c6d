"""Other ways to put adapters together than the exact sum. Each says its formula and where it comes from; ΔW_t is `w_t·s_t·B_t·A_t`.

In factor space, without any out×in matrix, the result an adapter again:

    slerp        Σ c_t ΔW_t with c from the angle between the two, in each layer      Shoemake 1985
    orthogonal   ΔW without what it shares with another                                Gram-Schmidt; or both projections of a subspace
    knots        [ΔW_1 … ΔW_n] = U S [V_1 … V_n], the V merged, then U S V             Stoica et al. 2024, arXiv 2410.19735

Entry by entry, on ΔW itself and never on A and B, one layer at a time and in rows. The result has full rank: it is baked, or
approximated with its true loss told.

    magnitude    Σ of the density·n largest entries of each ΔW
    ties         the largest entries, the sign with the larger sum wins, mean of those that agree   Yadav et al. 2023, arXiv 2306.01708
    dare         entries dropped at random, the rest over the density; Σ                 Yu et al. 2023, arXiv 2311.03099
    della        as dare, small entries of a row dropped more often; then the sign vote   Deep et al. 2024, arXiv 2406.11617
    breadcrumbs  neither the largest nor the smallest entries; Σ                          Davari and Belilovsky 2023, arXiv 2312.06795

The papers of ties and della know no weights of adapters: here they multiply ΔW first, and the mean is over the sum of |w| of those that
agree, so that with weights of 1 it is the papers' own.
"""

import hashlib
from dataclasses import dataclass
from math import ceil, sqrt

import torch
from torch import Tensor

from lora_studio import blend, sketch
from lora_studio.blend import Modules
from lora_studio.errors import BlendError
from lora_studio.lowrank import LowRank
from lora_studio.weights import Weight

METHODS = ("magnitude", "ties", "dare", "della", "breadcrumbs")
TILE = 64  # rows that share one seed, so that any stretch of rows is drawn alike
PARALLEL = 0.9995  # a cosine above which two directions are one, and slerp is a straight line


# ---- in factor space


def slerp(left: Modules, right: Modules, t: float | dict[str, float]) -> Modules:
    """From left (t 0) to right (t 1) along the arc between them, in each layer: sin((1-t)θ)/sin θ of the one and sin(tθ)/sin θ of the
    other, θ from the Gram identity. Where one is missing or they are parallel it is the straight line. `t` may be one for each layer."""
    names = dict.fromkeys([*left, *right])
    found: Modules = {}
    for name in names:
        pair = [{name: adapter[name]} if name in adapter else {} for adapter in (left, right)]
        found |= blend.stack(pair, list(_arc(left.get(name), right.get(name), t[name] if isinstance(t, dict) else t)))
    return found


def _arc(left: LowRank | None, right: LowRank | None, t: float) -> tuple[float, float]:
    sizes = [blend.norm(module) if module is not None else 0.0 for module in (left, right)]
    cosine = blend.inner(left, right) / (sizes[0] * sizes[1]) if all(sizes) else 1.0
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
    return float(torch.sin((1 - t) * angle) / torch.sin(angle)), float(torch.sin(t * angle) / torch.sin(angle))


def orthogonal(adapter: Modules, other: Modules, *, space: str = "direction") -> Modules:
    """The adapter without what it shares with another, in each layer. `direction` takes away ⟨ΔW, ΔO⟩/⟨ΔO, ΔO⟩ · ΔO, after which their
    inner product is zero; `subspace` takes away all that lies in the column or the row space of ΔO: (I - PP')ΔW(I - QQ')."""
    if space not in ("direction", "subspace"):
        raise BlendError("merge.space", space=space)
    found: Modules = {}
    for name, module in adapter.items():
        if name not in other:
            found[name] = module
        elif space == "direction":
            size = blend.inner(other[name], other[name])
            share = blend.inner(module, other[name]) / size if size else 0.0
            found |= blend.stack([{name: module}, {name: other[name]}], [1.0, -share])
        else:
            found[name] = _outside(module, other[name])
    return found


def _outside(module: LowRank, other: LowRank) -> LowRank:
    blocks = []
    for (B, A), (b, a) in zip(module.blocks(), other.blocks()):
        P, Q = _span(b.double()), _span(a.double().T)
        B, A = B.double(), A.double()
        blocks.append(((B - P @ (P.T @ B)).to(module.dtype), (A - (A @ Q) @ Q.T).to(module.dtype)))
    return module.with_blocks(blocks, module.scale)


def _span(factor: Tensor) -> Tensor:
    """An orthonormal basis of the columns, without those that are there by rounding only."""
    U, S, _ = torch.linalg.svd(factor, full_matrices=False)
    return U[:, S.max().clamp_min(1e-300) * 1e-10 < S]


def knots(adapters: list[Modules], weights: list[Weight], *, method: str = "ties", density: float = 0.5, strength: float = 1.0) -> Modules:
    """Adapters aligned in one basis and merged there (KnOTS): the ΔW of a layer side by side are U S [V_1 … V_n], the V_t are put together
    by `ties` or as their `mean`, and U S V comes back. The rank is at most the sum of ranks, so the result is an adapter without loss."""
    blend.stack(adapters, weights)  # the same rules for weights and shapes
    _check_share(density)
    if method not in ("ties", "mean"):
        raise BlendError("merge.method", method=method, known="ties, mean")
    found, factors = {}, blend.factors_of(adapters, weights)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        parts = _parts(adapters, factors, name)
        if parts:
            found[name] = _aligned(parts, method, density, strength)
    return found


def _parts(adapters: list[Modules], factors: list[dict[str, float]], name: str) -> list[tuple[LowRank, float]]:
    """What acts on one layer, with its weight there."""
    return [(adapter[name], factor[name]) for adapter, factor in zip(adapters, factors) if name in adapter and factor[name] and adapter[name].scale]


def _aligned(parts: list[tuple[LowRank, float]], method: str, density: float, strength: float) -> LowRank:
    first, blocks = parts[0][0], []
    for group in zip(*(module.blocks() for module, _ in parts)):
        out, left = torch.linalg.qr(torch.cat([B.double() * (module.scale * weight) for (B, _), (module, weight) in zip(group, parts)], dim=1))
        into = [torch.linalg.qr(A.double().T) for _, A in group]
        core = torch.block_diag(*(R.T for _, R in into))
        U, S, V = torch.linalg.svd(left @ core, full_matrices=False)
        keep = S.max().clamp_min(1e-300) * 1e-12 < S
        sizes = [R.shape[0] for _, R in into]
        tasks = [part[keep] @ Q.T for part, (Q, _) in zip(V.split(sizes, dim=1), into)]  # each (k, in·k)
        merged = _vote([_largest(task, density) for task in tasks], [1.0] * len(tasks)) if method == "ties" else torch.stack(tasks).mean(0)
        root = S[keep].sqrt()
        blocks.append((((out @ U[:, keep]) * root).to(first.dtype), (root[:, None] * merged * strength).to(first.dtype)))
    widest = max(B.shape[1] for B, _ in blocks)
    pad = torch.nn.functional.pad
    return first.with_blocks([(pad(B, (0, widest - B.shape[1])), pad(A, (0, 0, 0, widest - A.shape[0]))) for B, A in blocks])


def _largest(values: Tensor, density: float) -> Tensor:
    """The share of the entries that is largest by magnitude, the rest zero."""
    count = ceil(density * values.numel())
    if count >= values.numel():
        return values
    limit = values.abs().flatten().kthvalue(values.numel() - count + 1).values
    return torch.where(values.abs() >= limit, values, torch.zeros_like(values))


def _vote(values: list[Tensor], sizes: list[float]) -> Tensor:
    """The sign with the larger sum wins each entry; the sum of those that have it over the sum of their |w|."""
    sign = torch.stack(values).sum(0).sign()
    agree = [(value.sign() == sign) & (value != 0) for value in values]
    total = sum(torch.where(yes, value, torch.zeros_like(value)) for value, yes in zip(values, agree))
    count = sum(yes * abs(size) for yes, size in zip(agree, sizes))
    return total / torch.where(count > 0, count, torch.ones_like(count))


# ---- entry by entry


@dataclass(frozen=True)
class Recipe:
    """How entries are chosen. `density` is the share of entries that is kept; `gamma` the share of the largest that breadcrumbs drops;
    `epsilon` how far della's chances spread around the density; `strength` multiplies the result; `seed` is of what is random."""

    method: str
    density: float = 0.5
    gamma: float = 0.01
    epsilon: float = 0.1
    strength: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.method not in METHODS:
            raise BlendError("merge.method", method=self.method, known=", ".join(METHODS))
        _check_share(self.density)
        wrong_gamma = self.method == "breadcrumbs" and not 0 <= self.gamma < 1
        if wrong_gamma or (self.method == "della" and not 0 <= self.epsilon <= min(self.density, 1 - self.density)):
            raise BlendError("merge.spread", gamma=self.gamma, epsilon=self.epsilon, density=self.density)


def _check_share(density: float) -> None:
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise BlendError("merge.density", density=repr(density)[:40])


class Merged:
    """One layer's merged update, made row by row when it is asked for. `shape` is that of the matrix, (out, in·k)."""

    def __init__(self, name: str, parts: list[tuple[LowRank, float]], recipe: Recipe):
        self.name, self.parts, self.recipe = name, parts, recipe
        self.module = parts[0][0]
        self.shape = (sum(B.shape[0] for B, _ in self.module.blocks()), self.module.blocks()[0][1].shape[1])
        self._factors = [[(B * (module.scale * weight), A) for B, A in module.blocks()] for module, weight in parts]
        self._limits = [self._limits_of(number) for number in range(len(parts))]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the merged update, (stop - start, in·k), in fp32 or wider."""
        first = start // TILE * TILE
        tiles = [self._tile(at, min(at + TILE, self.shape[0])) for at in range(first, stop, TILE)]
        return torch.cat(tiles)[start - first : stop - first]

    def _tile(self, start: int, stop: int) -> Tensor:
        chosen = [self._chosen(number, start, stop) for number in range(len(self.parts))]
        if self.recipe.method in ("ties", "della"):
            return self.recipe.strength * _vote(chosen, [weight for _, weight in self.parts])
        return self.recipe.strength * sum(chosen)

    def _plain(self, number: int, start: int, stop: int) -> Tensor:
        """Rows of one adapter's weighted ΔW."""
        found, at = [], 0
        for B, A in self._factors[number]:
            part = B[max(0, start - at) : max(0, stop - at)]
            if len(part):
                found.append(part @ A)
            at += B.shape[0]
        return torch.cat(found)

    def _chosen(self, number: int, start: int, stop: int) -> Tensor:
        """Rows of one adapter's ΔW, of which the recipe keeps some."""
        values, recipe = self._plain(number, start, stop), self.recipe
        if recipe.method in ("magnitude", "ties", "breadcrumbs"):
            low, high = self._limits[number]
            size = values.abs()
            return torch.where((size >= low) & (size < high), values, torch.zeros_like(values))
        draw = torch.rand(values.shape, generator=self._generator(number, start), dtype=torch.float64)
        chance = torch.full_like(draw, recipe.density)
        if recipe.method == "della" and values.shape[1] > 1:
            rank = values.abs().argsort(dim=1).argsort(dim=1).double() / (values.shape[1] - 1)
            chance = recipe.density - recipe.epsilon + 2 * recipe.epsilon * rank
        kept = (draw < chance) & (chance > 0)
        return torch.where(kept, values / chance.clamp_min(1e-12).to(values.dtype), torch.zeros_like(values))

    def _generator(self, number: int, start: int) -> torch.Generator:
        text = f"{self.recipe.seed}/{self.name}/{number}/{start}".encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))

    def _limits_of(self, number: int) -> tuple[float, float]:
        """The magnitudes between which an entry is kept: from the lowest on, below the highest."""
        count, recipe = self.shape[0] * self.shape[1], self.recipe
        if recipe.method not in ("magnitude", "ties", "breadcrumbs"):
            return 0.0, float("inf")
        above = round(recipe.gamma * count) if recipe.method == "breadcrumbs" else 0
        keep = min(ceil(recipe.density * count), count - above)
        low = self._magnitude(number, above + keep)
        return low, self._magnitude(number, above) if above else float("inf")

    def _magnitude(self, number: int, place: int) -> float:
        """The place-th largest magnitude of one adapter's ΔW, exactly, in two passes over its rows: the bits of a positive float rise with
        it, so the upper half of them is counted first, and then the lower half of those that share the one that is wanted."""
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for bits in self._bits(number):
            counts += torch.bincount(bits >> 16, minlength=1 << 16)
        upper, left = _place(counts, place)
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for bits in self._bits(number):
            counts += torch.bincount((bits & 0xFFFF)[(bits >> 16) == upper], minlength=1 << 16)
        lower, _ = _place(counts, left)
        return float(torch.tensor((upper << 16) | lower, dtype=torch.int32).view(torch.float32))

    def _bits(self, number: int):
        for start in range(0, self.shape[0], TILE):
            values = self._plain(number, start, min(start + TILE, self.shape[0])).float().abs().flatten()
            yield values.view(torch.int32).long()


def _place(counts: Tensor, place: int) -> tuple[int, int]:
    """The bucket of the place-th largest, and its place within."""
    above = counts.flip(0).cumsum(0)
    number = int((above >= place).nonzero()[0])
    return len(counts) - 1 - number, place - (int(above[number - 1]) if number else 0)


def entrywise(adapters: list[Modules], weights: list[Weight], recipe: Recipe) -> dict[str, Merged]:
    """The merged update of every layer, by its name. Raises BlendError when shapes or weights do not fit."""
    blend.stack(adapters, weights)
    found, factors = {}, blend.factors_of(adapters, weights)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        parts = _parts(adapters, factors, name)
        if parts:
            found[name] = Merged(name, parts, recipe)
    return found


def approximate(merged: Merged, rank: int, *, seed: int = 0) -> tuple[LowRank, float]:
    """A low-rank update near a merged one, and its true loss ‖approximation − merged‖/‖merged‖, that of the very factors returned. Not
    for grouped convolutions, whose B is not one matrix. Raises BlendError."""
    if merged.module.groups > 1:
        raise BlendError("merge.grouped", name=merged.name)
    B, A, _ = sketch.near(merged, rank=rank, seed=seed)
    B, A = B.to(merged.module.dtype), A.to(merged.module.dtype)
    apart = size = 0.0
    for number, rows in enumerate(sketch.stretches(merged)):
        part = B[number * sketch.STRETCH :][: len(rows)]
        apart += float((rows - part.double() @ A.double()).square().sum())
        size += float(rows.square().sum())
    return merged.module.with_blocks([(B, A)]), sqrt(apart / size) if size else 0.0
