"""One low-rank update: its factors, its scale, and what it adds to a layer's weight.

    kind        A               B                      adds scale · B @ A to a weight of
    linear      (r, in)         (out, r)               (out, in)
    conv        (r, in, *k)     (out, r/groups, 1...)  (out, in, *k); B is grouped, A sees every channel
    embedding   (r, vocabulary) (width, r)             (vocabulary, width), transposed

Everything is computed in fp32, or wider where the factors are, and cast only by whoever asks for it.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["linear", "conv", "embedding"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """`scale · B @ A` for one layer. Raises ValueError when the factors do not fit each other."""

    A: Tensor
    B: Tensor
    scale: float = 1.0
    kind: Kind = "linear"

    def __post_init__(self):
        A, B = self.A, self.B
        flat = A.ndim == 2 and B.ndim == 2 and A.shape[0] == B.shape[1]
        grouped = A.ndim == B.ndim >= 3 and set(B.shape[2:]) == {1} and B.shape[1] > 0 and A.shape[0] % B.shape[1] == 0
        if not (grouped if self.kind == "conv" else flat) or B.shape[0] % self.groups:
            raise ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)} are not the factors of a {self.kind} layer")

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def groups(self) -> int:
        """Groups of a grouped convolution; B says how many rows of A each of them sees."""
        return self.A.shape[0] // self.B.shape[1] if self.kind == "conv" else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it is added to."""
        if self.kind == "embedding":
            return (self.A.shape[1], self.B.shape[0])
        return (self.B.shape[0], *self.A.shape[1:])

    @property
    def parameters(self) -> int:
        return self.A.numel() + self.B.numel()

    @property
    def dtype(self) -> torch.dtype:
        """What it is computed in: fp64 where a factor is, else fp32."""
        return torch.float64 if torch.float64 in (self.A.dtype, self.B.dtype) else torch.float32

    def blocks(self) -> list[tuple[Tensor, Tensor]]:
        """The factors (B (out/g, r/g), A (r/g, in·k)) of each group as matrices, without the scale; one group but for
        grouped convolutions."""
        A, B = self.A.to(self.dtype).flatten(1), self.B.to(self.dtype).flatten(1)
        return list(zip(B.chunk(self.groups), A.chunk(self.groups)))

    def with_blocks(self, blocks: list[tuple[Tensor, Tensor]], scale: float = 1.0) -> "LowRank":
        """The update of the same layer with other factors, given as `blocks` gives them."""
        B, A = torch.cat([B for B, _ in blocks]), torch.cat([A for _, A in blocks])
        return replace(self, A=A.view(-1, *self.A.shape[1:]), B=B.view(*B.shape, *self.B.shape[2:]), scale=scale)

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """What is added to the layer's weight, in that weight's shape. A grouped convolution gives the weight of the ungrouped
        convolution it acts as."""
        product = torch.cat([B @ A for B, A in self.blocks()]) * self.scale
        shaped = product.T if self.kind == "embedding" else product.view(self.shape)
        return shaped.to(dtype or self.dtype)

    def folded(self) -> "LowRank":
        """The same update at scale 1: the scale goes into B, rounded once."""
        return replace(self, A=self.A.to(self.dtype), B=scaled(self.B.to(self.dtype), self.scale), scale=1.0)

    def balanced(self) -> "LowRank":
        """The same update at scale 1 with |row of A| ≈ |column of B|, so that 16 bits keep tiny updates. Beyond folding the
        scale it multiplies by powers of two only, which rounds nothing."""
        blocks = []
        for B, A in self.folded().blocks():
            b, a = B.norm(dim=0), A.norm(dim=1)
            both = (a > 0) & (b > 0)
            shift = torch.where(both, (torch.log2(b) - torch.log2(a)) / 2, torch.zeros_like(a)).round().to(torch.int32)
            blocks.append((torch.ldexp(B, -shift), torch.ldexp(A, shift[:, None])))
        return self.with_blocks(blocks)

    def padded(self, rank: int) -> "LowRank":
        """The same update with zero rows and columns up to `rank`, which must be a multiple of the groups."""
        if rank < self.rank or rank % self.groups:
            raise ValueError(f"rank {self.rank} in {self.groups} groups cannot be padded to {rank}")
        more = (rank - self.rank) // self.groups
        blocks = [(torch.nn.functional.pad(B, (0, more)), torch.nn.functional.pad(A, (0, 0, 0, more))) for B, A in self.blocks()]
        return self.with_blocks(blocks, self.scale)

    def cast(self, dtype: torch.dtype) -> "LowRank":
        """The same update with factors of another dtype."""
        return replace(self, A=self.A.to(dtype), B=self.B.to(dtype))


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """`factor · tensor` in the tensor's dtype, rounded once (torch would round the factor too)."""
    return tensor if factor == 1 else (tensor.double() * factor).to(tensor.dtype)
