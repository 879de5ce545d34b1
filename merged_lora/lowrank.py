"""Exact linear algebra on factors: weighted sums of products, their best low-rank factors, inner products.

No delta ``[out, in]`` is ever formed: everything is computed from Gram matrices ``[R, R]`` in float64, with R
the sum of ranks.  Knows nothing of strategies or files.

Shape comments: M modules, N sources, ranks r_i with sum R, deltas ``[out, in]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .bases import inverses, joined, per_column
from .factors import Factors
from .plan import SumModule
from .scalars import RULES

FLAT = 1.3
"""From a study with two sets of three adapters of rank 8: the best of six variants of isotropic merging."""
FLAT_ZERO = 1e-6


@dataclass(frozen=True)
class MergedModule:
    """The factors of a merged delta.

    factors: with scaling 1.
    energy: the squared norm that a cut rank kept, and the one asked for; None if the rank was not cut.
    """

    factors: Factors
    energy: tuple[float, float] | None


def merge_modules(modules: Sequence[SumModule], weights: torch.Tensor | None = None) -> list[MergedModule]:
    """The merged factors of every module, in the module's dtype and with scaling 1.

    modules: all of the same shapes, ranks, dtypes and rule; weights and tensors may differ.
    weights: of the products ``B_i A_i``, float64 ``[modules, sources]``, from :func:`weights_of`, which is
        called if they are not given.
    """
    first = modules[0]
    a, b = _stacks(modules)
    if weights is None:
        (weights,) = weights_of([modules], [inner_of(modules)] if first.mean else [None])
    energy: list[tuple[float, float]] | list[None]
    if first.is_concatenated:
        new_a, new_b = concatenated(a, b, weights, first.dtype)
        energy = [None] * len(modules)
    else:
        new_a, new_b, norms = truncated(a, b, weights, first.rank, first.flat)
        new_a, new_b = (x.to(first.dtype).contiguous() for x in (new_a, new_b))
        energy = [(kept, asked) for kept, asked in norms.tolist()]
    factors = [Factors(x, y, 1.0, first.embedding) for x, y in zip(new_a, new_b, strict=True)]
    return [MergedModule(f, pair) for f, pair in zip(factors, energy, strict=True)]


def concatenate(
    sources: Sequence[Factors], weights: Sequence[float], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`concatenated` of one module: ``A [R, in]`` and ``B [out, R]``."""
    row = torch.tensor([weights], dtype=torch.float64)
    a, b = concatenated([f.a[None] for f in sources], [f.b[None] for f in sources], row, dtype)
    return a[0], b[0]


def inner_of(modules: Sequence[SumModule]) -> torch.Tensor:
    """Frobenius inner products of the weighted deltas of every module, float64 ``[modules, n, n]``.

    modules: all of the same shapes.
    """
    return _inner(*_stacks(modules), _own_weights(modules))


