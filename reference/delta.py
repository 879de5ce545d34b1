"""Merging deltas as dense float64 matrices: slow, large, and beyond doubt."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
FactorPair = tuple[NDArray[Any], NDArray[Any]]
ORDERING = 2.0**-30
SWEEPS = 1


def dense(pairs: Sequence[FactorPair], weights: Sequence[float]) -> list[Matrix]:
    """``weights[i] * B_i @ A_i`` of every source.

    pairs:   ``(A [rank, in], B [out, rank])`` of every source.
    weights: one per source.
    """
    return [
        w * (b.astype(np.float64) @ a.astype(np.float64)) for (a, b), w in zip(pairs, weights, strict=True)
    ]


def slerp(deltas: Sequence[Matrix], shares: Sequence[float], count: int) -> Matrix:
    """Spherical interpolation of two deltas, in a straight line if |cos| exceeds 0.9995.

    shares: ``(1 - t, t)``.
    """
    x, y = deltas
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    cosine = float((x * y).sum() / norms) if norms else 1.0
    if abs(cosine) > 0.9995:
        return shares[0] * x + shares[1] * y
    angle = math.acos(cosine)
    return (math.sin(shares[0] * angle) * x + math.sin(shares[1] * angle) * y) / math.sin(angle)


def karcher(deltas: Sequence[Matrix], shares: Sequence[float], count: int) -> Matrix:
    """The point of the sphere whose mean tangent towards the directions is zero, at the mean length."""
    length = sum(w * np.linalg.norm(x) for x, w in zip(deltas, shares, strict=True))
    units = [(x / np.linalg.norm(x), w) for x, w in zip(deltas, shares, strict=True) if np.linalg.norm(x)]
    if not units:
        return deltas[0]
    total = sum(w for _, w in units)
    mean = np.sum([w * x for x, w in units], axis=0)
    mean = units[0][0] if np.linalg.norm(mean) < 1e-12 else mean / np.linalg.norm(mean)
    for _ in range(100):
        tangent = np.zeros_like(mean)
        for x, w in units:
            cosine = float(np.clip((mean * x).sum(), -1.0, 1.0))
            chord = x - cosine * mean
            size = float(np.linalg.norm(chord))
            if size > 1e-14:
                tangent += w / total * math.acos(cosine) * chord / size
        size = float(np.linalg.norm(tangent))
        if size < 1e-13:
            break
        mean = math.cos(size) * mean + math.sin(size) * tangent / size
        mean /= np.linalg.norm(mean)
    return np.asarray(length * mean)


def multislerp(deltas: Sequence[Matrix], shares: Sequence[float], count: int) -> Matrix:
    """From the weighted mean of the directions along the weighted mean of the chords, at the mean length."""
    lengths = [float(np.linalg.norm(x)) for x in deltas]
    units = [x / size if size else x for x, size in zip(deltas, lengths, strict=True)]
    mean = np.sum([w * x for x, w in zip(units, shares, strict=True)], axis=0)
    if np.linalg.norm(mean) < 1e-12:
        return np.asarray(np.sum([w * x for x, w in zip(deltas, shares, strict=True)], axis=0))
    mean /= np.linalg.norm(mean)
    chords = [w * (x - (x * mean).sum() * mean) for x, w in zip(units, shares, strict=True)]
    tangent = np.sum(chords, axis=0)
    size = float(np.linalg.norm(tangent))
    moved = math.cos(size) * mean + (math.sin(size) * tangent / size if size else 0.0)
    return np.asarray(sum(w * n for w, n in zip(shares, lengths, strict=True)) * moved)


def model_stock(deltas: Sequence[Matrix], shares: Sequence[float], count: int) -> Matrix:
    """The weighted mean times ``N cos / (1 + (N - 1) cos)``; cos is 0 for a source that lacks the delta."""
    cosines = 0.0
    for i, x in enumerate(deltas):
        for y in deltas[:i]:
            norms = np.linalg.norm(x) * np.linalg.norm(y)
            cosines += float((x * y).sum() / norms) if norms else 0.0
    cosine = cosines / (count * (count - 1) / 2)
    below = 1.0 + (count - 1) * cosine
    factor = count * cosine / below if abs(below) >= 1e-6 else 0.0
    return np.asarray(factor * np.sum([w * x for x, w in zip(deltas, shares, strict=True)], axis=0))


MEANS = {"slerp": slerp, "karcher": karcher, "multislerp": multislerp, "model_stock": model_stock}


def output_basis(deltas: Sequence[Matrix], rows: int) -> Matrix:
    """Left singular vectors ``[out, rows]`` of all deltas side by side, zeros beyond their rank (KnOTS)."""
    weighted = [math.sqrt(1.0 + i * ORDERING) * x for i, x in enumerate(deltas)]
    left, values, _ = np.linalg.svd(np.concatenate(weighted, axis=1), full_matrices=False)
    return np.where(values > 1e-7 * values[0], left, 0.0)[:, :rows]


def both_bases(deltas: Sequence[Matrix], rank: int) -> tuple[Matrix, Matrix]:
    """Bases ``[out, rank]`` and ``[in, rank]`` of all deltas at length 1 (Compress then Merge)."""
    lengths = [float(np.linalg.norm(x)) for x in deltas]
    even = [x / size if size else x for x, size in zip(deltas, lengths, strict=True)]
    even = [math.sqrt(1.0 + i * ORDERING) * x for i, x in enumerate(even)]

    def leading(parts: Sequence[Matrix]) -> Matrix:
        return np.linalg.svd(np.concatenate(parts, axis=1), full_matrices=False)[0][:, :rank]

    left, right = leading(even), leading([x.T for x in even])
    for _ in range(SWEEPS):
        left = leading([x @ right for x in even])
        right = leading([x.T @ left for x in even])
    return left, right


def truncate(delta: Matrix, rank: int) -> tuple[Matrix, Matrix, tuple[float, float]]:
    """The best ``A [rank, in]`` and ``B [out, rank]``, and the squared norms kept and asked for."""
    left, values, right = np.linalg.svd(delta, full_matrices=False)
    k = min(rank, values.size)
    a, b = np.zeros((rank, delta.shape[1])), np.zeros((delta.shape[0], rank))
    root = np.sqrt(values[:k])
    a[:k], b[:, :k] = root[:, None] * right[:k], left[:, :k] * root
    return a, b, (float((values[:k] ** 2).sum()), float((values**2).sum()))
