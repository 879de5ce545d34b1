"""Merges in ``delta`` space of many modules at once, on any torch device.

The batched twin of ``merged_lora.lowrank``: the same mathematics on Gram matrices ``[R, R]`` in float64, R =
sum of ranks, with no loop over modules and no shape that depends on data.  Of the factorisations it uses only
``torch.linalg.eigh``: batched SVD and QR loop over the matrices on CUDA.  Knows nothing of slots, of files or
of Triton.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from merged_lora.lowrank import SLERP_STRAIGHT
from merged_lora.plan import DeltaModule

WORKSPACE = 256 << 20
"""Bytes of intermediates that a merge takes at a time, where a single module needs no more than that."""

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class Stack:
    """Modules of one :func:`kind` side by side, all tensors on one device.

    a: per source ``[modules, rank_i, in]``, b: per source ``[modules, out, rank_i]``; float32, float16 or
    bfloat16, of any strides.  weights: float64 ``[modules, sources]``.  rank, slerp, dtype: see
    :class:`merged_lora.plan.DeltaModule`.
    """

    a: tuple[torch.Tensor, ...]
    b: tuple[torch.Tensor, ...]
    weights: torch.Tensor
    rank: int
    slerp: float | None
    dtype: torch.dtype

    @property
    def total(self) -> int:
        """Sum of the sources' ranks."""
        return sum(x.shape[1] for x in self.a)

    def part(self, modules: slice) -> Stack:
        """These modules alone, as views."""
        a, b = (tuple(x[modules] for x in side) for side in (self.a, self.b))
        return Stack(a, b, self.weights[modules], self.rank, self.slerp, self.dtype)


@dataclass(frozen=True, eq=False)
class MergedStack:
    """The merged factors of a stack, with scaling 1.

    a: ``[modules, rank, in]``, b: ``[modules, out, rank]``.  energy: float64 ``[modules, 2]``, the squared
    norm kept and the one asked for; None where no rank was cut.
    """

    a: torch.Tensor
    b: torch.Tensor
    energy: torch.Tensor | None


def kind(module: DeltaModule) -> Hashable:
    """What two modules must have in common to go into one stack; their weights and tensors may differ."""
    factors = tuple((f.a.shape, f.a.dtype, f.b.shape, f.b.dtype) for f in module.sources)
    return factors, module.present, module.rank, module.slerp, module.dtype, module.embedding


