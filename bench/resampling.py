"""How sure the ratio of two sets of times is, by resampling them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .timing import ratio

RESAMPLES = 2000


def over(a: Sequence[float], b: Sequence[float]) -> str:
    """The ratio of the medians with its 95 % interval."""
    low, high = interval(a, b)
    return f"{ratio(a, b):.3f} ({low:.3f}-{high:.3f})"


def interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the ratio of the medians, by resampling both with a fixed seed."""
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(np.asarray(x), (RESAMPLES, len(x))), axis=1) for x in (a, b)]
    low, high = np.percentile(medians[0] / medians[1], (2.5, 97.5))
    return float(low), float(high)


def noise(a: Sequence[float], b: Sequence[float]) -> float:
    """How far from 1 the ratio of two sets of times of the same thing may lie."""
    low, high = interval(a, b)
    return max(abs(1 - low), abs(high - 1))
