"""Bases that several deltas share, and their coordinates in them; many modules at a time, on any device.

Everything happens on Gram matrices ``[R, R]`` in float64, R = sum of ranks; no delta ``[out, in]`` is formed,
there is no loop over modules and no shape that depends on values.  The one factorisation is
that of ``batched.eigenvectors``: batched SVD and QR loop over the matrices on CUDA.  Knows nothing of rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .batched import eigenvectors, multiplied
from .recipe import Basis

EPS = torch.finfo(torch.float64).eps
NOTHING = 1e-14
"""Of the largest squared singular value: below that, a direction counts as none."""
ORDERING = 2.0**-30
"""By so much each source counts for more than the one before it, so that a basis is unique where singular
values of different sources repeat; far below what any other gap notices."""
SWEEPS = 1
"""Of alternating least squares after the start; further ones add less than 0.002 of the squared norm to 0.85
on the example adapters at their own rank, the first one adds 0.014."""
REPEATED = 1e-7
"""Neighbouring squared singular values closer than this, relatively, leave the basis between them open."""


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Deltas in a shared basis: ``delta_i = left @ values[i] @ right``, or its projection.

    values: float32, per source ``[modules, rows, columns]``.  left: float64 ``[modules, out, rows]``,
    orthonormal columns (zeros where the sources span fewer).  right: ``[modules, columns, in]``, orthonormal
    rows; None where the columns are those of the delta.
    kept, asked: float64 ``[modules, sources]``, each delta's squared norm in the basis and as it is.
    repeated: bool ``[modules]``, whether singular values repeat, so that another basis is as good.
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
    """The deltas in the basis that a recipe names; rank: of the bases, where both sides share one."""
    return both_bases(a, b, scalings, rank) if basis == "both" else output_basis(a, b, scalings)


def output_basis(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], scalings: torch.Tensor) -> Coordinates:
    """The left singular vectors of all deltas side by side, ``[dW_1 dW_2 ...]`` (KnOTS, arXiv 2410.19735).

    a: per source ``[modules, rank_i, in]``, b: per source ``[modules, out, rank_i]``, any float dtype.
    scalings: float64 ``[modules, sources]``.  Rows: sum of ranks, at most ``out``; singular values up to
    1e-7 of the largest count as zero.
    """
    ranks = [x.shape[1] for x in a]
    joined_a, joined_b = joined(a, 1), joined(b, 2)
    scaled = per_column(scalings, ranks)
    to_basis, from_basis = _factored(multiplied(joined_b.mT, joined_b))
    to_basis = to_basis * scaled[:, None, :]
    blocks, rows = split(to_basis, ranks, 2), split(joined_a, ranks, 1)
    grams = [multiplied(x, x.mT) for x in rows]
    squares = [multiplied(block, gram, block.mT) for block, gram in zip(blocks, grams, strict=True)]
    asked = torch.stack([s.diagonal(dim1=1, dim2=2).sum(1) for s in squares], dim=1)
    values, vectors = _leading(squares, min(sum(ranks), joined_b.shape[1]))
    dead = (values <= NOTHING * values[:, :1])[:, None, :]
    vectors = torch.where(dead, 0.0, vectors)
    coordinates = [multiplied(vectors.mT, block, x) for block, x in zip(blocks, rows, strict=True)]
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
    """Bases of ``rank`` dimensions on both sides (Compress then Merge, arXiv 2606.03723, algorithm 1).

    They keep as much as SWEEPS sweeps of alternating least squares find of the sum of ``|U^T dW_i V|^2``,
    with all deltas at length 1, from the leading singular vectors of the deltas side by side and one above
    the other.  Arguments as in :func:`output_basis`; rank is at most the sum of ranks, ``out`` and ``in``.
    """
    ranks = [x.shape[1] for x in a]
    joined_a, joined_b = joined(a, 1), joined(b, 2)
    scaled = per_column(scalings, ranks)
    to_b, from_b = _factored(multiplied(joined_b.mT, joined_b))
    to_a, from_a = _factored(multiplied(joined_a, joined_a.mT))
    blocks = zip(split(to_b * scaled[:, None, :], ranks, 2), split(to_a, ranks, 2), strict=True)
    cores = [multiplied(left, right.mT) for left, right in blocks]
    asked = torch.stack([core.square().sum((1, 2)) for core in cores], dim=1)
    inverse = inverses(asked.sqrt())
    even = [core * inverse[:, i, None, None] for i, core in enumerate(cores)]
    values, left = _leading([multiplied(x, x.mT) for x in even], rank)
    right = _leading([multiplied(x.mT, x) for x in even], rank)[1]
    for _ in range(SWEEPS):
        values, left = _leading([multiplied(x, x.mT) for x in (multiplied(y, right) for y in even)], rank)
        right = _leading([multiplied(x, x.mT) for x in (multiplied(y.mT, left) for y in even)], rank)[1]
    coordinates = [multiplied(left.mT, core, right) for core in cores]
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

    n is count, at most the sum of ranks.  Arguments as in :func:`output_basis`.
    """
    ranks = [x.shape[1] for x in a]
    joined_a, joined_b = joined(a, 1), joined(b, 2)
    to_a, from_a = _factored(multiplied(joined_a, joined_a.mT))
    scaled = to_a * per_column(scalings, ranks)[:, None, :]
    grams = [multiplied(x.mT, x) for x in split(joined_b, ranks, 2)]
    squares = [multiplied(x, gram, x.mT) for x, gram in zip(split(scaled, ranks, 2), grams, strict=True)]
    leading = _leading(squares, min(count, sum(ranks)))[1]
    return multiplied(multiplied(from_a, leading).mT, joined_a)


