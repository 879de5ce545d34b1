"""Times of functions that run in turn, so that noise affects all of them equally, and the aims for them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

REST = 0.05
"""Seconds between two runs: until then the threads of the previous one may still spin for more work."""


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round, after a round that does not count."""
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


def extremes(seconds: Sequence[float], per_second: float = 1e3, digits: int = 1) -> str:
    """The median with the fastest and the slowest, in milliseconds by default."""
    return _three((min(seconds), statistics.median(seconds), max(seconds)), per_second, digits)


def spread(seconds: Sequence[float], per_second: float = 1e3, digits: int = 1) -> str:
    """The median with the quartiles, in milliseconds by default."""
    return _three(quartiles(seconds), per_second, digits)


def _three(values: tuple[float, float, float], per_second: float, digits: int) -> str:
    low, middle, high = (f"{per_second * value:.{digits}f}" for value in values)
    return middle if values[0] == values[2] else f"{middle} ({low}-{high})"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The values below which a quarter, a half and three quarters of them lie."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times faster the second is, by medians."""
    return statistics.median(slow) / statistics.median(fast)


@dataclass(frozen=True)
class Aim:
    """A limit for a measured number, which is an upper one if ``at_most``."""

    what: str
    measured: float
    aim: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        """Whether the number is within the limit."""
        return self.measured <= self.aim if self.at_most else self.measured >= self.aim

    def line(self) -> str:
        """The aim as a row of a table."""
        return f"  {self._verdict:8}{self.what}: {self.measured:.3g}, aim {self._limit}"

    def markdown(self) -> str:
        """The aim as a row of a page's table: what, measured, aim, and whether it is met."""
        return f"| {self.what} | {self.measured:.3g} | {self._limit} | {self._verdict} |"

    @property
    def _limit(self) -> str:
        return f"at {'most' if self.at_most else 'least'} {self.aim:g}"

    @property
    def _verdict(self) -> str:
        return "MET" if self.met else "MISSED"

    def as_json(self) -> dict[str, object]:
        """The aim as values that JSON has."""
        return asdict(self) | {"met": self.met}
