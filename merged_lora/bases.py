"""Bases that several deltas share, and their coordinates in them; many modules at a time, on any device.

Everything is computed from Gram matrices ``[R, R]`` in float64, R = sum of ranks: no delta ``[out, in]`` is
formed, there is no loop over modules, and no shape depends on values.  The only factorization used is that of
``batched.eigenvectors``, because batched SVD and QR loop over the matrices on CUDA.  Knows nothing of rules.

Shape comments: M modules, N sources, ranks r_i with sum R, deltas ``[out, in]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .batched import eigenvectors, multiplied
from .recipe import Basis

EPS = torch.finfo(torch.float64).eps
RELATIVE_ZERO = 1e-14
"""Relative to the largest squared singular value; smaller directions are treated as zero."""
ORDERING = 2.0**-30
"""Each source is weighted by this much more than the previous one, so that a basis is unique even if singular
values of different sources repeat; too little to affect a basis in any other case."""
SWEEPS = 1
"""Number of alternating-least-squares sweeps.  On the example adapters at their own rank, the first sweep
adds 0.014 of the squared norm to reach 0.85, and all further ones less than 0.002."""
REPEATED = 1e-7
"""If neighbouring squared singular values differ by less than this, relatively, the basis is not unique."""


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Deltas in a shared basis: ``left @ values[i] @ right`` is delta i, or its projection.

    values: for each source float32 ``[modules, rows, columns]``.
    left: orthonormal columns, float64 ``[modules, out, rows]``; zeros beyond the span of the sources.
    right: orthonormal rows, float64 ``[modules, columns, in]``; None if the columns are those of the delta.
    kept: each delta's squared norm in the basis, float64 ``[modules, sources]``.
    asked: each delta's squared norm as it is, float64 ``[modules, sources]``.
    repeated: whether singular values repeat, so that another basis is as good, bool ``[modules]``.
    """

    values: tuple[torch.Tensor, ...]
    left: torch.Tensor
    right: torch.Tensor | None
    kept: torch.Tensor
    asked: torch.Tensor
    repeated: torch.Tensor


def coordinates_in(
    basis: Basis, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], scalings: torch.Tensor, rank: int
) -> Coordinates:
    """The deltas in the basis that a recipe names.

    basis: ``both`` for :func:`both_bases`, otherwise :func:`output_basis`.
    a, b, scalings: as in :func:`output_basis`.
    rank: of the bases, if both sides share one.
    """
    return both_bases(a, b, scalings, rank) if basis == "both" else output_basis(a, b, scalings)


def output_basis(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], scalings: torch.Tensor) -> Coordinates:
    """Coordinates in the left singular vectors of all deltas side by side, ``[dW_1 dW_2 ...]``.

    KnOTS, arXiv 2410.19735.  The coordinates have as many rows as the sum of ranks, at most ``out``; singular
    values up to 1e-7 of the largest are treated as zero.

    a: for each source ``[modules, rank_i, in]``, any float dtype.
    b: for each source ``[modules, out, rank_i]``, any float dtype.
    scalings: of the products B A, float64 ``[modules, sources]``.
    """
    ranks = [x.shape[1] for x in a]
    joined_a, joined_b = joined(a, 1), joined(b, 2)  # [M, R, in], [M, out, R]
    scaled = per_column(scalings, ranks)  # [M, R]
    # With B = Q S and orthonormal Q, a delta is Q (S_i s_i) A_i, and only the small factors S_i s_i matter.
    to_basis, from_basis = factored(multiplied(joined_b.mT, joined_b))  # [M, R, R] each
    to_basis = to_basis * scaled[:, None, :]
    blocks = torch.split(to_basis, ranks, dim=2)  # [M, R, r_i] each
    rows = torch.split(joined_a, ranks, dim=1)  # [M, r_i, in] each
    grams = [multiplied(x, x.mT) for x in rows]  # [M, r_i, r_i]
    # delta_i delta_i^T in the basis Q; their sum has the left singular vectors of all deltas side by side.
    squares = [multiplied(block, gram, block.mT) for block, gram in zip(blocks, grams, strict=True)]
    asked = torch.stack([s.diagonal(dim1=1, dim2=2).sum(1) for s in squares], dim=1)  # [M, N]
    values, vectors = leading(squares, min(sum(ranks), joined_b.shape[1]))  # [M, rows], [M, R, rows]
    dead = (values <= RELATIVE_ZERO * values[:, :1])[:, None, :]
    vectors = torch.where(dead, 0.0, vectors)
    coordinates = [
        multiplied(vectors.mT, block, x)  # [M, rows, in]
        for block, x in zip(blocks, rows, strict=True)
    ]
    return Coordinates(
        values=tuple(c.float() for c in coordinates),
        left=multiplied(joined_b, multiplied(from_basis, vectors)),
        right=None,
        kept=asked,
        asked=asked,
        repeated=_repeat(values),
    )


