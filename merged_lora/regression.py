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

BALANCE = 0.5
"""A source counts by its squared outputs to the power of minus this; 1 makes all count alike."""
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
    """Factors of the delta dW of a rank that minimizes ``sum_i c_i |(dW - weights[i] dW_i) X_i|^2``.

    X_i are the inputs of source i, ``dW_i = scalings[i] B_i A_i``, and ``c_i`` is ``|dW_i X_i|^(-2 BALANCE)``
    relative to the mean.  A source that changes nothing on its own inputs has no say.  If no token of any
    source ever reached the module, all inputs count alike.

    a:        for each source ``[modules, rank_i, in]``, any float dtype.
    b:        for each source ``[modules, out, rank_i]``, any float dtype.
    scalings: float64 ``[modules, sources]``.
    moments:  of each source.
    weights:  what each source's target is multiplied by, float64 ``[modules, sources]``.
    shrink:   the eigenvalues are multiplied by it, and the diagonal gets what they lose.
    rank:     of the factors, at most the sum of ranks; a smaller one is cut in the norm that is minimized.

    Returns ``A [modules, rank, in]`` and ``B [modules, out, rank]`` in float64 and, if the rank was cut, the
    squares kept and asked for, float64 ``[modules, 2]``.
    """
    ranks, counts = [x.shape[1] for x in a], [x.vectors.shape[1] for x in moments]
    joined_b = joined(b, 2)  # [M, out, R]
    gram_b = multiplied(joined_b.mT, joined_b)  # [M, R, R]
    target = joined(a, 1).mul_(per_column(scalings, ranks)[:, :, None])  # [M, R, in]; becomes T
    roots = joined([x.vectors for x in moments], 1)  # [M, K, in]; becomes F
    diagonals, squares = [], []
    parts = zip(
        moments,
        torch.split(target, ranks, dim=1),
        torch.split(roots, counts, dim=1),
        _blocks(gram_b, ranks),
        strict=True,
    )
    unseen = torch.stack([x.rest.sum(1) + x.values.sum(1) for x in moments]).sum(0) == 0.0  # [M]
    for each, rows, root, gram in parts:
        root.mul_(each.values.double().sqrt()[:, :, None])
        moved = (1.0 - shrink) * root.square().sum(1)  # [M, in]
        root.mul_(shrink**0.5)
        diagonal = torch.where(unseen[:, None], 1.0, each.rest.double() + moved)
        # A_i G_i for the second moment G_i of the inputs, and the squared outputs |B_i A_i X_i|^2.
        product = (rows * diagonal[:, None, :]).baddbmm_(multiplied(rows, root.mT), root)
        squares.append((gram * multiplied(product, rows.mT)).sum((1, 2)).clamp(min=0.0))
        rows.copy_(product)
        diagonals.append(diagonal)
    say = inverses(torch.stack(squares, dim=1).pow(BALANCE))  # c, [M, N]
    say = say * (len(ranks) * inverses(say.sum(1, keepdim=True)))

    # All inputs together have the second moment D + F^T F, to which the ridge is added.  Divided by the root
    # of D on both sides it becomes I + F^T F, whose inverse follows from one of [K, K] (Woodbury).
    roots.mul_(per_column(say, counts).sqrt()[:, :, None])
    d = torch.stack([x * say[:, i, None] for i, x in enumerate(diagonals)]).sum(0)  # [M, in]
    total = d.sum(1) + torch.linalg.vector_norm(roots, dim=(1, 2)).square()
    inverse = inverses((d + (RIDGE / d.shape[1] * total)[:, None]).sqrt())[:, None, :]
    target.mul_(per_column(say * weights, ranks)[:, :, None]).mul_(inverse)
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
    to_basis, from_basis = factored(gram_b)  # [M, R, R] each
    outputs = multiplied(target, target.mT).baddbmm_(core, turned.mT, alpha=-1)
    outputs = multiplied(to_basis, 0.5 * (outputs + outputs.mT), to_basis.mT)
    kept, chosen = leading([outputs], rank)  # [M, rank], [M, R, rank]
    left = multiplied(chosen.mT, to_basis)  # [M, rank, R]
    new_a = multiplied(left, target).baddbmm_(multiplied(left, core, vectors.mT), roots, alpha=-1)
    new_b = multiplied(joined_b, multiplied(from_basis, chosen))
    asked = outputs.diagonal(dim1=1, dim2=2).sum(1)
    kept = torch.minimum(kept.clamp(min=0.0).sum(1), asked)
    return new_a.mul_(inverse), new_b, torch.stack([kept, asked], dim=1)


def _blocks(gram: torch.Tensor, ranks: Sequence[int]) -> list[torch.Tensor]:
    """The blocks on the diagonal of ``[modules, R, R]``, ``[modules, rank_i, rank_i]`` each."""
    rows = torch.split(gram, list(ranks), dim=1)
    return [torch.split(row, list(ranks), dim=2)[i] for i, row in enumerate(rows)]
