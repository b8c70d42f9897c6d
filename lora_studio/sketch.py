"""A low-rank pair near a matrix that is only there by rows, and its true loss: a random basis, sharpened by passes over the rows.

Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1. The matrix is never needed whole, so a merged update of full rank or the difference
of two checkpoints costs no more memory than a few of its rows and the basis.
"""

from collections.abc import Iterator
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor

MORE = 16  # columns of the basis beyond the rank
STRETCH = 256


class Rows(Protocol):
    """A matrix of that shape, by its rows."""

    shape: tuple[int, int]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows from start to before stop."""


def near(matrix: Rows, *, rank: int | None = None, loss: float | None = None, seed: int = 0, passes: int = 3) -> tuple[Tensor, Tensor, float]:
    """B (out, r) and A (r, in) in fp64 with both sides alike large, and ‖BA − matrix‖/‖matrix‖, for a rank, or the smallest rank found
    whose loss is at most `loss`, or the first of the two that holds."""
    most = min(matrix.shape) if rank is None else min(rank, *matrix.shape)
    tried = most if loss is None else min(most, 32)
    while True:
        into = _basis(matrix, min(tried + MORE, *matrix.shape), seed, passes)
        left, square = _projected(matrix, into)
        U, S, V = torch.linalg.svd(left, full_matrices=False)
        tails = [sqrt(max(0.0, square - float(kept)) / square) if square else 0.0 for kept in torch.cat([S.new_zeros(1), S.square().cumsum(0)])]
        enough = next((number for number, tail in enumerate(tails[: tried + 1]) if number and tail <= loss), None) if loss is not None else tried
        if enough is not None or tried == most:
            keep = enough or tried
            root = S[:keep].sqrt()
            return U[:, :keep] * root, root[:, None] * (V[:keep] @ into.T), tails[keep]
        tried = min(most, 2 * tried)


def _basis(matrix: Rows, wide: int, seed: int, passes: int) -> Tensor:
    """An orthonormal basis (in, wide) of what is largest in the matrix's row space."""
    if wide == matrix.shape[1]:
        return torch.eye(wide, dtype=torch.float64)
    basis = torch.randn(matrix.shape[1], wide, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for _ in range(passes):
        basis = torch.linalg.qr(basis).Q
        basis = sum(rows.T @ (rows @ basis) for rows in stretches(matrix))
    return torch.linalg.qr(basis).Q


def _projected(matrix: Rows, into: Tensor) -> tuple[Tensor, float]:
    """The matrix times the basis, and its squared norm."""
    left, square = [], 0.0
    for rows in stretches(matrix):
        left.append(rows @ into)
        square += float(rows.square().sum())
    return torch.cat(left), square


def stretches(matrix: Rows) -> Iterator[Tensor]:
    """The rows in fp64, some at a time."""
    for start in range(0, matrix.shape[0], STRETCH):
        yield matrix.rows(start, min(start + STRETCH, matrix.shape[0])).double()
