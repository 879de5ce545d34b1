"""One scalar per source from the inner products of the deltas: slerp, means on the sphere, and others.

Every rule takes the Frobenius inner products of n deltas, ``gram [..., n, n]``, their ``shares [..., n]``,
both float64 on any device, and the number of sources.  It returns the factors ``[..., n]`` that the deltas
are multiplied by in the merged sum.  Leading dimensions are modules.  Knows nothing of low-rank factors: a
delta is a row of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

SLERP_STRAIGHT = 0.9995
"""Above this |cos| the circle is a straight line up to rounding; mergekit's slerp has the same limit."""
KARCHER_STEPS = 64
"""Steps shrink geometrically; for angles below 90 degrees, a dozen reach the rounding error."""
TINY = 1e-12


def slerp(gram: torch.Tensor, shares: torch.Tensor, count: int) -> torch.Tensor:
    """Interpolation on the circle between two deltas, with shares ``(1 - t, t)``.

    K. Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.  The interpolation is linear if a
    delta is zero or the two are parallel (|cos| above SLERP_STRAIGHT).
    """
    cosine = _units(gram)[1][..., 0, 1]
    present = (gram.diagonal(dim1=-2, dim2=-1) > 0).all(-1)
    curved = (present & (cosine.abs() <= SLERP_STRAIGHT))[..., None]
    angle = torch.where(curved, cosine[..., None], 0.0).acos()  # [..., 1]; a right angle if it is not curved
    return torch.where(curved, (shares * angle).sin() / angle.sin(), shares)


def karcher(gram: torch.Tensor, shares: torch.Tensor, count: int) -> torch.Tensor:
    """The weighted Karcher mean of the directions, at the weighted mean of the lengths.

    H. Karcher, "Riemannian center of mass and mollifier smoothing", 1977.  Fixed-point steps along the mean
    tangent start from the weighted sum of the directions, or from the first direction if that sum vanishes.
    Deltas of zero only count for the length.
    """
    lengths, cosines = _units(gram)  # [..., n], [..., n, n]
    present = (lengths > 0).to(gram.dtype)
    weights = shares * present
    weights = weights * _inverse(weights.sum(-1, keepdim=True))
    # A point of the sphere is represented by its coefficients in the directions of the deltas, [..., n].
    mean, size = _normalized(weights, cosines)
    first = torch.zeros_like(weights).scatter_(-1, present.argmax(-1, keepdim=True), 1.0)
    mean = torch.where(size > TINY, mean, first)
    for _ in range(KARCHER_STEPS):
        dots = _applied(cosines, mean).clamp(-1.0, 1.0)  # with every direction
        angles = dots.acos()
        # The logarithmic map scales chords to the lengths of arcs; its limit at angle 0 is 1.
        pull = weights * torch.where(angles.sin() > TINY, angles * _inverse(angles.sin()), 1.0)
        tangent = pull - (pull * dots).sum(-1, keepdim=True) * mean
        mean = _moved(mean, tangent, cosines)
        # Rounding moves the point off the sphere, a little with every step.
        mean = _normalized(mean, cosines)[0]
    return _placed(mean, lengths, shares)


def multislerp(gram: torch.Tensor, shares: torch.Tensor, count: int) -> torch.Tensor:
    """A single step like those of :func:`karcher`, with tangents as long as their chords.

    Goddard, "Multi-SLERP".  If the weighted sum of the directions vanishes, there is no point to start from,
    and the result is the weighted sum of the deltas.
    """
    lengths, cosines = _units(gram)
    mean, size = _normalized(shares, cosines)
    dots = _applied(cosines, mean)
    tangent = shares - (shares * dots).sum(-1, keepdim=True) * mean
    return torch.where(size > TINY, _placed(_moved(mean, tangent, cosines), lengths, shares), shares)


def model_stock(gram: torch.Tensor, shares: torch.Tensor, count: int) -> torch.Tensor:
    """The weighted mean times ``N cos / (1 + (N - 1) cos)``, where cos is the mean over all pairs.

    Model Stock, arXiv 2403.19522.

    count: N; sources that are not in the matrix have zero deltas, which are orthogonal to all others.
    """
    cosines = _units(gram)[1]
    pairs = count * (count - 1)
    cosine = (cosines.sum((-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1))[..., None] / pairs
    denominator = 1.0 + (count - 1) * cosine
    singular = denominator.abs() < 1e-6  # opposing updates: stay at the base, as mergekit does
    return shares * torch.where(singular, 0.0, count * cosine / torch.where(singular, 1.0, denominator))


def balanced(gram: torch.Tensor, shares: torch.Tensor, count: int) -> torch.Tensor:
    """The shares of deltas brought to the mean of their lengths; deltas of zero do not count for it."""
    lengths = _units(gram)[0]
    present = (lengths > 0).sum(-1, keepdim=True)
    mean = lengths.sum(-1, keepdim=True) * _inverse(present.to(gram.dtype))
    return shares * mean * _inverse(lengths)


RULES: Mapping[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "slerp": slerp,
    "karcher": karcher,
    "multislerp": multislerp,
    "model_stock": model_stock,
    "balanced": balanced,
}


def _units(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths of the deltas ``[..., n]`` and their cosines ``[..., n, n]``; both are 0 for a zero delta."""
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()
    inverse = _inverse(lengths)
    return lengths, gram * inverse[..., :, None] * inverse[..., None, :]


def _applied(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Products of matrices ``[..., n, n]`` with vectors ``[..., n]``."""
    return (matrix * vector[..., None, :]).sum(-1)


def _normalized(vector: torch.Tensor, cosines: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A vector scaled to length 1, and the length that it had, ``[..., 1]``.

    vector: coefficients of directions ``[..., n]`` whose cosines are given.
    """
    size = (vector * _applied(cosines, vector)).sum(-1, keepdim=True).clamp(min=0.0).sqrt()
    return vector * _inverse(size), size


def _moved(mean: torch.Tensor, tangent: torch.Tensor, cosines: torch.Tensor) -> torch.Tensor:
    """The exponential map: the point reached from ``mean`` on the sphere along a tangent, by its length."""
    direction, size = _normalized(tangent, cosines)
    return size.cos() * mean + size.sin() * direction


def _placed(mean: torch.Tensor, lengths: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Coefficients of deltas from those of their directions, for a result of the mean of their lengths."""
    return (shares * lengths).sum(-1, keepdim=True) * mean * _inverse(lengths)


def _inverse(x: torch.Tensor) -> torch.Tensor:
    """``1 / x``, and 0 where ``x`` is 0."""
    return torch.where(x != 0, 1.0 / torch.where(x != 0, x, 1.0), 0.0)
