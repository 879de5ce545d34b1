"""Merging entry by entry, as docs/semantics.md says it: on factors, on deltas, or on coordinates.

``merge`` with ``np.float32`` is what every backend must equal bit for bit on factors; with ``np.float64`` it
is the same rule without rounding, the oracle of what is meant.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .philox import draws

Array = NDArray[Any]
Mask = NDArray[np.bool_]
SHARES = 65536


@dataclass(frozen=True, eq=False)
class Source:
    """One input: its values ``[rows, columns]``, its weight, and which of its entries are kept.

    count, skip: keep the ``count`` largest after the ``skip`` largest.
    share, key, spread: keep entries whose draw is under their share (of 65536), and divide them by it; the
    share rises from ``share - spread`` for the smallest entry of a row to ``share + spread``.
    All None: keep everything.
    """

    values: Array
    weight: float
    count: int | None = None
    share: int | None = None
    key: int | None = None
    skip: int = 0
    spread: int = 0


def largest(values: Array, count: int, skip: int = 0) -> Mask:
    """The ``count`` largest magnitudes after the ``skip`` largest; among equals the lowest index first."""
    order = np.argsort(-np.abs(values).reshape(-1), kind="stable")
    mask = np.zeros(values.size, dtype=bool)
    mask[order[skip : skip + count]] = True
    return mask.reshape(values.shape)


def shares(source: Source) -> Array:
    """The share of each entry of a source that is kept at random, in 65536ths."""
    assert source.share is not None
    columns = source.values.shape[-1]
    if not source.spread or columns == 1:
        return np.full(source.values.shape, source.share)
    descending = np.argsort(-np.abs(source.values), axis=-1, kind="stable")
    rank = np.empty_like(descending)
    np.put_along_axis(rank, descending, np.arange(columns - 1, -1, -1)[None, :], axis=-1)
    rise = (2 * source.spread * rank + (columns - 1) // 2) // (columns - 1)
    return np.asarray(np.clip(source.share - source.spread + rise, 1, SHARES))


def kept(source: Source) -> Mask:
    """Which entries of a source take part."""
    if source.count is not None:
        return largest(source.values, source.count, source.skip)
    if source.share is not None and source.key is not None:
        drawn = draws(source.values.size, source.key).reshape(source.values.shape)
        return np.asarray(drawn < shares(source))
    return np.ones(source.values.shape, dtype=bool)


def varied(values: Sequence[Array], count: int, number: type[Any]) -> Mask:
    """The ``count`` entries that differ most between sources, by the sum of squared deviations."""
    mean = np.zeros(values[0].shape, dtype=number)
    for x in values:
        mean = mean + x
    mean = mean / number(len(values))
    total = np.zeros_like(mean)
    for x in values:
        total = total + (x - mean) * (x - mean)
    return largest(total, count)


def energies(values: Sequence[Array]) -> list[float]:
    """Each source's share of the sum of all squares, float32 values; equal shares where all are zero.

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


@np.errstate(over="ignore", invalid="ignore")  # what overflows comes out as infinity or NaN, for all to see
def merge(
    sources: Sequence[Source],
    vote: tuple[bool, bool, bool] | None,
    number: type[Any],
    select: int | None = None,
) -> Array:
    """The merged values; every operation rounds to ``number`` (float32 or float64), in source order.

    vote: None for the weighted sum; else (frequency, weighted, energy): how signs are elected, and the result
    is the mean of the weighted entries whose own sign is the elected one (0 where none is), with ``energy``
    weighed by each source's share of all squares.  select: keep only that many entries, the most varied.
    """
    values = []
    for source in sources:
        x = source.values.astype(number)
        if source.share is not None:
            x = x * (SHARES / shares(source)).astype(np.float32).astype(number)
        values.append(np.where(kept(source), x, number(0)))
    if select is not None:
        chosen = varied(values, select, number)
        values = [np.where(chosen, x, number(0)) for x in values]
    zero = np.zeros(values[0].shape, dtype=number)
    if vote is None:
        result = zero
        for source, x in zip(sources, values, strict=True):
            result = result + x * number(source.weight)
        return result
    frequency, weighted, energy = vote
    coefficients = energies(values) if energy else [1.0] * len(values)
    total, positive, negative = zero.copy(), zero.copy(), zero.copy()
    positives, negatives = zero.copy(), zero.copy()
    for source, x, c in zip(sources, values, coefficients, strict=True):
        y = x * number(source.weight)
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
