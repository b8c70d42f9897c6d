"""Updates that multiply a weight (out, in): IA3, a number for each output or input, and OFT, a rotation of the inputs. They have full rank.

    Scaled    W' = diag(l)·W0, b' = l ⊙ b     ΔW·x + Δb = (l - 1) ⊙ (W0·x + b)     Liu et al. 2022, arXiv 2205.05638
              W' = W0·diag(l) of a feedforward layer, whose bias stays              ΔW·x = W0·((l - 1) ⊙ x)
    Rotated   W' = W0·Rᵀ, R of square blocks     ΔW·xᵀ = W0·(x·(R - 1))ᵀ            Qiu et al. 2023, arXiv 2306.07280

as PEFT's tuners/ia3/layer.py and tuners/oft/layer.py compute them. Both keep what they move, l - 1 and R - 1. There are no factors and no
`delta` without the weight here, so that nothing can take them for a product.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lora_studio.lowrank import Kind

Stretches = Callable[..., Iterable[Tensor]]


@dataclass(frozen=True, eq=False)
class Multiplied:
    """What both have in common: `moves`, in fp32 or wider, and the `shape` (out, in) of the weight they are for."""

    moves: Tensor
    shape: tuple[int, int]

    kind: ClassVar[Kind] = "linear"
    groups: ClassVar[int] = 1
    of_outputs: ClassVar[bool] = False

    @property
    def dtype(self) -> torch.dtype:
        """What it is computed in."""
        return self.moves.dtype

    @property
    def acts(self) -> bool:
        """Whether it changes anything."""
        return bool(self.moves.any())

    def to(self, device: torch.device, dtype: torch.dtype) -> "Multiplied":
        """The same update on a device, in a dtype."""
        return replace(self, moves=self.moves.to(device, dtype))

    def part(self, first: int, last: int) -> "Multiplied":
        """Some outputs as an update of their own."""
        return replace(self, shape=(last - first, self.shape[1]))

    def moved(self, x: Tensor) -> Tensor:
        """What is added to the inputs x (..., in), or to the outputs (..., out), bias and all, where the update is `of_outputs`."""
        raise NotImplementedError

    def rows(self, before: Tensor, start: int, *, transposed: bool, stretches: Stretches) -> Tensor:
        """Rows of the update for the rows `before` (n, the rest flat) of the weight, which are those from `start` on; `transposed` where these
        are inputs. `stretches(range)` gives the weight's rows in that range."""
        raise NotImplementedError

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to this weight, in its shape, in fp32 or wider."""
        return self.rows(weight.detach().to(self.dtype), 0, transposed=False, stretches=lambda rows: ())

    def delta_of_bias(self, bias: Tensor) -> Tensor | None:
        """What is added to a bias (out,), in fp32 or wider; None where it stays."""
        return self.moved(bias.detach().to(self.dtype)) if self.of_outputs else None


@dataclass(frozen=True, eq=False)
class Scaled(Multiplied):
    """IA3: `moves` is l - 1, (out,) or, of a feedforward layer, (in,). Raises ValueError when it is neither."""

    of_outputs: bool = True

    def __post_init__(self):
        if self.moves.shape != (self.shape[0 if self.of_outputs else 1],):
            raise ValueError(f"{tuple(self.moves.shape)} factors are not those of a weight {self.shape}")

    def part(self, first: int, last: int) -> "Scaled":
        kept = self.moves[first:last] if self.of_outputs else self.moves
        return replace(self, moves=kept, shape=(last - first, self.shape[1]))

    def moved(self, x: Tensor) -> Tensor:
        return x * self.moves

    def rows(self, before: Tensor, start: int, *, transposed: bool, stretches: Stretches) -> Tensor:
        own = self.moves.to(before)
        return before * (own if self.of_outputs == transposed else own[start : start + len(before), None])


@dataclass(frozen=True, eq=False)
class Rotated(Multiplied):
    """OFT: `moves` is R - 1, (blocks, side, side), or (1, side, side) of one block for all. Raises ValueError when they do not fit the inputs."""

    def __post_init__(self):
        blocks, *sides = self.moves.shape
        if len(sides) != 2 or sides[0] != sides[1] or (self.shape[1] % sides[0] if blocks == 1 else blocks * sides[0] != self.shape[1]):
            raise ValueError(f"blocks {tuple(self.moves.shape)} do not turn {self.shape[1]} inputs")

    @property
    def side(self) -> int:
        return self.moves.shape[-1]

    @property
    def blocks(self) -> Tensor:
        """R - 1 of every block, (in / side, side, side)."""
        return self.moves.expand(self.shape[1] // self.side, -1, -1)

    def moved(self, x: Tensor) -> Tensor:
        return torch.einsum("...rk,rkc->...rc", x.unflatten(-1, (-1, self.side)), self.blocks).flatten(-2)

    def rows(self, before: Tensor, start: int, *, transposed: bool, stretches: Stretches) -> Tensor:
        if not transposed:  # a row is a line of inputs, and W0·Rᵀ turns each by R the other way round
            return torch.einsum("nrk,rck->nrc", before.unflatten(-1, (-1, self.side)), self.blocks.to(before)).flatten(-2)
        first, stop = start // self.side, -(-(start + len(before)) // self.side)
        (whole,) = stretches(range(first * self.side, stop * self.side))
        turned = self.blocks[first:stop].to(before) @ whole.to(before).unflatten(0, (-1, self.side))
        return turned.flatten(0, 1)[start - first * self.side :][: len(before)]


def rotation(entries: Tensor, *, terms: int | None = None, bound: float | None = None) -> Tensor:
    """R - 1 (blocks, side, side) of the upper triangles `entries` (blocks, side·(side - 1)/2) of skew Q, in fp32 or wider. Cayley's own
    (1 - Q)(1 + Q)⁻¹, or, with `terms`, as many of PEFT's series 1 + 2Q + 2Q² + ... + Qⁿ; with a `bound` (COFT's eps) Q is first shortened to it.
    PEFT's OFTRotationModule; its series has the other sign of Q than the formula, and files go by it. Raises ValueError at a count that is no triangle."""
    blocks, count = entries.shape
    side = side_of(count)
    if side is None:
        raise ValueError(f"{count} numbers are no triangle")
    Q = torch.zeros(blocks, side, side, dtype=torch.promote_types(entries.dtype, torch.float32), device=entries.device)
    upper = torch.triu_indices(side, side, 1, device=entries.device)
    Q[:, upper[0], upper[1]] = entries.to(Q)
    Q = Q - Q.transpose(1, 2)
    if bound is not None:
        length, most = torch.linalg.matrix_norm(Q)[:, None, None], bound / blocks**0.5
        Q = torch.where(length <= most, Q, most * Q / length)
    if terms is None:
        return torch.linalg.solve(torch.eye(side).to(Q) + Q, -2 * Q, left=False)
    total, power = torch.zeros_like(Q), Q
    if terms > 1:
        total = 2 * Q
    if terms > 2:
        power = Q @ Q
        total = total + 2 * power
        for _ in range(3, terms - 1):
            power = power @ Q
            total = total + 2 * power
        total = total + power @ Q
    return total


def side_of(count: int) -> int | None:
    """The side of a square whose upper triangle has that many numbers; None where there is none."""
    side = int((1 + (1 + 8 * count) ** 0.5) / 2 + 0.5)
    return side if side * (side - 1) // 2 == count else None