def merge_stack(stack: Stack) -> MergedStack:
    """The merged factors of every module of a stack, in ``stack.dtype``.

    Where the rank is the sum of the sources' ranks, the result has the bits of ``lowrank.concatenate`` for
    the same weights.  Elsewhere it is a best approximation (Eckart and Young), computed in float64, to within
    1e-7 of the largest singular value, and each factor gets the root of every singular value.  Where sources
    cancel, 1e-7 of their own sizes is what can be told from zero, and a delta below that gives zeros.

    Beside the result it takes at most WORKSPACE bytes at a time, or what one module needs if that is more:
    about ``8 * ((in + out) * (R + rank) + 16 * R**2)``; the scratch memory of cuSOLVER is not counted.
    Nothing waits for the device but ``torch.linalg.eigh``, twice per chunk, which looks whether it converged.
    """
    modules, sides = stack.weights.shape[0], (stack.a[0].shape[2], stack.b[0].shape[1])
    a = stack.a[0].new_empty(modules, stack.rank, sides[0], dtype=stack.dtype)
    b = stack.b[0].new_empty(modules, sides[1], stack.rank, dtype=stack.dtype)
    cut = stack.rank < stack.total
    energy = stack.weights.new_empty(modules, 2) if cut else None
    each = 8 * (sum(sides) * (stack.total + stack.rank) + 16 * stack.total**2)
    step = max(1, WORKSPACE // each)
    for start in range(0, modules, step):
        chunk = slice(start, start + step)
        if energy is None:
            _concatenate(stack.part(chunk), a[chunk], b[chunk])
        else:
            _truncate(stack.part(chunk), a[chunk], b[chunk], energy[chunk])
    return MergedStack(a, b, energy)


def _concatenate(stack: Stack, new_a: torch.Tensor, new_b: torch.Tensor) -> None:
    weights = stack.weights
    if stack.slerp is not None:
        a, b = _joined(stack.a, 1), _joined(stack.b, 2)
        weights = _slerp_weights(stack, a @ a.mT, b.mT @ b, stack.slerp)
    end = 0
    for x, y, w in zip(stack.a, stack.b, weights.float().unbind(1), strict=True):
        start, end = end, end + x.shape[1]
        new_a[:, start:end] = x.float() * w[:, None, None]
        new_b[:, :, start:end] = y


def _truncate(stack: Stack, new_a: torch.Tensor, new_b: torch.Tensor, energy: torch.Tensor) -> None:
    """The best factors of rank ``stack.rank``.

    With rows of A and columns of B of unit length, and the weights and lengths in a diagonal D, a delta is
    ``B D A``.  From ``A A^T = V L V^T`` follows ``A = S^T Q`` with ``S = L^(1/2) V^T`` and orthonormal rows
    of ``Q = L^(-1/2) V^T A``.  So the singular values of ``B D S^T`` are those of the delta, and the
    eigenvectors of ``S D B^T B D S^T`` are its right singular vectors in the basis Q.
    """
    a, b = _joined(stack.a, 1), _joined(stack.b, 2)
    gram_a, gram_b = a @ a.mT, b.mT @ b
    weights = stack.weights
    if stack.slerp is not None:
        weights = _slerp_weights(stack, gram_a, gram_b, stack.slerp)
    # What a Gram matrix resolves is relative to its largest entry: with unit lengths no factor hides another.
    gram_a, length_a, inverse_a = _normalized(gram_a)
    gram_b, length_b, inverse_b = _normalized(gram_b)
    per_source = zip(weights.unbind(1), stack.a, strict=True)
    diagonal = torch.cat([w[:, None].expand(-1, x.shape[1]) for w, x in per_source], dim=1)
    diagonal = diagonal * length_a * length_b
    size = torch.linalg.vector_norm(diagonal, dim=1, keepdim=True)
    diagonal = diagonal * _inverse(size)

    squares, vectors = torch.linalg.eigh(gram_a)
    # Directions lost in rounding get a floor and are not dropped: S and its inverse agree whatever it is.
    root = squares.clamp(min=EPS * squares[:, -1:]).sqrt()
    scaled = root[:, :, None] * vectors.mT * diagonal[:, None, :]  # S D
    core = scaled @ gram_b @ scaled.mT

    # The core is good to a few EPS of this scale, and 16 EPS is the square of float32's unit roundoff: values
    # up to that are the rounding of sources that cancel.  The shift by as much keeps matrices of zeros from
    # cuSOLVER, which has failed on them (pytorch#94772).
    noise = 16 * EPS * squares[:, -1:]
    core.diagonal(dim1=1, dim2=2).add_(noise)
    squares, w = torch.linalg.eigh(core)
    squares = squares - noise
    squares = torch.where(squares[:, -1:] > noise, squares, 0.0).clamp(min=0.0)

    asked = squares.sum(1)
    lost = squares[:, : -stack.rank].sum(1)
    energy[:] = torch.stack([asked - lost, asked], dim=1) * size**2

    w = w[:, :, -stack.rank :].flip(2)
    # The singular values are split evenly: each factor gets the root, which B has to be divided by.
    half = squares[:, -stack.rank :].flip(1).pow(0.25) * size.sqrt()
    right = (w / root[:, :, None]).mT @ vectors.mT
    left = scaled.mT @ w * size[:, :, None]
    new_a[:] = (half[:, :, None] * right * inverse_a[:, None, :]) @ a
    new_b[:] = b @ (inverse_b[:, :, None] * left * _inverse(half)[:, None, :])


def _slerp_weights(stack: Stack, gram_a: torch.Tensor, gram_b: torch.Tensor, t: float) -> torch.Tensor:
    """``lowrank.slerp_weights`` of every module, ``[modules, 2]``, from the Gram matrices of both factors."""
    products, split = gram_a * gram_b, stack.a[0].shape[1]
    x, y = slice(None, split), slice(split, None)
    xx, xy, yy = (products[:, rows, columns].sum((1, 2)) for rows, columns in ((x, x), (x, y), (y, y)))
    w_x, w_y = stack.weights.unbind(1)
    norms = (xx * w_x * w_x).sqrt() * (yy * w_y * w_y).sqrt()
    cosine = xy * w_x * w_y / norms
    # Not where a delta is zero either: there the cosine is NaN or infinite.
    curved = cosine.abs() <= SLERP_STRAIGHT
    angle = torch.where(curved, cosine, 0.0).acos()
    at_x = torch.where(curved, ((1.0 - t) * angle).sin() / angle.sin(), 1.0 - t)
    at_y = torch.where(curved, (t * angle).sin() / angle.sin(), t)
    return torch.stack([at_x * w_x, at_y * w_y], dim=1)


def _joined(factors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """The factors of all sources side by side in float64, without a second copy in between."""
    shape = list(factors[0].shape)
    shape[dim] = sum(x.shape[dim] for x in factors)
    joined = factors[0].new_empty(shape, dtype=torch.float64)
    end = 0
    for x in factors:
        joined.narrow(dim, end, x.shape[dim]).copy_(x)
        end += x.shape[dim]
    return joined


def _normalized(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The Gram matrices of the same vectors at unit length, their lengths, and 1 / lengths (0 for zeros).

    A vector of zeros counts as one that is orthogonal to all others.
    """
    lengths = gram.diagonal(dim1=1, dim2=2).sqrt()
    inverse = _inverse(lengths)
    unit = gram * inverse[:, :, None] * inverse[:, None, :]
    unit.diagonal(dim1=1, dim2=2).fill_(1.0)
    return unit, lengths, inverse


def _inverse(x: torch.Tensor) -> torch.Tensor:
    """``1 / x``, and 0 where ``x`` is 0."""
    return torch.where(x > 0, 1.0 / x, 0.0)
