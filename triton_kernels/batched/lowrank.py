"""Weighted sums of products for many modules at once, on any torch device.

The batched twin of ``merged_lora.lowrank``: the same mathematics on Gram matrices ``[R, R]`` in float64, R =
sum of ranks, with no loop over modules and no shape that depends on data.  The only factorization used is
that of ``merged_lora.batched.eigenvectors``, because batched SVD and QR loop over the matrices on CUDA.
Knows nothing of slots, of files or of Triton.

Shape comments: M modules, N sources, ranks r_i with sum R, deltas ``[out, in]``.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from merged_lora.bases import EPS, inverses, joined, normalized, per_column
from merged_lora.batched import SMALL, eigenvectors, loops, multiplied
from merged_lora.lowrank import flattened, inner_products
from merged_lora.plan import Mean, SumModule
from merged_lora.scalars import RULES

WORKSPACE = 256 << 20
"""Bytes of intermediates that a merge takes at a time, unless a single module needs more."""


@dataclass(frozen=True, eq=False)
class Stack:
    """Modules of one :func:`kind`, with all tensors on one device.

    a: for each source ``[modules, rank_i, in]``; float32, float16 or bfloat16, of any strides.
    b: for each source ``[modules, out, rank_i]``; likewise.
    weights: float64 ``[modules, sources]``.
    rank, mean, dtype, flat: see :class:`merged_lora.plan.SumModule`.
    """

    a: tuple[torch.Tensor, ...]
    b: tuple[torch.Tensor, ...]
    weights: torch.Tensor
    rank: int
    mean: Mean | None
    dtype: torch.dtype
    flat: bool = False

    @property
    def total(self) -> int:
        """Sum of the sources' ranks."""
        return sum(x.shape[1] for x in self.a)

    def part(self, modules: slice) -> Stack:
        """The stack of these modules alone, as views."""
        a, b = (tuple(x[modules] for x in side) for side in (self.a, self.b))
        return Stack(a, b, self.weights[modules], self.rank, self.mean, self.dtype, self.flat)


@dataclass(frozen=True, eq=False)
class MergedStack:
    """The merged factors of a stack, with scaling 1.

    a: ``[modules, rank, in]``.
    b: ``[modules, out, rank]``.
    energy: the squared norms kept and asked for, float64 ``[modules, 2]``; None if no rank was cut.
    repeated: whether the basis of a module's merge is one of many, bool ``[modules]``; None if there is none.
    """

    a: torch.Tensor
    b: torch.Tensor
    energy: torch.Tensor | None
    repeated: torch.Tensor | None = None


def kind(module: SumModule) -> Hashable:
    """A key that modules of one stack share; their weights and tensors may differ."""
    factors = tuple((f.a.shape, f.a.dtype, f.b.shape, f.b.dtype) for f in module.sources)
    ruled = module.rank, module.mean, module.dtype, module.flat
    return factors, module.present, ruled, module.embedding


