"""Exact linear algebra on factors: weighted sums of products, their best low-rank factors, inner products.

No delta ``[out, in]`` is ever formed: everything is computed from Gram matrices ``[R, R]`` in float64, with R
the sum of ranks.  Knows nothing of strategies or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from .factors import Factors
from .plan import SumModule
from .scalars import RULES

FLAT = 1.3
"""From a study with two sets of three adapters of rank 8: the best of six variants of isotropic merging."""
FLAT_ZERO = 1e-6

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class MergedModule:
    """The factors of a merged delta.

    factors: with scaling 1.
    energy: the squared norm that a cut rank kept, and the one asked for; None if the rank was not cut.
    """

    factors: Factors
    energy: tuple[float, float] | None


class Each(Protocol):
    """A function that returns ``list(map(function, items))``, computed on any threads."""

    def __call__(self, function: Callable[[Item], Made], items: Sequence[Item], /) -> list[Made]: ...


def in_turn(function: Callable[[Item], Made], items: Sequence[Item], /) -> list[Made]:
    """The result of the function for each item, computed one after the other in this thread."""
    return [function(item) for item in items]


def merge_modules(modules: Sequence[SumModule], each: Each = in_turn) -> list[MergedModule]:
    """The merged factors of every module, in the module's dtype and with scaling 1."""
    return each(_merge, list(zip(modules, _weights(modules, each), strict=True)))


def _weights(modules: Sequence[SumModule], each: Each) -> list[tuple[float, ...]]:
    """For each module, what its products ``B_i A_i`` are multiplied by, one weight per source."""
    found = [module.weights for module in modules]
    alike: dict[tuple[int, str, int], list[tuple[int, Sequence[float]]]] = {}
    for index, module in enumerate(modules):
        if module.mean is not None:
            kind = len(module.sources), module.mean.rule, module.mean.count
            alike.setdefault(kind, []).append((index, module.mean.shares))
    # A rule is many small steps, which for all modules together cost little more than for one.
    for (_, rule, count), members in alike.items():
        indices, shares = zip(*members, strict=True)
        own = torch.tensor([found[index] for index in indices], dtype=torch.float64)
        gram = torch.cat(each(_gram, [modules[index] for index in indices]))
        rows = RULES[rule](gram, torch.tensor(shares, dtype=torch.float64), count) * own
        for index, row in zip(indices, rows.tolist(), strict=True):
            found[index] = tuple(row)
    return found


def _merge(weighted: tuple[SumModule, Sequence[float]]) -> MergedModule:
    """The merged factors of a module with the weights of its products."""
    module, weights = weighted
    total = sum(f.rank for f in module.sources)
    if module.rank == total and not module.flat:
        a, b = concatenate(module.sources, weights, module.dtype)
        return MergedModule(Factors(a, b, 1.0, module.embedding), None)
    a, b, energy = truncate(module.sources, weights, module.rank, module.flat)
    return MergedModule(Factors(a.to(module.dtype), b.to(module.dtype), 1.0, module.embedding), energy)


def concatenate(
    sources: Sequence[Factors], weights: Sequence[float], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``A [R, in]`` and ``B [out, R]`` in a dtype, with ``B A = sum_i weights[i] B_i A_i``.

    The weights are applied to A alone, as in PEFT's ``cat``, so that B is copied and only A is rounded.
    """
    a = torch.cat([(f.a.float() * w).to(dtype) for f, w in zip(sources, weights, strict=True)], dim=0)
    b = torch.cat([f.b.to(dtype) for f in sources], dim=1)
    return a, b


def truncate(
    sources: Sequence[Factors], weights: Sequence[float], rank: int, flat: bool = False
) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float]]:
    """The best approximation of a rank to ``sum_i weights[i] B_i A_i``.

    flat: make its singular values equal, see :func:`flattened`; the norms remain those from before.

    C. Eckart and G. Young, "The approximation of one matrix by another of lower rank", Psychometrika 1, 1936.

    Returns ``A [rank, in]`` and ``B [out, rank]`` in float64, with the singular values split evenly between
    them, and the squared Frobenius norms of the approximation and of the sum.
    """
    b = torch.cat([f.b.double() * w for f, w in zip(sources, weights, strict=True)], dim=1)  # [out, R]
    a = torch.cat([f.a.double() for f in sources], dim=0)  # [R, in]
    # The resolution of a Gram matrix is relative to its largest entry, so both factors of each product of a
    # column and a row are given the same length first.
    lengths = b.norm(dim=0) * a.norm(dim=1)  # [R]
    even = torch.where(lengths > 0, (a.norm(dim=1) / b.norm(dim=0)).sqrt(), 1.0)
    b, a = b * even, a / even[:, None]
    basis_b, root_b = _basis(b.T @ b)  # [R, n_b], [n_b, R]
    basis_a, root_a = _basis(a @ a.T)  # [R, n_a], [n_a, R]
    # b = U_b root_b and a = root_a^T V_a^T with orthonormal U_b and V_a, so the core root_b root_a^T has the
    # singular values of b a.
    left, values, right = torch.linalg.svd(root_b @ root_a.T)
    energy = float((values**2).sum())
    k, full = min(rank, values.numel()), min(*sources[0].shape, a.shape[0])
    chosen = flattened(values[None], full)[0, :k] if flat else values[:k]
    if energy == 0.0:
        return a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank), (0.0, 0.0)
    half = chosen.sqrt()
    new_b = b @ (basis_b @ (left[:, :k] * half))
    new_a = (basis_a @ (right[:k].T * half)).T @ a
    if k < rank:
        new_a = torch.cat([new_a, new_a.new_zeros(rank - k, new_a.shape[1])], dim=0)
        new_b = torch.cat([new_b, new_b.new_zeros(new_b.shape[0], rank - k)], dim=1)
    return new_a, new_b, (float((values[:k] ** 2).sum()), energy)


def flattened(values: torch.Tensor, full: int) -> torch.Tensor:
    """FLAT times the mean singular value, for each that is not zero.

    Isotropic merging, arXiv 2502.04959.  A singular value up to FLAT_ZERO of the largest counts as zero.

    values: singular values ``[modules, n]``.
    full:   number of singular values that the mean is taken over; those that are not given are zero.
    """
    mean = FLAT / full * values.sum(1, keepdim=True)
    return torch.where(values > FLAT_ZERO * values.amax(1, keepdim=True), mean, 0.0)


def _basis(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From ``G = X^T X``: T with orthonormal ``X T``, and S with ``X = (X T) S``.

    Directions whose squared length is below the rounding error of the Gram matrix are dropped.

    gram: float64 ``[R, R]``; T is ``[R, n]`` and S is ``[n, R]`` for n remaining directions.
    """
    squares, vectors = torch.linalg.eigh(gram)
    real = squares > squares[-1].clamp(min=0) * gram.shape[0] * torch.finfo(gram.dtype).eps
    vectors, lengths = vectors[:, real], squares[real].sqrt()
    return vectors / lengths, lengths[:, None] * vectors.T


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
    a = torch.cat([f.a.double() for f in sources], dim=0)
    b = torch.cat([f.b.double() for f in sources], dim=1)
    row = torch.tensor([weights], dtype=torch.float64)
    return inner_products((a @ a.T)[None], (b.T @ b)[None], [f.rank for f in sources], row)


def _gram(module: SumModule) -> torch.Tensor:
    return gram_of(module.sources, module.weights)
