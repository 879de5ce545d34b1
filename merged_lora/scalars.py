"""One scalar per source from the inner products of the deltas: slerp, means on the sphere, Model Stock.

Every function takes ``gram [..., n, n]``, the Frobenius inner products of n deltas, and ``shares [..., n]``,
both float64 on any device, and returns ``[..., n]``: what each delta is multiplied by in the sum that the
rule asks for.  Leading dimensions are modules.  Knows nothing of factors: a delta is a row of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

SLERP_STRAIGHT = 0.9995
"""Above this |cos| the circle is a line to within rounding; the limit that mergekit's slerp uses too."""
KARCHER_STEPS = 64
"""The step shrinks by a factor with every one; at angles below a right one a dozen reach rounding."""
TINY = 1e-12


def slerp(gram: torch.Tensor, shares: torch.Tensor, count: int) -> torch.Tensor:
    """Interpolation on the circle between two deltas (Shoemake 1985); shares are ``(1 - t, t)``.

    A straight line where a delta is zero or the two are parallel (|cos| over SLERP_STRAIGHT).
    """
    cosine = _units(gram)[1][..., 0, 1]
    present = (gram.diagonal(dim1=-2, dim2=-1) > 0).all(-1)
    curved = (present & (cosine.abs() <= SLERP_STRAIGHT))[..., None]
    angle = torch.where(curved, cosine[..., None], 0.0).acos()
    return torch.where(curved, (shares * angle).sin() / angle.sin(), shares)


def karcher(gram: torch.Tensor, shares: torch.Tensor, count: int) -> torch.Tensor:
    """The weighted Karcher mean of the directions, at the weighted mean of the lengths (Karcher 1977).

    Fixed-point steps along the mean tangent from the weighted sum of the directions, or from the first one
    where that sum vanishes.  Deltas of zero count for the length alone.
    """
    lengths, cosines = _units(gram)
    present = (lengths > 0).to(gram.dtype)
    weights = shares * present
    weights = weights * _inverse(weights.sum(-1, keepdim=True))
    mean, size = _normalized(weights, cosines)
    first = torch.zeros_like(weights).scatter_(-1, present.argmax(-1, keepdim=True), 1.0)
    mean = torch.where(size > TINY, mean, first)
    for _ in range(KARCHER_STEPS):
        dots = _applied(cosines, mean).clamp(-1.0, 1.0)
        angles = dots.acos()
        pull = weights * torch.where(angles.sin() > TINY, angles * _inverse(angles.sin()), 1.0)
        tangent = pull - (pull * dots).sum(-1, keepdim=True) * mean
        mean = _moved(mean, tangent, cosines)
        mean = _normalized(mean, cosines)[0]
    return _placed(mean, lengths, shares)


def multislerp(gram: torch.Tensor, shares: torch.Tensor, count: int) -> torch.Tensor:
    """One step of the kind that :func:`karcher` repeats, with the tangents left at their chords' lengths.

    (Goddard, "Multi-SLERP".)  Where the weighted sum of the directions vanishes there is no point to start
    from, and the result is the weighted sum of the deltas.
    """
    lengths, cosines = _units(gram)
    mean, size = _normalized(shares, cosines)
    dots = _applied(cosines, mean)
    tangent = shares - (shares * dots).sum(-1, keepdim=True) * mean
    return torch.where(size > TINY, _placed(_moved(mean, tangent, cosines), lengths, shares), shares)


def model_stock(gram: torch.Tensor, shares: torch.Tensor, count: int) -> torch.Tensor:
    """The weighted mean times ``N cos / (1 + (N - 1) cos)``, cos the mean over pairs (arXiv 2403.19522).

    count: N; sources that are not in the matrix have deltas of zero, at right angles to every other.
    """
    cosines = _units(gram)[1]
    pairs = count * (count - 1)
    cosine = (cosines.sum((-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1))[..., None] / pairs
    denominator = 1.0 + (count - 1) * cosine
    singular = denominator.abs() < 1e-6  # opposing updates: stay at the base, as mergekit does
    return shares * torch.where(singular, 0.0, count * cosine / torch.where(singular, 1.0, denominator))


RULES: Mapping[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "slerp": slerp,
    "karcher": karcher,
    "multislerp": multislerp,
    "model_stock": model_stock,
}


def _units(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths of the deltas, and their cosines; both 0 for a delta of zeros."""
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()
    inverse = _inverse(lengths)
    return lengths, gram * inverse[..., :, None] * inverse[..., None, :]


def _applied(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (matrix * vector[..., None, :]).sum(-1)


def _normalized(vector: torch.Tensor, cosines: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients of a vector of length 1, and the length it had, ``[..., 1]``."""
    size = (vector * _applied(cosines, vector)).sum(-1, keepdim=True).clamp(min=0.0).sqrt()
    return vector * _inverse(size), size


def _moved(mean: torch.Tensor, tangent: torch.Tensor, cosines: torch.Tensor) -> torch.Tensor:
    """The exponential map: from a point of the sphere along a tangent there, by the tangent's length."""
    direction, size = _normalized(tangent, cosines)
    return size.cos() * mean + size.sin() * direction


def _placed(mean: torch.Tensor, lengths: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """From coefficients of the directions to those of the deltas, at the weighted mean of their lengths."""
    return (shares * lengths).sum(-1, keepdim=True) * mean * _inverse(lengths)


def _inverse(x: torch.Tensor) -> torch.Tensor:
    """``1 / x``, and 0 where ``x`` is 0."""
    return torch.where(x != 0, 1.0 / torch.where(x != 0, x, 1.0), 0.0)
