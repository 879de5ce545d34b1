"""Merging in ``delta`` space on dense float64 matrices: slow, large, and beyond doubt."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Pair = tuple[NDArray[Any], NDArray[Any]]


def weighted_sum(pairs: Sequence[Pair], weights: Sequence[float]) -> Matrix:
    """``sum_i weights[i] * B_i @ A_i``; pairs are ``(A [rank, in], B [out, rank])``."""
    deltas = [
        w * (b.astype(np.float64) @ a.astype(np.float64)) for (a, b), w in zip(pairs, weights, strict=True)
    ]
    return np.asarray(np.sum(deltas, axis=0))


def slerp(x: Matrix, y: Matrix, t: float) -> Matrix:
    """Spherical interpolation from ``x`` (t = 0) to ``y`` (t = 1); straight where |cos| exceeds 0.9995."""
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    cosine = float((x * y).sum() / norms) if norms else 1.0
    if abs(cosine) > 0.9995:
        return (1.0 - t) * x + t * y
    angle = math.acos(cosine)
    return (math.sin((1.0 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)


def truncate(delta: Matrix, rank: int) -> tuple[Matrix, Matrix, tuple[float, float]]:
    """The best ``A [rank, in]`` and ``B [out, rank]``, and the squared norms kept and asked for."""
    left, values, right = np.linalg.svd(delta, full_matrices=False)
    k = min(rank, values.size)
    a, b = np.zeros((rank, delta.shape[1])), np.zeros((delta.shape[0], rank))
    root = np.sqrt(values[:k])
    a[:k], b[:, :k] = root[:, None] * right[:k], left[:, :k] * root
    return a, b, (float((values[:k] ** 2).sum()), float((values**2).sum()))