def weights_of(
    stacks: Sequence[Sequence[SumModule]], grams: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """For each stack of modules what its products are multiplied by, float64 ``[modules, sources]``.

    grams: of :func:`inner_of`; None for modules without a rule that finds weights.
    """
    found = [_own_weights(modules) for modules in stacks]
    alike: dict[tuple[int, str, int], list[int]] = {}
    for index, modules in enumerate(stacks):
        if (mean := modules[0].mean) is not None:
            alike.setdefault((len(modules[0].sources), mean.rule, mean.count), []).append(index)
    # A rule is many small steps, which for all modules together cost little more than for one.
    for (_, rule, count), indices in alike.items():
        gram = torch.cat([x for index in indices if (x := grams[index]) is not None])
        shares = [m.mean.shares for index in indices for m in stacks[index] if m.mean is not None]
        factors = RULES[rule](gram, torch.tensor(shares, dtype=torch.float64), count)
        parts = torch.split(factors, [len(stacks[index]) for index in indices])
        for index, part in zip(indices, parts, strict=True):
            found[index] = part * found[index]
    return found


def _own_weights(modules: Sequence[SumModule]) -> torch.Tensor:
    return torch.tensor([module.weights for module in modules], dtype=torch.float64)


def _stacks(modules: Sequence[SumModule]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For each source ``A [modules, rank_i, in]`` and ``B [modules, out, rank_i]``."""
    sources = list(zip(*(module.sources for module in modules), strict=True))
    return [torch.stack([f.a for f in own]) for own in sources], [
        torch.stack([f.b for f in own]) for own in sources
    ]


def concatenated(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], weights: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``A [modules, R, in]`` and ``B [modules, out, R]`` in a dtype, with ``B A = sum_i weights[i] B_i A_i``.

    The weights are applied to A alone, as in PEFT's ``cat``, so that B is copied and only A is rounded.
    """
    ranks = [x.shape[1] for x in a]
    new_a = torch.empty(a[0].shape[0], sum(ranks), a[0].shape[2], dtype=dtype)
    new_b = torch.empty(b[0].shape[0], b[0].shape[1], sum(ranks), dtype=dtype)
    columns = weights.float().unbind(1)
    for x, y, w in zip(torch.split(new_a, ranks, dim=1), a, columns, strict=True):
        x.copy_(y.float() * w[:, None, None])
    for x, y in zip(torch.split(new_b, ranks, dim=2), b, strict=True):
        x.copy_(y)
    return new_a, new_b


def truncate(
    sources: Sequence[Factors], weights: Sequence[float], rank: int, flat: bool = False
) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float]]:
    """:func:`truncated` of one module.

    Returns ``A [rank, in]`` and ``B [out, rank]`` in float64, and the two squared norms.
    """
    row = torch.tensor([weights], dtype=torch.float64)
    a, b, norms = truncated([f.a[None] for f in sources], [f.b[None] for f in sources], row, rank, flat)
    kept, asked = norms[0].tolist()
    return a[0], b[0], (kept, asked)


