"""Times of several functions, taken in turn so that a machine's moods fall on all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The values below which a quarter, a half and three quarters of them lie."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def spread(seconds: list[float], per_second: float = 1e3, digits: int = 1) -> str:
    """The median with the quartiles, in milliseconds where nothing else is said."""
    low, middle, high = (f"{per_second * t:.{digits}f}" for t in quartiles(seconds))
    return middle if len(seconds) == 1 else f"{middle} ({low}-{high})"


@dataclass(frozen=True)
class Aim:
    """What a measured number should be: at most or at least so much."""

    what: str
    measured: float
    aim: float
    at_most: bool

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.measured <= self.aim if self.at_most else self.measured >= self.aim

    def line(self) -> str:
        """The aim as a row of a table."""
        limit = f"at {'most' if self.at_most else 'least'} {self.aim:g}"
        return f"  {'met' if self.met else 'MISSED':8}{self.what}: {self.measured:.3g}, aim {limit}"
