"""The delta whose outputs are closest to those of each source on that source's own inputs.

RegMean (arXiv 2212.09849) on deltas, as a weighted ridge regression in closed form, for many modules at a
time on any device.  The inputs are known as leading eigenpairs and a diagonal, so that all that is computed
are products of thin matrices and small symmetric ones: no delta ``[out, in]`` or Gram matrix ``[in, in]``.

Shape comments: M modules, N sources, ranks r_i with sum R, k_i eigenpairs with sum K, deltas ``[out, in]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .bases import eigh, factored, inverses, joined, leading, per_column
from .batched import multiplied

RIDGE = 1e-3
"""Share of the mean squared input that is added to every input."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of the inputs of one source's modules, ``V^T diag(values) V + diag(rest)`` each.

    values:  float ``[modules, k]``.
    vectors: float ``[modules, k, in]``.
    rest:    float ``[modules, in]``.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    rest: torch.Tensor


def fitted(
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scalings: torch.Tensor,
    moments: Sequence[Moments],
    weights: torch.Tensor,
    shrink: float,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Factors of the delta dW of a rank that minimizes ``sum_i |(dW - weights[i] dW_i) X_i|^2``.

    X_i are the inputs of source i and ``dW_i = scalings[i] B_i A_i``.  A source that lacks the module wants
    its inputs left alone, and one whose tokens never reach the module has no say.  If that is true of all
    sources, all inputs count alike.

    a:        for each source ``[modules, rank_i, in]``, any float dtype.
    b:        for each source ``[modules, out, rank_i]``, any float dtype.
    scalings: float64 ``[modules, sources]``.
    moments:  of each source, and then of those that lack the module.
    weights:  what each source's target is multiplied by, float64 ``[modules, sources]``.
    shrink:   the eigenvalues are multiplied by it, and the diagonal gets what they lose.
    rank:     of the factors, at most the sum of ranks; a smaller one is cut in the norm that is minimized.

    Returns ``A [modules, rank, in]`` and ``B [modules, out, rank]`` in float64 and, if the rank was cut, the
    squares kept and asked for, float64 ``[modules, 2]``.
    """
    missing = len(moments) - len(a)  # lacking the module is having it with rank 0
    a, b = [*a, *[a[0][:, :0]] * missing], [*b, *[b[0][:, :, :0]] * missing]
    scalings, weights = (torch.nn.functional.pad(x, (0, missing)) for x in (scalings, weights))
    ranks, counts = [x.shape[1] for x in a], [x.vectors.shape[1] for x in moments]
    joined_b = joined(b, 2)  # [M, out, R]
    rows = joined(a, 1).mul_(per_column(scalings, ranks)[:, :, None])  # [M, R, in]
    roots = joined([x.vectors for x in moments], 1)  # [M, K, in]; becomes F
    diagonals = _prepared(moments, torch.split(roots, counts, dim=1), shrink)  # [M, N, in]
    seen = multiplied(rows, roots.mT)  # [M, R, K]
    target = _outputs(rows, seen, diagonals, roots, ranks, counts)  # A_i G_i, [M, R, in]; becomes T

    # All inputs together have the second moment D + F^T F, to which the ridge is added.  Divided by the root
    # of D on both sides it becomes I + F^T F, whose inverse follows from one of [K, K] (Woodbury).
    d = diagonals.sum(1)  # [M, in]
    total = d.sum(1) + torch.linalg.vector_norm(roots, dim=(1, 2)).square()
    inverse = inverses((d + (RIDGE / d.shape[1] * total)[:, None]).sqrt())[:, None, :]
    target.mul_(per_column(weights, ranks)[:, :, None]).mul_(inverse)
    roots.mul_(inverse)
    square = multiplied(roots, roots.mT)
    square.diagonal(dim1=1, dim2=2).add_(1.0)
    values, vectors = eigh(square)  # [M, K], [M, K, K]
    turned = multiplied(target, roots.mT, vectors)  # [M, R, K]
    core = turned / values[:, None, :]
    if rank == sum(ranks):
        whole = target.baddbmm_(multiplied(core, vectors.mT), roots, alpha=-1)
        return whole.mul_(inverse), joined_b, None

    # With B = Q S_b and orthonormal Q, the best cut is by the leading eigenvectors of the outputs in Q.
    to_basis, from_basis = factored(multiplied(joined_b.mT, joined_b))  # [M, R, R] each
    outputs = multiplied(target, target.mT).baddbmm_(core, turned.mT, alpha=-1)
    outputs = multiplied(to_basis, 0.5 * (outputs + outputs.mT), to_basis.mT)
    kept, chosen = leading([outputs], rank)  # [M, rank], [M, R, rank]
    left = multiplied(chosen.mT, to_basis)  # [M, rank, R]
    new_a = multiplied(left, target).baddbmm_(multiplied(left, core, vectors.mT), roots, alpha=-1)
    new_b = multiplied(joined_b, multiplied(from_basis, chosen))
    asked = outputs.diagonal(dim1=1, dim2=2).sum(1)
    kept = torch.minimum(kept.clamp(min=0.0).sum(1), asked)
    return new_a.mul_(inverse), new_b, torch.stack([kept, asked], dim=1)


def _prepared(moments: Sequence[Moments], roots: Sequence[torch.Tensor], shrink: float) -> torch.Tensor:
    """The diagonals of the second moments, shrunk, float64 ``[modules, sources, in]``.

    roots: the eigenvectors ``[modules, k_i, in]``; multiplied in place by the roots of their eigenvalues.
    """
    diagonals = []
    unseen = torch.stack([x.rest.sum(1) + x.values.sum(1) for x in moments]).sum(0) == 0.0  # [M]
    for each, root in zip(moments, roots, strict=True):
        root.mul_(each.values.double().sqrt()[:, :, None])
        diagonal = each.rest.double() + (1.0 - shrink) * root.square().sum(1)
        diagonals.append(torch.where(unseen[:, None], 1.0, diagonal))
        root.mul_(shrink**0.5)
    return torch.stack(diagonals, dim=1)


def _outputs(
    rows: torch.Tensor,
    seen: torch.Tensor,
    diagonals: torch.Tensor,
    roots: torch.Tensor,
    ranks: list[int],
    counts: list[int],
) -> torch.Tensor:
    """``A_i G_i`` of every source, float64 ``[modules, R, in]``; ``rows`` is used for it."""
    own = torch.split(rows, ranks, dim=1)
    coordinates = torch.split(seen, ranks, dim=1)
    for i, root in enumerate(torch.split(roots, counts, dim=1)):
        own[i].mul_(diagonals[:, i, None, :])
        own[i].baddbmm_(torch.split(coordinates[i], counts, dim=2)[i], root)
    return rows
