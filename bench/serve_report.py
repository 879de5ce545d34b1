"""What the times of servers come to: gaps between tokens, ratios with their noise, the tables and the aims.

Knows nothing of servers.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from .timing import Aim, ratio, spread

RESAMPLED = 2000

WARM, AGAIN, MERGED = "plain adapter", "plain adapter, once more", "merge"
COLD = "plain adapter from disk, server without the plugin"
SEEN, LOST = "a merge that has its slot", "a merge that lost its slot, and is made again"
MEMORY, NEW = "a plain adapter that needs a slot", "a new merge"
ON, OFF = "with the plugin", "without"


@dataclass
class FirstUse:
    """What is asked for the first time, and then again, by case.

    first, again: seconds of either request, in pairs.  merged: milliseconds by the server's log, where the
    first was a merge.
    """

    case: str
    first: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    merged: list[float] = field(default_factory=list)

    @property
    def cost(self) -> list[float]:
        """What the first use took longer, pair by pair."""
        return [first - again for first, again in zip(self.first, self.again, strict=True)]

    def line(self) -> str:
        """The row of the table."""
        logged = spread([ms / 1e3 for ms in self.merged]) if self.merged else ""
        cells = f"{spread(self.first):28}{spread(self.again):28}{spread(self.cost):28}{logged}"
        return f"  {self.case:52}{cells}".rstrip()


@dataclass(frozen=True)
class Arrival:
    """A request that came while another one streamed: what it asked for, from when to when it was served."""

    case: str
    begin: float
    end: float


@dataclass
class Gaps:
    """Seconds between the tokens of streams, told apart by what arrived meanwhile.

    quiet: with nothing under way but the stream.  largest: of those that an arrival fell into or that passed
    while it was served, one per arrival, by its case.  merged: milliseconds of the new merges, by the
    server's log.
    """

    quiet: list[float] = field(default_factory=list)
    largest: dict[str, list[float]] = field(default_factory=dict)
    merged: list[float] = field(default_factory=list)

    def add(self, times: Sequence[float], arrivals: Iterable[Arrival]) -> None:
        """Take in one stream: when its tokens came, and what arrived meanwhile."""
        gaps = list(itertools.pairwise(times))
        touched: set[int] = set()
        for arrival in arrivals:
            over = [i for i, (a, b) in enumerate(gaps) if a < arrival.end and b > arrival.begin]
            if over:
                touched.update(over)
                longest = max(gaps[i][1] - gaps[i][0] for i in over)
                self.largest.setdefault(arrival.case, []).append(longest)
        self.quiet += [b - a for i, (a, b) in enumerate(gaps) if i not in touched]

    def grows_by(self, case: str, over: str) -> float:
        """Seconds by which the largest gap is longer than that of another case, by medians."""
        return statistics.median(self.largest[case]) - statistics.median(self.largest[over])

    def lines(self) -> list[str]:
        """The rows of the table."""
        rows = {"nothing": self.quiet} | self.largest
        head = f"  {'what arrives meanwhile':52}{'gap':28}{'slowest':10}count"
        return [
            head,
            *(
                f"  {case:52}{spread(seconds):28}{1e3 * max(seconds):<10.1f}{len(seconds)}"
                for case, seconds in rows.items()
                if seconds
            ),
        ]


@dataclass
class Report:
    """Every time that was measured.

    warm: seconds of one token, by what was asked.  speed: tokens per second, by server.
    """

    machine: dict[str, object]
    warm: dict[str, list[float]] = field(default_factory=dict)
    first: dict[str, FirstUse] = field(default_factory=dict)
    gaps: dict[str, Gaps] = field(default_factory=dict)
    speed: dict[str, list[float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """Everything, ready for JSON."""
        return asdict(self) | {"aims": [asdict(aim) | {"met": aim.met} for aim in self.aims()]}

    def warm_lines(self) -> list[str]:
        """One token of a plain adapter, of the same again, and of a merge."""
        plain = self.warm[WARM]
        lines = []
        for case, seconds in self.warm.items():
            shown = "" if case == WARM else f"{ratio(seconds, plain):.3f} ({bounds(seconds, plain)})"
            lines.append(f"  {case:52}{spread(seconds):28}{shown}".rstrip())
        return lines

    def speed_line(self) -> str:
        """The speed of both servers and its ratio."""
        on, off = self.speed[ON], self.speed[OFF]
        cells = ", ".join(f"{case} {spread(self.speed[case], 1)}" for case in (ON, OFF))
        return f"  {cells}; ratio {ratio(on, off):.3f} ({bounds(on, off)})"

    def aims(self) -> list[Aim]:
        """What was aimed at, and what came of it."""
        plain = self.warm[WARM]
        limit = round(1 + noise(self.warm[AGAIN], plain), 3)
        aims = [
            Aim(
                "a warm merge over a warm plain adapter (1 + noise)",
                ratio(self.warm[MERGED], plain),
                limit,
                True,
            )
        ]
        cold = self.first[COLD]
        load = statistics.median(cold.cost)
        for case, use in self.first.items():
            if case != COLD:
                what = f"{case}: what a new merge costs, over a plain load from disk"
                aims.append(Aim(what, statistics.median(use.cost) / load, 1.0, True))
        on = self.gaps[ON]
        longest = round(statistics.median(on.merged), 1)
        growth = 1e3 * on.grows_by(NEW, SEEN)
        aims.append(
            Aim("gap with a new merge less gap with one in its slot, ms; the merge", growth, longest, True)
        )
        return aims


def bounds(slow: Sequence[float], fast: Sequence[float]) -> str:
    """The interval of :func:`interval` in words."""
    low, high = interval(slow, fast)
    return f"{low:.3f}-{high:.3f}"


def interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Where the ratio of the medians lies, to 95 %, by resampling either with a fixed seed."""
    rng = np.random.default_rng(0)
    medians = [
        np.median(rng.choice(np.asarray(values), (RESAMPLED, len(values))), axis=1) for values in (a, b)
    ]
    low, high = np.percentile(medians[0] / medians[1], (2.5, 97.5))
    return float(low), float(high)


def noise(a: Sequence[float], b: Sequence[float]) -> float:
    """How far from 1 the ratio of two sets of times of the same thing may lie."""
    low, high = interval(a, b)
    return max(abs(1 - low), abs(high - 1))


def merge_milliseconds(log: str) -> dict[str, float]:
    """Canonical spec to the time of its merge, as the server's log has it."""
    found = re.findall(r"merged spec='([^']*)' .* ms=([0-9.]+)", log)
    return {spec: float(ms) for spec, ms in found}
