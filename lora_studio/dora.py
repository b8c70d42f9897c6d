"""One DoRA update: a low-rank product, and a magnitude for each output. It has full rank, and depends on the weight.

    W' = g ⊙ V,   V = W0 + scale · B @ A,   g = m / |V|     a length |V| and a magnitude m for each output, over all its inputs
    ΔW = W' - W0,   ΔW·x = (g - 1) ⊙ (W0·x) + g ⊙ (scale · B · A·x)

Liu et al. 2024, arXiv 2402.09353, section 4, as PEFT's tuners/lora/dora.py computes it: the outputs are the rows of a linear layer and
of a convolution (out, in·k), and the columns of an embedding (vocabulary, width). There are no factors and no `delta` without the
weight here, so that nothing can take it for a plain product and lose the magnitudes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_studio.lowrank import Kind, LowRank

STRETCH = 1 << 22  # numbers that are widened at once


@dataclass(frozen=True, eq=False)
class Dora:
    """A `product` and the `magnitude` (out,) of one layer. Raises ValueError when they do not fit each other."""

    product: LowRank
    magnitude: Tensor

    def __post_init__(self):
        if self.magnitude.shape != self.product.B.shape[:1]:
            raise ValueError(f"{tuple(self.magnitude.shape)} magnitudes are not those of {self.product.B.shape[0]} outputs")

    @property
    def kind(self) -> Kind:
        return self.product.kind

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it is for."""
        return self.product.shape

    @property
    def groups(self) -> int:
        return self.product.groups

    @property
    def rank(self) -> int:
        """The rank of its product; the update itself has full rank."""
        return self.product.rank

    @property
    def dtype(self) -> torch.dtype:
        """What it is computed in: fp64 where a part is, else fp32."""
        return torch.float64 if self.magnitude.dtype == torch.float64 else self.product.dtype

    def to(self, device: torch.device, dtype: torch.dtype) -> "Dora":
        """The same update on a device, in a dtype."""
        A, B = (tensor.to(device, dtype) for tensor in (self.product.A, self.product.B))
        return Dora(replace(self.product, A=A, B=B), self.magnitude.to(device, dtype))

    def part(self, first: int, last: int) -> "Dora":
        """Some outputs as an update of their own."""
        return Dora(replace(self.product, B=self.product.B[first:last]), self.magnitude[first:last])

    def moved(self, before: Tensor, start: int, *, transposed: bool) -> Tensor:
        """Rows of V for the rows `before` (n, the rest flat) of the weight, which are those from `start` on; `transposed` where these are
        inputs. In the dtype of `before`."""
        A, B = self.product.A.to(before).flatten(1), self.product.B.to(before).flatten(1)
        stop = start + len(before)
        left, right = (A[:, start:stop].T, B.T) if transposed else (B[start:stop], A)
        return torch.addmm(before, left, right, alpha=self.product.scale)

    def gains(self, stretches: Iterable[Tensor], start: int = 0, *, transposed: bool) -> Tensor:
        """g of the outputs in these consecutive stretches of rows of the weight, from row `start` on; of all outputs where the rows are inputs
        (`transposed`), and then they must be all rows. Not finite where a length is 0: such an output has no direction."""
        lengths, squares = [], 0.0
        begin = start
        for before in stretches:
            V = self.moved(before, start, transposed=transposed)
            start += len(before)
            if transposed:
                squares = squares + V.square().sum(0).cpu().double()  # Apple's GPUs know no fp64
            else:
                lengths.append(torch.linalg.vector_norm(V, dim=1))
        if transposed:
            return (self.magnitude.to(squares) / squares.sqrt()).to(before)
        found = torch.cat(lengths)
        return self.magnitude[begin:start].to(found) / found

    def gains_on(self, weight: Tensor) -> Tensor:
        """g (out,) on the layer's weight, which has this update's shape, in fp32 or wider; a few rows are widened at once."""
        flat = weight.detach().flatten(1)
        step = max(1, STRETCH // flat.shape[1])
        rows = (flat[at : at + step].to(self.dtype) for at in range(0, len(flat), step))
        return self.gains(rows, transposed=self.kind == "embedding")

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to this weight, in its shape, in fp32 or wider."""
        turned = self.kind == "embedding"
        flat, gains = weight.detach().flatten(1).to(self.dtype), self.gains_on(weight)
        return (self.moved(flat, 0, transposed=turned) * (gains if turned else gains[:, None]) - flat).view(weight.shape)

    def weighed(self, gains: Tensor) -> LowRank:
        """The part of the update that is a product, `g ⊙ (scale · B @ A)`."""
        B = self.product.B
        return replace(self.product, B=B * gains.view(-1, *[1] * (B.ndim - 1)))