def merge_stack(stack: Stack) -> MergedStack:
    """The merged factors of every module of a stack, in ``stack.dtype``.

    If the rank is the sum of the sources' ranks, the result has the bits of ``lowrank.concatenate`` for the
    same weights.  Otherwise it is a best approximation (Eckart and Young 1936), computed in float64 to within
    1e-7 of the largest singular value, and each factor is scaled by the roots of the singular values.  If
    sources cancel, the resolution is 1e-7 of their own sizes, and a smaller delta gives zeros.

    Apart from the result, this takes at most WORKSPACE bytes at a time, or what a single module needs if that
    is more: about ``8 * ((in + out) * (R + rank) + 16 * R**2)``, where R in the last term is rounded up to
    whole blocks of ``batched.SMALL`` if torch loops.  The scratch memory of cuSOLVER is not included.

    Only ``batched.eigenvectors`` waits for the device, twice per chunk, to see whether it has converged.
    """
    modules, sides = stack.weights.shape[0], (stack.a[0].shape[2], stack.b[0].shape[1])
    a = stack.a[0].new_empty(modules, stack.rank, sides[0], dtype=stack.dtype)
    b = stack.b[0].new_empty(modules, sides[1], stack.rank, dtype=stack.dtype)
    cut = stack.rank < stack.total or stack.flat
    energy = stack.weights.new_empty(modules, 2) if cut else None
    looping = loops(torch.__version__, stack.weights.device)
    square = -(-stack.total // SMALL) * SMALL if looping else stack.total
    each = 8 * (sum(sides) * (stack.total + stack.rank) + 16 * square**2)
    step = max(1, WORKSPACE // each)
    for start in range(0, modules, step):
        chunk = slice(start, start + step)
        if energy is None:
            _concatenate(stack.part(chunk), a[chunk], b[chunk])
        else:
            _truncate(stack.part(chunk), a[chunk], b[chunk], energy[chunk])
    return MergedStack(a, b, energy)


def _concatenate(stack: Stack, new_a: torch.Tensor, new_b: torch.Tensor) -> None:
    """Write the factors of all sources next to each other, A multiplied by the weights."""
    weights = stack.weights
    if stack.mean is not None:
        a, b = joined(stack.a, 1), joined(stack.b, 2)
        weights = _mean_weights(stack, multiplied(a, a.mT), multiplied(b.mT, b), stack.mean)
    end = 0
    for x, y, w in zip(stack.a, stack.b, weights.float().unbind(1), strict=True):
        start, end = end, end + x.shape[1]
        new_a[:, start:end] = x.float() * w[:, None, None]
        new_b[:, :, start:end] = y


def _truncate(stack: Stack, new_a: torch.Tensor, new_b: torch.Tensor, energy: torch.Tensor) -> None:
    """Write the best factors of rank ``stack.rank``, and the squared norms kept and asked for.

    If rows of A and columns of B have unit length, and D is the diagonal of weights and lengths, a delta is
    ``B D A``.  From ``A A^T = V L V^T`` follows ``A = S^T Q`` with ``S = L^(1/2) V^T`` and orthonormal rows
    of ``Q = L^(-1/2) V^T A``.  So the singular values of ``B D S^T`` are those of the delta, and the
    eigenvectors of ``S D B^T B D S^T`` are its right singular vectors in the basis Q.
    """
    a, b = joined(stack.a, 1), joined(stack.b, 2)  # [M, R, in], [M, out, R]
    gram_a, gram_b = multiplied(a, a.mT), multiplied(b.mT, b)  # [M, R, R] each
    weights = stack.weights  # [M, N]
    if stack.mean is not None:
        weights = _mean_weights(stack, gram_a, gram_b, stack.mean)
    # The resolution of a Gram matrix is relative to its largest entry: with unit lengths no factor hides
    # another.
    gram_a, length_a, inverse_a = normalized(gram_a)
    gram_b, length_b, inverse_b = normalized(gram_b)
    diagonal = per_column(weights, [x.shape[1] for x in stack.a]) * length_a * length_b  # D, [M, R]
    size = torch.linalg.vector_norm(diagonal, dim=1, keepdim=True)  # [M, 1]
    diagonal = diagonal * inverses(size)

    squares, vectors = eigenvectors(gram_a)  # L [M, R], V [M, R, R]
    # Directions that are lost in rounding are given a minimal length instead of being dropped; whatever that
    # length is, S and its inverse agree.
    root = squares.clamp(min=EPS * squares[:, -1:]).sqrt()
    scaled = root[:, :, None] * vectors.mT * diagonal[:, None, :]  # S D, [M, R, R]
    core = multiplied(scaled, gram_b, scaled.mT)

    # The core is accurate to a few EPS of this scale, and 16 EPS is the square of float32's unit roundoff:
    # values up to that are rounding errors of sources that cancel.  Shifting by the same amount keeps zero
    # matrices away from cuSOLVER, which has failed on them (pytorch#94772).
    noise = 16 * EPS * squares[:, -1:]
    core.diagonal(dim1=1, dim2=2).add_(noise)
    squares, w = eigenvectors(core)  # [M, R], [M, R, R]
    squares = squares - noise
    squares = torch.where(squares[:, -1:] > noise, squares, 0.0).clamp(min=0.0)

    asked = squares.sum(1)
    lost = squares[:, : -stack.rank].sum(1)
    energy[:] = torch.stack([asked - lost, asked], dim=1) * size**2

    w = w[:, :, -stack.rank :].flip(2)  # [M, R, rank]
    # The singular values are split evenly: A is scaled by their roots, and B, which contains the values
    # already, is divided by the roots, or by the values and multiplied by the roots of what they become.
    half = squares[:, -stack.rank :].flip(1).pow(0.25) * size.sqrt()
    undone = inverses(half)
    if stack.flat:
        values = squares.sqrt().flip(1) * size  # [M, R]
        full = min(stack.total, a.shape[2], b.shape[1])
        half = flattened(values, full)[:, : stack.rank].sqrt()
        undone = half * inverses(values[:, : stack.rank])
    right = multiplied((w / root[:, :, None]).mT, vectors.mT)  # [M, rank, R]
    left = multiplied(scaled.mT, w) * size[:, :, None]  # [M, R, rank]
    new_a[:] = multiplied(half[:, :, None] * right * inverse_a[:, None, :], a)
    new_b[:] = multiplied(b, inverse_b[:, :, None] * left * undone[:, None, :])


def _mean_weights(stack: Stack, gram_a: torch.Tensor, gram_b: torch.Tensor, mean: Mean) -> torch.Tensor:
    """The weights of the products by the rule of a mean, ``[modules, sources]``.

    gram_a, gram_b: of the rows of all A and the columns of all B, ``[modules, R, R]``.
    """
    gram = inner_products(gram_a, gram_b, [x.shape[1] for x in stack.a], stack.weights)
    shares = torch.tensor(mean.shares, dtype=torch.float64).to(gram.device)
    return RULES[mean.rule](gram, shares.expand(gram.shape[:-1]), mean.count) * stack.weights
