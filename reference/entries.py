"""Merging entry by entry, as docs/semantics.md defines it: on factors, on deltas, or on coordinates.

Values are ``[rows, columns]`` of one dtype. On float32 values every backend must give the same bits in
factors space. On float64 values these are the same rules without rounding, the oracle of what is meant.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .philox import draws

Array = NDArray[Any]
Mask = NDArray[np.bool_]
SHARES = 65536


def largest(values: Array, count: int, skip: int = 0) -> Mask:
    """The ``count`` largest magnitudes after the ``skip`` largest; among equals the lowest index first."""
    order = np.argsort(-np.abs(values).reshape(-1), kind="stable")
    mask = np.zeros(values.size, dtype=bool)
    mask[order[skip : skip + count]] = True
    return mask.reshape(values.shape)


def keep_largest(values: Array, count: int, skip: int = 0) -> Array:
    """The ``count`` largest values after the ``skip`` largest; 0 for the others."""
    return np.where(largest(values, count, skip), values, values.dtype.type(0))


def shares(values: Array, share: int, spread: int) -> Array:
    """The share of each entry that is kept at random, in 65536ths, rising with its rank in its row."""
    columns = values.shape[-1]
    if not spread or columns == 1:
        return np.full(values.shape, share)
    descending = np.argsort(-np.abs(values), axis=-1, kind="stable")
    rank = np.empty_like(descending)
    np.put_along_axis(rank, descending, np.arange(columns - 1, -1, -1)[None, :], axis=-1)
    rise = (2 * spread * rank + (columns - 1) // 2) // (columns - 1)
    return np.asarray(np.clip(share - spread + rise, 1, SHARES))


@np.errstate(over="ignore", invalid="ignore")  # what overflows comes out as infinity or NaN, for all to see
def keep_random(values: Array, share: int, key: int, spread: int = 0) -> Array:
    """The values whose draw is under their share, divided by it; 0 for the others."""
    number = values.dtype.type
    limits = shares(values, share, spread)
    rescaled = values * (SHARES / limits).astype(np.float32).astype(number)
    drawn = draws(values.size, key).reshape(values.shape)
    return np.where(drawn < limits, rescaled, number(0))


def importance(values: Array) -> Array:
    """Magnitude times the Kullback-Leibler divergence of the row's softmax from the uniform distribution.

    Both distributions are raised by 1e-8 first, as in mergekit. The divergence is computed in float64.
    """
    powers = np.exp(values - values.max(axis=-1, keepdims=True), dtype=np.float64)
    p = powers / powers.sum(axis=-1, keepdims=True) + 1e-8
    q = 1.0 / values.shape[-1] + 1e-8
    divergence = (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    return np.asarray(np.abs(values) * np.maximum(divergence, 0.0).astype(values.dtype))


def keep_important(values: Array) -> Array:
    """The values of an importance of at least the median plus 1.5 times the interquartile range; else 0."""
    score = importance(values)
    ordered = np.sort(score, axis=None)
    lower, median, upper = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
    limit = median + values.dtype.type(1.5) * (upper - lower)
    return np.where(score < limit, values.dtype.type(0), values)  # NaN stays, for all to see


@np.errstate(over="ignore", invalid="ignore")
def keep_varied(values: Sequence[Array], count: int) -> list[Array]:
    """The values of every source, 0 outside the ``count`` entries that differ most between sources.

    The difference is the sum of squared deviations from the mean.
    """
    number = values[0].dtype.type
    mean = np.zeros(values[0].shape, dtype=number)
    for x in values:
        mean = mean + x
    mean = mean / number(len(values))
    total = np.zeros_like(mean)
    for x in values:
        total = total + (x - mean) * (x - mean)
    chosen = largest(total, count)
    return [np.where(chosen, x, number(0)) for x in values]


def energies(values: Sequence[Array]) -> list[float]:
    """Each source's share of the sum of all squares, float32 values; equal shares if all are zero.

    The squares are summed as integers, in units of 2^-62 of the largest possible sum, so that every order of
    summation gives the same.
    """
    largest_value = max(float(np.abs(x).max()) for x in values)
    exponent = math.frexp(largest_value)[1]
    bits = 62 - max(values[0].size - 1, 1).bit_length()
    totals = []
    for x in values:
        unit = np.ldexp(x.astype(np.float64), -exponent)
        totals.append(int(np.ldexp(unit * unit, bits).astype(np.int64).sum()))
    if not sum(totals):
        return [float(np.float32(1.0 / len(values)))] * len(values)
    return [float(np.float32(total / sum(totals))) for total in totals]


@np.errstate(over="ignore", invalid="ignore")
def weighted_sum(values: Sequence[Array], weights: Sequence[float]) -> Array:
    """The weighted sum, every operation rounded to the dtype of the values, in source order."""
    number = values[0].dtype.type
    result = np.zeros(values[0].shape, dtype=number)
    for x, weight in zip(values, weights, strict=True):
        result = result + x * number(weight)
    return result


@np.errstate(over="ignore", invalid="ignore")
def agreeing_mean(
    values: Sequence[Array],
    weights: Sequence[float],
    frequency: bool = False,
    weighted: bool = False,
    energy: bool = False,
) -> Array:
    """The mean of the weighted entries whose own sign is the elected one, 0 if there is none.

    frequency: elect by the count of signs instead of by the sum of values.
    weighted:  elect on weighted instead of plain values.
    energy:    weigh each source by its share of all squares instead of equally.

    Every operation rounds to the dtype of the values, in source order.
    """
    number = values[0].dtype.type
    zero = np.zeros(values[0].shape, dtype=number)
    coefficients = energies(values) if energy else [1.0] * len(values)
    total, positive, negative = zero.copy(), zero.copy(), zero.copy()
    positives, negatives = zero.copy(), zero.copy()
    for x, weight, c in zip(values, weights, coefficients, strict=True):
        y = x * number(weight)
        z = y if weighted else x
        if energy:
            y = y * number(c)
        total = total + (np.sign(z) if frequency else z)
        positive = np.where(z > 0, positive + y, positive)
        negative = np.where(z < 0, negative + y, negative)
        positives = np.where(z > 0, positives + number(c), positives)
        negatives = np.where(z < 0, negatives + number(c), negatives)
    agreeing = np.where(total >= 0, positive, negative)
    count = np.where(total >= 0, positives, negatives)
    return np.asarray(agreeing / np.where(count > 0, count, number(1)), dtype=number)