def placed(
    coordinates: Coordinates, merged: torch.Tensor, weights: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``A [modules, rank, in]`` and ``B [modules, out, rank]``, float64, of merged coordinates.

    merged: ``[modules, rows, columns]``.  weights: ``[modules, sources]``.  Where the rank is below the rows
    of an output basis, the best approximation.  Third come the squared norms kept and asked for, float64
    ``[modules, 2]``: of the merged delta, or where both sides share a basis of the weighted sources together;
    None where nothing was cut.
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
    squares, vectors = eigh(multiplied(values, values.mT))
    squares = squares.clamp(min=0.0)
    chosen = vectors[:, :, -rank:].flip(2)
    energy = torch.stack([squares[:, -rank:].sum(1), squares.sum(1)], dim=1)
    return multiplied(chosen.mT, values), multiplied(coordinates.left, chosen), energy


def joined(factors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """The factors of all sources side by side in float64, without a second copy in between."""
    shape = list(factors[0].shape)
    shape[dim] = sum(x.shape[dim] for x in factors)
    result = factors[0].new_empty(shape, dtype=torch.float64)
    end = 0
    for x in factors:
        result.narrow(dim, end, x.shape[dim]).copy_(x)
        end += x.shape[dim]
    return result


def eigh(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``batched.eigenvectors``, with NaN as the eigenvalues of a matrix that is not finite, not an error.

    So what has overflowed on the way comes out as NaN, and is told from there.
    """
    wrong = ~gram.isfinite().all(-1).all(-1)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    values, vectors = eigenvectors(torch.where(wrong[:, None, None], identity, gram))
    return torch.where(wrong[:, None], torch.nan, values), torch.where(
        wrong[:, None, None], torch.nan, vectors
    )


def split(x: torch.Tensor, ranks: Sequence[int], dim: int) -> tuple[torch.Tensor, ...]:
    """What belongs to each source, as views."""
    return torch.split(x, list(ranks), dim=dim)


def per_column(values: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """One value per source, ``[modules, sources]``, repeated for each of its ranks: ``[modules, R]``."""
    parts = zip(values.unbind(1), ranks, strict=True)
    return torch.cat([value[:, None].expand(-1, rank) for value, rank in parts], dim=1)


def normalized(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The Gram matrices of the same vectors at unit length, their lengths, and 1 / lengths (0 for zeros).

    A vector of zeros counts as one that is orthogonal to all others.
    """
    lengths = gram.diagonal(dim1=1, dim2=2).sqrt()
    inverse = inverses(lengths)
    unit = gram * inverse[:, :, None] * inverse[:, None, :]
    unit.diagonal(dim1=1, dim2=2).fill_(1.0)
    return unit, lengths, inverse


def inverses(x: torch.Tensor) -> torch.Tensor:
    """``1 / x``, and 0 where ``x`` is not above 0."""
    return torch.where(x > 0, 1.0 / x, 0.0)


def _factored(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From ``G = X^T X``: ``S`` with ``X = Q S`` and ``T`` with ``Q = X T``, the columns of Q orthonormal.

    Directions lost in rounding get a floor and are not dropped: S and T agree whatever it is.
    """
    # What a Gram matrix resolves is relative to its largest entry: with unit lengths none hides another.
    unit, lengths, inverse = normalized(gram)
    squares, vectors = eigh(unit)
    root = squares.clamp(min=EPS * squares[:, -1:]).sqrt()
    return root[:, :, None] * vectors.mT * lengths[:, None, :], inverse[:, :, None] * vectors / root[
        :, None, :
    ]


def _leading(squares: Sequence[torch.Tensor], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest eigenvalues of the sum of these, ``[modules, rank]``, and their vectors, largest first."""
    total = torch.zeros_like(squares[0])
    for i, one in enumerate(squares):
        total = total + (1.0 + i * ORDERING) * one
    # The shift keeps matrices of zeros from cuSOLVER, which has failed on them (pytorch#94772).
    noise = EPS * total.diagonal(dim1=1, dim2=2).sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    total.diagonal(dim1=1, dim2=2).add_(noise[:, None])
    values, vectors = eigh(total)
    return values[:, -rank:].flip(1) - noise[:, None], vectors[:, :, -rank:].flip(2)


def _repeat(values: torch.Tensor) -> torch.Tensor:
    """Whether eigenvalues that are not zero are closer to the next than the basis can tell."""
    upper, lower = values[:, :-1], values[:, 1:]
    alive = lower > NOTHING * values[:, :1]
    return (alive & (upper - lower <= REPEATED * upper)).any(1)