def both_bases(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], scalings: torch.Tensor, rank: int
) -> Coordinates:
    """Coordinates in bases of ``rank`` dimensions on both sides.

    Compress then Merge, arXiv 2606.03723, algorithm 1.  The bases U and V maximize the sum of
    ``|U^T dW_i V|^2``, with all deltas scaled to length 1, by SWEEPS sweeps of alternating least squares that
    start from the leading singular vectors of the deltas side by side and one above the other.

    a, b, scalings: as in :func:`output_basis`.
    rank: at most the sum of ranks, ``out`` and ``in``.
    """
    ranks = [x.shape[1] for x in a]
    joined_a, joined_b = joined(a, 1), joined(b, 2)  # [M, R, in], [M, out, R]
    scaled = per_column(scalings, ranks)  # [M, R]
    # With B = Q_b S_b and A^T = Q_a S_a, delta i is Q_b (S_b,i s_i S_a,i^T) Q_a^T: a core [R, R] for each.
    to_b, from_b = factored(multiplied(joined_b.mT, joined_b))  # [M, R, R] each
    to_a, from_a = factored(multiplied(joined_a, joined_a.mT))
    columns_b = torch.split(to_b * scaled[:, None, :], ranks, dim=2)  # [M, R, r_i] each
    columns_a = torch.split(to_a, ranks, dim=2)
    cores = [multiplied(x, y.mT) for x, y in zip(columns_b, columns_a, strict=True)]  # [M, R, R] each
    asked = torch.stack([core.square().sum((1, 2)) for core in cores], dim=1)  # [M, N]
    inverse = inverses(asked.sqrt())
    even = [core * inverse[:, i, None, None] for i, core in enumerate(cores)]  # all of length 1
    values, left = leading([multiplied(x, x.mT) for x in even], rank)  # [M, rank], [M, R, rank]
    right = leading([multiplied(x.mT, x) for x in even], rank)[1]  # [M, R, rank]
    for _ in range(SWEEPS):
        # The best U for this V, then the best V for that U.
        values, left = leading([multiplied(x, x.mT) for x in (multiplied(y, right) for y in even)], rank)
        right = leading([multiplied(x, x.mT) for x in (multiplied(y.mT, left) for y in even)], rank)[1]
    coordinates = [multiplied(left.mT, core, right) for core in cores]  # [M, rank, rank] each
    return Coordinates(
        values=tuple(c.float() for c in coordinates),
        left=multiplied(joined_b, multiplied(from_b, left)),
        right=multiplied(multiplied(from_a, right).mT, joined_a),
        kept=torch.stack([c.square().sum((1, 2)) for c in coordinates], dim=1),
        asked=asked,
        repeated=_repeat(values),
    )


def shared_rows(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], scalings: torch.Tensor, count: int
) -> torch.Tensor:
    """The leading right singular vectors of all deltas one above the other, float64 ``[modules, n, in]``.

    a, b, scalings: as in :func:`output_basis`.
    count: number of vectors n; at most the sum of ranks are returned.
    """
    ranks = [x.shape[1] for x in a]
    joined_a, joined_b = joined(a, 1), joined(b, 2)  # [M, R, in], [M, out, R]
    to_a, from_a = factored(multiplied(joined_a, joined_a.mT))  # [M, R, R] each
    scaled = torch.split(to_a * per_column(scalings, ranks)[:, None, :], ranks, dim=2)  # [M, R, r_i] each
    grams = [multiplied(x.mT, x) for x in torch.split(joined_b, ranks, dim=2)]  # [M, r_i, r_i]
    # delta_i^T delta_i in the basis of A's rows; their sum has the right singular vectors.
    squares = [multiplied(x, gram, x.mT) for x, gram in zip(scaled, grams, strict=True)]
    vectors = leading(squares, min(count, sum(ranks)))[1]  # [M, R, n]
    return multiplied(multiplied(from_a, vectors).mT, joined_a)


