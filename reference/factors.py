"""Merging in ``factors`` space, entry by entry, as docs/semantics.md says it.

``merge`` with ``np.float32`` is what every backend must equal bit for bit; with ``np.float64`` it is the
same rule without rounding, the oracle of what is meant.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .numbers import magnitudes, widen
from .philox import draws

Array = NDArray[Any]
NONE_KEPT = (0x7FFFFFFF, 0)


@dataclass(frozen=True, eq=False)
class Source:
    """One input: its bits and dtype, its weight, and which of its entries are kept.

    count: keep the that many largest.  share, key: keep entries whose draw is under share (of 65536), and
    multiply them by ``rescale``.  All None: keep everything.
    """

    bits: Array
    dtype: str
    weight: float
    count: int | None = None
    share: int | None = None
    key: int | None = None
    rescale: float = 1.0


def threshold(bits: Array, count: int) -> tuple[int, int]:
    """``(thr, cut)`` of the largest magnitudes: kept where mag > thr, or mag == thr and index < cut.

    Exactly ``count`` entries are kept; among equal magnitudes the lowest flat index wins.
    """
    if count == 0:
        return NONE_KEPT
    mag = magnitudes(bits.reshape(-1))
    order = np.argsort(-mag.astype(np.int64), kind="stable")
    last = order[count - 1]
    return int(mag[last]), int(last) + 1


def kept(source: Source) -> NDArray[np.bool_]:
    """Which entries of a flat source take part."""
    flat = source.bits.reshape(-1)
    if source.count is not None:
        thr, cut = threshold(flat, source.count)
        mag = magnitudes(flat)
        return np.where(mag == thr, np.arange(flat.size) < cut, mag > thr)
    if source.share is not None and source.key is not None:
        return draws(flat.size, source.key) < source.share
    return np.ones(flat.size, dtype=bool)


@np.errstate(over="ignore", invalid="ignore")  # what overflows comes out as infinity or NaN, for all to see
def merge(sources: Sequence[Source], vote: tuple[bool, bool] | None, number: type[Any]) -> Array:
    """The merged values, flat; every operation rounds to ``number`` (float32 or float64), in source order.

    vote: None for the weighted sum; else (frequency, weighted), how signs are elected, and the result is
    the mean of the weighted entries whose own sign is the elected one (0 where none is).
    """
    size = sources[0].bits.size
    zero = np.zeros(size, dtype=number)
    total, positive, negative = zero.copy(), zero.copy(), zero.copy()
    positives, negatives = zero.copy(), zero.copy()
    result = zero.copy()
    for source in sources:
        x = widen(source.bits.reshape(-1), source.dtype).astype(number)
        if source.share is not None:
            x = x * number(source.rescale)
        x = np.where(kept(source), x, number(0))
        y = x * number(source.weight)
        if vote is None:
            result = result + y
            continue
        frequency, weighted = vote
        z = y if weighted else x
        total = total + (np.sign(z) if frequency else z)
        positive = np.where(z > 0, positive + y, positive)
        negative = np.where(z < 0, negative + y, negative)
        positives = positives + (z > 0)
        negatives = negatives + (z < 0)
    if vote is None:
        return result
    agreeing = np.where(total >= 0, positive, negative)
    count = np.where(total >= 0, positives, negatives)
    return np.asarray(agreeing / np.maximum(count, number(1)), dtype=number)
