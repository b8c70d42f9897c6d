"""Blending low-rank updates exactly: `Σ w_t·s_t·B_t·A_t` on the factors, compressed on request, with the true loss.

Adapters are dicts from the name of a layer to its LowRank; a weight is a number, or numbers by layer pattern (weights.py). No
function here ever forms an out×in matrix: the sum of updates is the product of their stacked factors, and norms, angles and singular
values follow from the small core between the Q of a QR (Eckart and Young 1936; the core's spectrum is the sum's). QR and cores are in fp64; results are cast to the parents' dtype.
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from lora_studio.errors import BlendError
from lora_studio.lowrank import LowRank, scaled
from lora_studio.weights import Weight, by_layer

Modules = dict[str, LowRank]


def stack(adapters: list[Modules], weights: list[Weight]) -> Modules:
    """The sum `Σ w_t·adapter_t`, exactly: factors are stacked, ranks add. What has weight (or scale) 0 takes no room; a layer with a
    single part keeps its factors and only changes its scale. Raises BlendError when shapes or weights do not fit."""
    factors = factors_of(adapters, weights)
    names = dict.fromkeys(name for adapter in adapters for name in adapter)
    parts = {
        name: [
            (adapter[name], factor[name])
            for adapter, factor in zip(adapters, factors)
            if name in adapter and factor[name] and adapter[name].scale
        ]
        for name in names
    }
    check_shapes(adapters, names)
    return {name: _stack(name, found) for name, found in parts.items() if found}


def factors_of(adapters: list[Modules], weights: list[Weight]) -> list[dict[str, float]]:
    """The weight of every layer of every adapter. Raises BlendError."""
    if len(adapters) != len(weights):
        raise BlendError("blend.count", adapters=len(adapters), weights=len(weights))
    return [by_layer(weight, adapter, f"adapter {number}") for number, (adapter, weight) in enumerate(zip(adapters, weights), start=1)]


def check_shapes(adapters: list[Modules], names) -> None:
    """Raise BlendError when the layers of these names are not of one shape in all adapters that have them."""
    for name in names:
        found = [adapter[name] for adapter in adapters if name in adapter]
        for other in found[1:]:
            if (found[0].kind, found[0].shape, found[0].groups) != (other.kind, other.shape, other.groups):
                raise BlendError("blend.shapes", name=name, left=_in_words(found[0]), right=_in_words(other))


def _in_words(module: LowRank) -> str:
    return f"{module.kind} {' × '.join(map(str, module.shape))}" + (f" in {module.groups} groups" if module.groups > 1 else "")


def _stack(name: str, parts: list[tuple[LowRank, float]]) -> LowRank:
    first, weight = parts[0]
    if len(parts) == 1:
        return LowRank(first.A, first.B, weight * first.scale, first.kind)
    dtype = torch.float64 if any(module.dtype == torch.float64 for module, _ in parts) else torch.float32
    blocks = []
    for group in zip(*(module.blocks() for module, _ in parts)):
        columns = [scaled(B.to(dtype), weight * module.scale) for (B, _), (module, weight) in zip(group, parts)]
        blocks.append((torch.cat(columns, dim=1), torch.cat([A.to(dtype) for _, A in group])))
    if not all(bool(torch.isfinite(B).all()) for B, _ in blocks):
        raise BlendError("blend.overflow", name=name)
    return first.with_blocks(blocks)


# ---- measures


def norm(module: LowRank) -> float:
    """The Frobenius norm of one update, from the R of two QRs (a Gram matrix would square the rounding)."""
    total = 0.0
    for B, A in module.blocks():
        left, right = _triangle(B.double()), _triangle(A.double().T)
        total += float((left @ right.T).square().sum())
    return abs(module.scale) * sqrt(total)


def _triangle(factor: Tensor) -> Tensor:
    return torch.linalg.qr(factor, mode="r").R


def inner(left: LowRank, right: LowRank) -> float:
    """⟨ΔW_left, ΔW_right⟩ by the Gram identity tr((B₁ᵀB₂)(A₂A₁ᵀ))."""
    total = 0.0
    for (B1, A1), (B2, A2) in zip(left.blocks(), right.blocks()):
        total += float(((B1.double().T @ B2.double()) * (A1.double() @ A2.double().T)).sum())
    return left.scale * right.scale * total


def cosines(adapters: list[Modules]) -> list[list[float]]:
    """How alike adapters are: the cosine of the angle between each two of them over all layers; 0 where one of them is zero."""
    squares = [sum(norm(module) ** 2 for module in adapter.values()) for adapter in adapters]
    table = [[1.0] * len(adapters) for _ in adapters]
    for row, left in enumerate(adapters):
        for column in range(row):
            shared = sum(inner(left[name], adapters[column][name]) for name in left.keys() & adapters[column].keys())
            size = sqrt(squares[row]) * sqrt(squares[column])
            table[row][column] = table[column][row] = max(-1.0, min(1.0, shared / size)) if size else 0.0
    return table


@dataclass(frozen=True)
class Loss:
    """How far two adapters are apart, relative to the one that was meant: overall and for each layer."""

    overall: float
    layers: dict[str, float]


def difference(got: Modules, meant: Modules) -> Loss:
    """‖got − meant‖ / ‖meant‖. A layer that should be zero and is not counts as infinitely wrong."""
    apart = {name: norm(module) for name, module in stack([got, meant], [1.0, -1.0]).items()}
    return _loss({name: apart.get(name, 0.0) for name in [*meant, *(name for name in got if name not in meant)]}, meant)


def _loss(apart: dict[str, float], meant: Modules) -> Loss:
    sizes = {name: norm(meant[name]) if name in meant else 0.0 for name in apart}
    whole = _ratio(_length(apart.values()), _length(sizes.values()))
    return Loss(whole, {name: _ratio(apart[name], sizes[name]) for name in apart})


def _length(values) -> float:
    return sqrt(sum(value * value for value in values))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (float("inf") if part else 0.0)


# ---- compression


def compress(modules: Modules, rank: int) -> tuple[Modules, Loss]:
    """The nearest adapter of at most that rank in every layer, and its true loss, that of the very factors returned. A layer whose
    rank is not above it is kept as it is. A grouped convolution gets `rank // groups` in each group, at least 1. Raises BlendError."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise BlendError("blend.rank", rank=repr(rank)[:40])
    small, apart = {}, {}
    for name, module in modules.items():
        small[name], apart[name] = _compress(module, rank)
    return small, _loss(apart, modules)


