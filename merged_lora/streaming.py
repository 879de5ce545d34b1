"""The best low-rank factors of a matrix that is only ever seen tile by tile.

A randomized range finder (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1) that starts, not from
random vectors, but from the directions that the sources share most: merged deltas lie close to those.
On the example adapters and on random ones, densities 0.05 to 0.5, the error is up to 1.006 times the least.
Knows nothing of rules: a wing multiplies its tiles, see :class:`Tiles`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from .bases import EPS, eigh, inverses, shared_rows
from .batched import multiplied

OVERSAMPLING = 48


class Tiles(Protocol):
    """Merged deltas ``T [modules, out, in]`` that can be multiplied, and are not held."""

    def times(self, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``T @ right`` for ``[modules, in, n]``, and the squared norms of T, float64 ``[modules]``."""
        ...

    def transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        """``T^T @ left`` for ``[modules, out, n]``."""
        ...


def truncate_tiles(
    tiles: Tiles, start: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors ``A [modules, rank, in]`` and ``B [modules, out, rank]`` close to the best of T, and energies.

    start: float32 ``[modules, out, n]``, from :func:`starting_columns`.  Three passes over the tiles.
    Returns float64, the singular values split evenly between A and B, and float64 ``[modules, 2]``: the
    squared norms of the approximation and of T.
    """
    right = orthonormal(tiles.transposed_times(orthonormal(start).float()))
    product, norms = tiles.times(right.float())
    left = orthonormal(product)
    right = tiles.transposed_times(left.float())
    # T is close to left @ right^T; the eigenvectors of right^T right turn that into singular vectors.
    squares, vectors = eigh(_gram(right))
    squares, vectors = squares[:, -rank:].flip(1).clamp(min=0.0), vectors[:, :, -rank:].flip(2)
    half = squares.pow(0.25)[:, None, :]
    a = (multiplied(right.double(), vectors) * inverses(half)).mT
    b = multiplied(left, vectors) * half
    return a, b, torch.stack([torch.minimum(squares.sum(1), norms), norms], dim=1)


def starting_columns(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], scalings: torch.Tensor, rank: int
) -> torch.Tensor:
    """Where to look for the columns of a merge of these, float32 ``[modules, out, n]``, n about rank + 16.

    The leading left singular vectors of the sources side by side, then random columns, the same every time.
    a: per source ``[modules, rank_i, in]``, b: per source ``[modules, out, rank_i]``, any float dtype.
    scalings: float64 ``[modules, sources]``.
    """
    out, columns = b[0].shape[1], a[0].shape[2]
    count = min(rank + OVERSAMPLING, out, columns)
    # Of the transposed deltas, the rows: they are the columns of these.
    rows = shared_rows([x.mT for x in b], [x.mT for x in a], scalings, count)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(out, count - rows.shape[1], generator=generator).to(rows.device)
    return torch.cat([rows.mT.float(), noise.expand(rows.shape[0], -1, -1)], dim=2)


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns with the same span, float64 ``[modules, rows, n]``; zeros beyond its dimension."""
    x = columns.double()
    for _ in range(2):  # once leaves what the square of the condition loses
        lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        x = x * inverses(lengths)
        squares, vectors = eigh(_gram(x))
        dead = squares <= 16 * EPS * squares[:, -1:]  # not so for NaN, which must not be lost
        x = multiplied(x, torch.where(dead[:, None, :], 0.0, vectors / squares.sqrt()[:, None, :]))
    return x


def _gram(x: torch.Tensor) -> torch.Tensor:
    """``x^T x`` in float64, with a trace that is not quite zero: cuSOLVER has failed on zeros."""
    wide = x.double()
    gram = multiplied(wide.mT, wide)
    gram.diagonal(dim1=1, dim2=2).add_(torch.finfo(torch.float64).tiny)
    return gram
