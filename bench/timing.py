"""Times of several functions, taken in turn so that a machine's moods fall on all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping

REST = 0.05
"""Seconds between two runs: until then the threads of the one before may still spin for more work."""


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round, after one round that is not counted."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            time.sleep(REST)
            seconds[name].append(once(function))
    return seconds


def once(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def shown(seconds: list[float], per_second: float = 1e3, digits: int = 1) -> str:
    """The median with the fastest and the slowest, in milliseconds where nothing else is said."""
    three = min(seconds), statistics.median(seconds), max(seconds)
    low, middle, high = (f"{per_second * t:.{digits}f}" for t in three)
    return middle if len(seconds) == 1 else f"{middle} ({low}-{high})"


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster, by medians."""
    return statistics.median(slow) / statistics.median(fast)