def placed(
    coordinates: Coordinates, merged: torch.Tensor, weights: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The factors of merged coordinates, and the squared norms kept and asked for.

    coordinates: those that were merged.
    merged: float32 ``[modules, rows, columns]``.
    weights: of the sources ``[modules, sources]``.
    rank: of the factors; if it is smaller than the rows of an output basis, the best approximation is taken.

    Returns ``A [modules, rank, in]`` and ``B [modules, out, rank]`` in float64, and the squared norms as
    float64 ``[modules, 2]``: of the merged delta, or if both sides share a basis, of the weighted sources
    together; None if nothing was cut.
    """
    values = merged.double()
    if coordinates.right is not None:
        squares = weights.double().square().to(coordinates.kept.device)
        sums = [(squares * x).sum(1) for x in (coordinates.kept, coordinates.asked)]
        return multiplied(values, coordinates.right), coordinates.left, torch.stack(sums, dim=1)
    rows = values.shape[1]
    if rank >= rows:
        missing = rank - rows
        a = torch.nn.functional.pad(values, (0, 0, 0, missing))
        return a, torch.nn.functional.pad(coordinates.left, (0, missing)), None
    squares, vectors = eigh(multiplied(values, values.mT))  # [M, rows], [M, rows, rows]
    squares = squares.clamp(min=0.0)
    chosen = vectors[:, :, -rank:].flip(2)  # [M, rows, rank], the largest first
    energy = torch.stack([squares[:, -rank:].sum(1), squares.sum(1)], dim=1)
    return multiplied(chosen.mT, values), multiplied(coordinates.left, chosen), energy


def joined(factors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """The factors of all sources concatenated along a dimension, in float64, without an intermediate copy."""
    shape = list(factors[0].shape)
    shape[dim] = sum(x.shape[dim] for x in factors)
    result = factors[0].new_empty(shape, dtype=torch.float64)
    end = 0
    for x in factors:
        result.narrow(dim, end, x.shape[dim]).copy_(x)
        end += x.shape[dim]
    return result


def eigh(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``batched.eigenvectors``, but NaN instead of an error for a matrix that is not finite.

    An overflow on the way thus becomes NaN in the result, and is detected there.
    """
    wrong = ~gram.isfinite().all(-1).all(-1)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    values, vectors = eigenvectors(torch.where(wrong[:, None, None], identity, gram))
    return torch.where(wrong[:, None], torch.nan, values), torch.where(
        wrong[:, None, None], torch.nan, vectors
    )


def per_column(values: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """Values of sources ``[modules, sources]`` repeated for every rank of the source: ``[modules, R]``."""
    parts = zip(values.unbind(1), ranks, strict=True)
    return torch.cat([value[:, None].expand(-1, rank) for value, rank in parts], dim=1)


def normalized(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The Gram matrices of the same vectors scaled to unit length, their lengths, and the inverse lengths.

    A vector of zeros has an inverse length of 0 and is treated as orthogonal to all others.

    gram: float64 ``[modules, R, R]``; lengths and inverses are ``[modules, R]``.
    """
    lengths = gram.diagonal(dim1=1, dim2=2).sqrt()
    inverse = inverses(lengths)
    unit = gram * inverse[:, :, None] * inverse[:, None, :]
    unit.diagonal(dim1=1, dim2=2).fill_(1.0)
    return unit, lengths, inverse


def inverses(x: torch.Tensor) -> torch.Tensor:
    """``1 / x``, and 0 where x is not positive."""
    return torch.where(x > 0, 1.0 / x, 0.0)


def factored(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From ``G = X^T X``: S with ``X = Q S`` and T with ``Q = X T``, where Q has orthonormal columns.

    Directions that are lost in rounding are given a minimal length instead of being dropped; S and T remain
    inverses of each other, whatever that length is.

    gram: float64 ``[modules, R, R]``, as are S and T.
    """
    # The resolution of a Gram matrix is relative to its largest entry: with unit lengths no vector hides
    # another.
    unit, lengths, inverse = normalized(gram)
    squares, vectors = eigh(unit)  # [M, R], [M, R, R]
    root = squares.clamp(min=EPS * squares[:, -1:]).sqrt()
    return root[:, :, None] * vectors.mT * lengths[:, None, :], inverse[:, :, None] * vectors / root[
        :, None, :
    ]


def leading(squares: Sequence[torch.Tensor], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest eigenvalues of the sum of these matrices, and their eigenvectors, largest first.

    squares: for each source float64 ``[modules, R, R]``.

    Returns ``[modules, rank]`` and ``[modules, R, rank]``.
    """
    total = torch.zeros_like(squares[0])
    for i, square in enumerate(squares):
        total = total + (1.0 + i * ORDERING) * square
    # The shift keeps zero matrices away from cuSOLVER, which has failed on them (pytorch#94772).
    noise = EPS * total.diagonal(dim1=1, dim2=2).sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    total.diagonal(dim1=1, dim2=2).add_(noise[:, None])
    values, vectors = eigh(total)
    return values[:, -rank:].flip(1) - noise[:, None], vectors[:, :, -rank:].flip(2)


def _repeat(values: torch.Tensor) -> torch.Tensor:
    """Whether any nonzero eigenvalue repeats, within what a basis can resolve, bool ``[modules]``.

    values: ``[modules, n]``, largest first.
    """
    upper, lower = values[:, :-1], values[:, 1:]
    alive = lower > RELATIVE_ZERO * values[:, :1]
    return (alive & (upper - lower <= REPEATED * upper)).any(1)