def _compress(module: LowRank, rank: int) -> tuple[LowRank, float]:
    """One layer: the compressed update and ‖compressed − module‖."""
    if module.rank <= rank:
        return module, 0.0
    keep, blocks, squares = max(1, rank // module.groups), [], 0.0
    for B, A in module.blocks():
        out, left = torch.linalg.qr(B.double() * module.scale)
        into, right = torch.linalg.qr(A.double().T)
        core = left @ right.T
        U, S, V = torch.linalg.svd(core, full_matrices=False)
        # √S to both sides, so that neither factor is tiny and 16 bits keep it.
        root = S[:keep].sqrt()
        block = (out @ (U[:, :keep] * root)).to(module.dtype), ((root[:, None] * V[:keep]) @ into.T).to(module.dtype)
        blocks.append(block)
        squares += _apart(out, core, into, block)
    return module.with_blocks(blocks), sqrt(squares)


def _apart(out: Tensor, core: Tensor, into: Tensor, block: tuple[Tensor, Tensor]) -> float:
    """‖out·core·intoᵀ − B·A‖² for the rounded factors: inside the span of the two Q, and the three parts rounding put outside."""
    B, A = block[0].double(), block[1].double()
    b, a = out.T @ B, A @ into
    B_out, A_out = B - out @ b, A - a @ into.T
    inside = (core - b @ a).square().sum()
    outside = ((B_out.T @ B_out) * (a @ a.T)).sum() + ((b.T @ b) * (A_out @ A_out.T)).sum() + ((B_out.T @ B_out) * (A_out @ A_out.T)).sum()
    return float(inside + outside.clamp_min(0))


@dataclass(frozen=True)
class Curve:
    """The loss of compressing to every rank: entry r is for rank r; entry 0 (nothing kept) is 1 unless there is nothing at all. `norm` is
    that of the whole blend."""

    overall: list[float]
    layers: dict[str, list[float]]
    norm: float

    def rank_for(self, loss: float) -> int:
        """The smallest rank whose overall loss is not above `loss`."""
        return next((rank for rank, value in enumerate(self.overall) if rank and value <= loss), len(self.overall) - 1)


class Preview:
    """What a blend would lose at every rank, for any weights: one QR per layer now, then only small cores per question."""

    def __init__(self, adapters: list[Modules]):
        check_shapes(adapters, dict.fromkeys(name for adapter in adapters for name in adapter))
        self.adapters = adapters
        self.triangles = self._triangles(dict.fromkeys(name for adapter in adapters for name in adapter))

    def _triangles(self, names) -> dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
        """For each group of each layer the R of the stacked Bs and of the stacked Aᵀs, and for each column its adapter and its scale. What
        stays is allocated before and after the large matrices and never between them, where it would keep their memory from being used again."""
        columns = {name: self._columns(name) for name in names}
        room = torch.empty(2 * sum(groups * len(owner) ** 2 for owner, _, groups in columns.values()), dtype=torch.float64)
        places, start = {}, 0
        for name in names:
            places[name] = []
            for group in zip(*(adapter[name].blocks() for adapter in self.adapters if name in adapter)):
                for factor in (torch.cat([B.double() for B, _ in group], dim=1), torch.cat([A.double() for _, A in group]).T):
                    triangle = _triangle(factor)
                    end = start + triangle.numel()
                    room[start:end].view(triangle.shape).copy_(triangle)
                    places[name].append((start, end, *triangle.shape))
                    start = end
        found = {}
        for name, (owner, scale, _) in columns.items():
            kept = [room[start:end].view(rows, width) for start, end, rows, width in places[name]]
            found[name] = [(left, right, owner, scale) for left, right in zip(kept[::2], kept[1::2])]
        return found

    def _columns(self, name: str) -> tuple[Tensor, Tensor, int]:
        """For each column of a group of a layer its adapter and its scale, and how many groups there are."""
        parts = [(number, adapter[name]) for number, adapter in enumerate(self.adapters) if name in adapter]
        sizes = torch.tensor([module.rank // module.groups for _, module in parts])
        owner = torch.tensor([number for number, _ in parts]).repeat_interleave(sizes)
        scale = torch.tensor([module.scale for _, module in parts], dtype=torch.float64).repeat_interleave(sizes)
        return owner, scale, parts[0][1].groups

    def curve(self, weights: list[Weight]) -> Curve:
        """The loss at every rank for these weights."""
        factors = factors_of(self.adapters, weights)
        tails = {name: self._tail(groups, _column(factors, name)) for name, groups in self.triangles.items()}
        length = max((len(tail) for tail in tails.values()), default=1)
        whole = torch.zeros(length, dtype=torch.float64)
        for tail in tails.values():
            whole[: len(tail)] += tail
            whole[len(tail) :] += tail[-1]
        return Curve(_relative(whole), {name: _relative(tail) for name, tail in tails.items()}, sqrt(float(whole[0])))

    def products(self) -> dict[str, Tensor]:
        """For each layer the inner products ⟨ΔW_i, ΔW_j⟩ of all adapters, unweighted, from the triangles: `RᵀR` is the Gram matrix of the
        factors, so those of the rank-one parts are one elementwise product, summed over the parts of each two adapters."""
        count, found = len(self.adapters), {}
        for name, groups in self.triangles.items():
            found[name] = torch.zeros(count, count, dtype=torch.float64)
            for left, right, owner, scale in groups:
                of, scaled_left = torch.nn.functional.one_hot(owner, count).double(), left * scale
                found[name] += of.T @ ((scaled_left.T @ scaled_left) * (right.T @ right)) @ of
        return found

    def weighted(self, products: dict[str, Tensor], weights: list[Weight]) -> Tensor:
        """The inner products (n, n) of the weighted adapters over all layers, from what `products` gave."""
        factors = factors_of(self.adapters, weights)
        columns = {name: _column(factors, name) for name in products}
        return sum((columns[name][:, None] * product * columns[name] for name, product in products.items()), torch.zeros(len(weights), len(weights)).double())

    def _tail(self, groups: list, factor: Tensor) -> Tensor:
        """The squared loss of one layer at every rank from 0 to the full one."""
        tails = []
        for left, right, owner, scale in groups:
            spectrum = torch.linalg.svdvals((left * (factor[owner] * scale)) @ right.T).square()
            # From the small end, so that the tail of a falling spectrum is not lost to the head's rounding.
            tail = torch.cat([spectrum.flip(0).cumsum(0).flip(0), spectrum.new_zeros(1)])
            tails.append(tail)
        if len(tails) == 1:
            return tails[0]
        ranks = torch.arange(len(tails) * (len(tails[0]) - 1) + 1)
        each = torch.where(ranks > 0, (ranks // len(tails)).clamp_min(1), ranks)
        return sum(tail[each] for tail in tails)


def _column(factors: list[dict[str, float]], name: str) -> Tensor:
    """The weight of one layer in each adapter; 0 where it is not."""
    return torch.tensor([factor.get(name, 0.0) for factor in factors], dtype=torch.float64)


def _relative(squares: Tensor) -> list[float]:
    return (squares / squares[0]).sqrt().tolist() if float(squares[0]) > 0 else [0.0] * len(squares)
