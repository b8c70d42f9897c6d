"""Updates that are products of small matrices in another way than B @ A, brought exactly into that form.

    LoHa   (w1a w1b) ⊙ (w2a w2b)     = [w1a ⊛ w2a] [w1b ⊛ w2b]     rows of B and columns of A are Kronecker products; rank r1·r2
    LoKr   w1 ⊗ (w2a w2b)            = (w1 ⊗ w2a)(I ⊗ w2b), or (I ⊗ w2a)(w1 ⊗ w2b), whichever has the lower rank
    Tucker a core t (i, j, *k) with wa (i, out), wb (j, in):  wa' · (t · wb), so that the core goes into the right matrix

LoHa: Hyeon-Woo et al. 2022, arXiv 2108.06098. LoKr and the Tucker form: LyCORIS, arXiv 2309.14859. The row-wise Khatri-Rao and the mixed
product identity of Kronecker products are textbook. Nothing is rounded but the products themselves.
"""

import torch
from torch import Tensor

from lora_studio.lowrank import LowRank


def loha(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor, *, scale: float = 1.0, shape: tuple[int, ...] | None = None) -> LowRank:
    """w1a (out, r1), w1b (r1, in·k), w2a (out, r2), w2b (r2, in·k) as one LowRank of rank r1·r2. `shape` is that of a convolution's weight."""
    B = torch.einsum("op,oq->opq", w1a, w2a).flatten(1)
    A = torch.einsum("pi,qi->pqi", w1b, w2b).flatten(0, 1)
    return _made(A, B, scale, shape)


def lokr(w1: Tensor, w2a: Tensor, w2b: Tensor | None = None, *, scale: float = 1.0, shape: tuple[int, ...] | None = None) -> LowRank:
    """w1 (a, b) ⊗ w2, w2 being w2a (c, r) @ w2b (r, d·k), or w2a (c, d·k) alone, as one LowRank for a weight (a·c, b·d·k)."""
    if w2b is None:
        wide = w2a.shape[0] > w2a.shape[1]
        eye = torch.eye(min(w2a.shape), dtype=w2a.dtype)
        w2a, w2b = (w2a, eye) if wide else (eye, w2a)
    eye = torch.eye(min(w1.shape), dtype=w1.dtype)
    left, right = (w1, eye) if w1.shape[0] > w1.shape[1] else (eye, w1)
    return _made(torch.kron(right.contiguous(), w2b.contiguous()), torch.kron(left.contiguous(), w2a.contiguous()), scale, shape)


def tucker(core: Tensor, wa: Tensor, wb: Tensor) -> tuple[Tensor, Tensor]:
    """A core (i, j, *k), wa (i, out) and wb (j, in) as the pair (out, i) and (i, in·k)."""
    return wa.T.contiguous(), torch.einsum("ij...,jn->in...", core, wb).flatten(1)


def _made(A: Tensor, B: Tensor, scale: float, shape: tuple[int, ...] | None) -> LowRank:
    if shape is None or len(shape) == 2:
        return LowRank(A, B, scale)
    return LowRank(A.reshape(-1, *shape[1:]), B.view(*B.shape, *[1] * (len(shape) - 2)), scale, "conv")
