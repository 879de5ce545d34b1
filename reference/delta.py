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


def balanced(deltas: Sequence[Matrix], shares: Sequence[float], count: int) -> Matrix:
    """The sum of the deltas, each brought to the mean of the lengths of those that are not zero."""
    lengths = [float(np.linalg.norm(x)) for x in deltas]
    mean = sum(lengths) / max(1, sum(size > 0 for size in lengths))
    parts = [
        share * mean / size * x if size else x for x, share, size in zip(deltas, shares, lengths, strict=True)
    ]
    return np.asarray(np.sum(parts, axis=0))


MEANS = {
    "slerp": slerp,
    "karcher": karcher,
    "multislerp": multislerp,
    "model_stock": model_stock,
    "balanced": balanced,
}


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


def fitted(
    pairs: Sequence[FactorPair],
    inputs: Sequence[tuple[Matrix, Matrix, Matrix]],
    scalings: Sequence[float],
    weights: Sequence[float],
    shrink: float,
    rank: int,
) -> tuple[Matrix, Matrix, tuple[float, float]]:
    """RegMean on deltas with dense Gram matrices: the least squares fit to ``weights[i] dW_i X_i``, then cut.

    RegMean, arXiv 2212.09849.  If no source was ever reached by an input, all inputs count alike.

    pairs:    ``(A, B)`` of every source.
    inputs:   ``(values [k], vectors [k, in], rest [in])`` of every source, then of those without the module.
    scalings: of the deltas.
    weights:  of the targets.
    shrink:   share of the eigenvalues that is not moved to the diagonal.
    """
    lacking = len(inputs) - len(pairs)
    deltas = dense(pairs, scalings)
    height, width = deltas[0].shape
    deltas += [np.zeros((height, width))] * lacking
    pairs = [*pairs, *[(np.zeros((0, width)), np.zeros((height, 0)))] * lacking]
    scalings, weights = [*scalings, *[1.0] * lacking], [*weights, *[1.0] * lacking]
    grams = [
        shrink * vectors.T @ np.diag(values) @ vectors + np.diag(rest + (1.0 - shrink) * values @ vectors**2)
        for values, vectors, rest in inputs
    ]
    if not any(np.trace(gram) for gram in grams):
        grams = [np.eye(width)] * len(grams)
    total = np.sum(grams, axis=0)
    total += np.eye(width) * 1e-3 * np.trace(total) / width
    parts = list(zip(deltas, weights, grams, strict=True))
    target = np.sum([weight * delta @ gram for delta, weight, gram in parts], axis=0)
    if rank == sum(a.shape[0] for a, _ in pairs):
        each = zip(pairs, weights, scalings, grams, strict=True)
        rows = [weight * scaling * a.astype(np.float64) @ gram for (a, _), weight, scaling, gram in each]
        a = np.linalg.solve(total, np.concatenate(rows).T).T
        return a, np.concatenate([b for _, b in pairs], axis=1).astype(np.float64), (0.0, 0.0)
    root = np.linalg.cholesky(total)
    left, values, _ = np.linalg.svd(np.linalg.solve(root, target.T).T, full_matrices=False)
    left = left[:, :rank]
    a = left.T @ np.linalg.solve(total, target.T).T
    missing = rank - left.shape[1]
    a, b = np.pad(a, ((0, missing), (0, 0))), np.pad(left, ((0, 0), (0, missing)))
    return a, b, (float((values[:rank] ** 2).sum()), float((values**2).sum()))


def truncate(delta: Matrix, rank: int, flat: int | None = None) -> tuple[Matrix, Matrix, tuple[float, float]]:
    """The best ``A [rank, in]`` and ``B [out, rank]``, and the squared norms kept and asked for.

    flat: makes all singular values but zeros 1.3 times the mean of the largest ``flat`` ones.
    """
    left, values, right = np.linalg.svd(delta, full_matrices=False)
    k = min(rank, values.size)
    a, b = np.zeros((rank, delta.shape[1])), np.zeros((delta.shape[0], rank))
    lengths = values
    if flat is not None:
        lengths = np.where(values > 1e-6 * values[0], 1.3 * values[:flat].sum() / flat, 0.0)
    root = np.sqrt(lengths[:k])
    a[:k], b[:, :k] = root[:, None] * right[:k], left[:, :k] * root
    return a, b, (float((values[:k] ** 2).sum()), float((values**2).sum()))