def truncated(
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    weights: torch.Tensor,
    rank: int,
    flat: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best approximation of a rank to ``sum_i weights[i] B_i A_i`` of every module.

    C. Eckart and G. Young, "The approximation of one matrix by another of lower rank", Psychometrika 1, 1936.

    a:       for each source ``[modules, rank_i, in]``, any float dtype.
    b:       for each source ``[modules, out, rank_i]``, any float dtype.
    weights: float64 ``[modules, sources]``.
    flat:    make the singular values equal, see :func:`flattened`; the norms remain those from before.

    Returns ``A [modules, rank, in]`` and ``B [modules, out, rank]`` in float64, with the singular values
    split evenly between them, and the squared norms of the approximation and of the sum, ``[modules, 2]``.
    """
    ranks = [x.shape[1] for x in a]
    shape = b[0].shape[1], a[0].shape[2]
    rows = joined(a, 1)  # [M, R, in]
    columns = joined(b, 2).mul_(per_column(weights, ranks)[:, None, :])  # [M, out, R]
    # The resolution of a Gram matrix is relative to its largest entry, so both factors of each product of a
    # column and a row are given the same length first.
    length_a, length_b = rows.norm(dim=2), columns.norm(dim=1)  # [M, R] each
    even = torch.where(length_a * length_b > 0, (length_a / length_b).sqrt(), 1.0)
    rows /= even[:, :, None]
    columns *= even[:, None, :]
    basis_b, root_b = basis_of(columns.mT @ columns)  # [M, R, R] each
    basis_a, root_a = basis_of(rows @ rows.mT)
    # B = U_b root_b and A = root_a^T V_a^T with orthonormal U_b and V_a, so the core root_b root_a^T has the
    # singular values of B A.
    left, values, right = torch.linalg.svd(root_b @ root_a.mT)  # [M, R, R], [M, R], [M, R, R]
    squares = values.square()
    k = min(rank, values.shape[1])
    chosen = flattened(values, min(*shape, values.shape[1])) if flat else values
    half = chosen[:, :k].sqrt()
    new_b = columns @ (basis_b @ (left[:, :, :k] * half[:, None, :]))
    new_a = (basis_a @ (right[:, :k].mT * half[:, None, :])).mT @ rows
    if k < rank:
        new_a = torch.nn.functional.pad(new_a, (0, 0, 0, rank - k))
        new_b = torch.nn.functional.pad(new_b, (0, rank - k))
    return new_a, new_b, torch.stack([squares[:, :k].sum(1), squares.sum(1)], dim=1)


def singular_values(
    gram_a: torch.Tensor, gram_b: torch.Tensor, ranks: Sequence[int], weights: torch.Tensor
) -> torch.Tensor:
    """The singular values of ``sum_i weights[i] B_i A_i`` of every module, largest first, ``[modules, R]``.

    gram_a:  of the rows of all A, float64 ``[modules, R, R]``.
    gram_b:  of the columns of all B, float64 ``[modules, R, R]``.
    ranks:   of the sources.
    weights: float64 ``[modules, sources]``.
    """
    signed = per_column(weights, ranks)  # [M, R]
    length_a = gram_a.diagonal(dim1=1, dim2=2).sqrt()
    length_b = gram_b.diagonal(dim1=1, dim2=2).sqrt() * signed.abs()
    even = torch.where(length_a * length_b > 0, (length_a / length_b).sqrt(), 1.0)
    by_row, by_column = 1.0 / even, signed * even
    root_a = basis_of(gram_a * by_row[:, :, None] * by_row[:, None, :])[1]
    root_b = basis_of(gram_b * by_column[:, :, None] * by_column[:, None, :])[1]
    values: torch.Tensor = torch.linalg.svdvals(root_b @ root_a.mT)
    return values


def flattened(values: torch.Tensor, full: int) -> torch.Tensor:
    """FLAT times the mean singular value, for each that is not zero.

    Isotropic merging, arXiv 2502.04959.  A singular value up to FLAT_ZERO of the largest counts as zero.

    values: singular values ``[modules, n]``.
    full:   number of singular values that the mean is taken over; those that are not given are zero.
    """
    mean = FLAT / full * values.sum(1, keepdim=True)
    return torch.where(values > FLAT_ZERO * values.amax(1, keepdim=True), mean, 0.0)


def basis_of(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From ``G = X^T X``: T with orthonormal ``X T``, and S with ``X = (X T) S``.

    Directions whose squared length is below the rounding error of the Gram matrix are dropped: their columns
    of T and rows of S are zeros.

    gram: float64 ``[modules, R, R]``, as are T and S.
    """
    squares, vectors = torch.linalg.eigh(gram)
    least = squares[:, -1:].clamp(min=0.0) * gram.shape[-1] * torch.finfo(gram.dtype).eps
    lengths = torch.where(squares > least, squares, 0.0).sqrt()
    return vectors * inverses(lengths)[:, None, :], lengths[:, :, None] * vectors.mT


def inner_products(
    gram_a: torch.Tensor, gram_b: torch.Tensor, ranks: Sequence[int], weights: torch.Tensor
) -> torch.Tensor:
    """Frobenius inner products of ``weights[i] B_i A_i``, ``[modules, n, n]``, from Gram matrices.

    gram_a: of the rows of all A, ``[modules, R, R]``.
    gram_b: of the columns of all B, ``[modules, R, R]``.
    ranks: of the n sources.
    weights: ``[modules, n]``.
    """
    # <B_i A_i, B_j A_j> = tr(B_i^T B_j A_j A_i^T): the sum over block i, j of the Gram matrices, multiplied
    # entry by entry.
    rows = torch.split(gram_a * gram_b, list(ranks), dim=1)
    blocks = [[x.sum((1, 2)) for x in torch.split(row, list(ranks), dim=2)] for row in rows]
    products = torch.stack([torch.stack(row, dim=1) for row in blocks], dim=1)
    return products * weights[:, :, None] * weights[:, None, :]


def gram_of(sources: Sequence[Factors], weights: Sequence[float]) -> torch.Tensor:
    """Frobenius inner products of ``weights[i] B_i A_i`` of one module, float64 ``[1, n, n]``."""
    row = torch.tensor([weights], dtype=torch.float64)
    return _inner([f.a[None] for f in sources], [f.b[None] for f in sources], row)


def _inner(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Frobenius inner products of ``weights[i] B_i A_i``, float64 ``[modules, n, n]``."""
    rows, columns = joined(a, 1), joined(b, 2)
    return inner_products(rows @ rows.mT, columns.mT @ columns, [x.shape[1] for x in a], weights)
