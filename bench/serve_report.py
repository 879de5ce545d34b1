"""What is computed from the times of servers: gaps between tokens, ratios with their noise, tables and aims.

It knows nothing of servers.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

from . import serve_beside
from .resampling import interval, noise, over
from .serve_beside import COLD, Watch
from .timing import Aim, ratio, spread

WARM, AGAIN, MERGED = "plain adapter", "plain adapter, once more", "merge"
SEEN, LOST = "a merge that has its slot", "a merge that lost its slot"
MEMORY, NEW = "a plain adapter that needs a slot", "a new merge"
ON, OFF = "with the plugin", "without"


@dataclass
class FirstUse:
    """Times of a model's first request and of a second one, which is warm.

    first, again: seconds of the two requests, in pairs.
    merged: milliseconds of the merge by the server's log; empty if no merge was made.
    """

    first: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    merged: list[float] = field(default_factory=list)

    @property
    def cost(self) -> list[float]:
        """Seconds by which each first request took longer than its second."""
        return [first - again for first, again in zip(self.first, self.again, strict=True)]

    @property
    def logged(self) -> str:
        """The milliseconds of the merges in a table; empty if no merge was made."""
        return spread([ms / 1e3 for ms in self.merged]) if self.merged else ""

    def line(self, case: str) -> str:
        """The row of the table."""
        cells = f"{spread(self.first):28}{spread(self.again):28}{spread(self.cost):28}{self.logged}"
        return f"  {case:52}{cells}".rstrip()


@dataclass(frozen=True)
class Arrival:
    """A request that was served while another one streamed; ``begin`` and ``end`` are in seconds."""

    case: str
    begin: float
    end: float


@dataclass
class Gaps:
    """Seconds between consecutive tokens of streams.

    quiet: gaps in which no other request was served.
    largest: by case, the largest gap that each arrival overlaps.
    merged: milliseconds of the new merges by the server's log.
    """

    quiet: list[float] = field(default_factory=list)
    largest: dict[str, list[float]] = field(default_factory=dict)
    merged: list[float] = field(default_factory=list)

    def add(self, times: Sequence[float], arrivals: Iterable[Arrival]) -> None:
        """Add a stream: the times of its tokens, and the requests that were served meanwhile."""
        gaps = list(itertools.pairwise(times))
        touched: set[int] = set()
        for arrival in arrivals:
            over = [i for i, (a, b) in enumerate(gaps) if a < arrival.end and b > arrival.begin]
            if over:
                touched.update(over)
                longest = max(gaps[i][1] - gaps[i][0] for i in over)
                self.largest.setdefault(arrival.case, []).append(longest)
        self.quiet += [b - a for i, (a, b) in enumerate(gaps) if i not in touched]

    def lines(self) -> list[str]:
        """The rows of the table."""
        return [f"  {'what arrives meanwhile':52}{'gap':28}{'slowest':10}count"] + [
            f"  {case:52}{spread(seconds):28}{1e3 * max(seconds):<10.1f}{len(seconds)}"
            for case, seconds in ({"nothing": self.quiet} | self.largest).items()
            if seconds
        ]


@dataclass
class Report:
    """Every measured time.

    warm: seconds of one token, by what was requested.
    first: first requests, by what was requested.
    gaps, speed: by server; speeds are in tokens per second.
    beside: by what others requested beside one client's stream, every round.
    """

    machine: dict[str, object]
    warm: dict[str, list[float]] = field(default_factory=dict)
    first: dict[str, FirstUse] = field(default_factory=dict)
    gaps: dict[str, Gaps] = field(default_factory=dict)
    speed: dict[str, list[float]] = field(default_factory=dict)
    beside: dict[str, list[Watch]] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """The report as values that JSON has."""
        return asdict(self) | {
            "longest gaps": {
                case: [watch.longest for watch in rounds] for case, rounds in self.beside.items()
            },
            "aims": [aim.as_json() for aim in self.aims()],
        }

    def markdown(self) -> list[str]:
        """The tables for a page: what is new, streams beside which others request it, and the aims."""
        rows = []
        if self.first:
            rows += ["| requested for the first time | adds, ms | over the load | merge, ms |"]
            rows += ["|---|---:|---:|---:|"]
            load = self.first[COLD].cost
            for case, use in self.first.items():
                relative = "" if case == COLD else over(use.cost, load)
                rows.append(f"| {case} | {spread(use.cost)} | {relative} | {use.logged} |")
            rows.append("")
        if self.beside:
            rows += [*serve_beside.markdown(self.beside), ""]
        return [
            *rows,
            *("| | measured | aim | |", "|---|---:|---:|---|"),
            *(aim.markdown() for aim in self.aims()),
        ]

    def warm_lines(self) -> list[str]:
        """The rows of the table of warm requests."""
        plain = self.warm[WARM]
        return [
            f"  {case:52}{spread(seconds):28}{'' if case == WARM else over(seconds, plain)}".rstrip()
            for case, seconds in self.warm.items()
        ]

    def speed_line(self) -> str:
        """The speed of both servers and its ratio."""
        cells = ", ".join(f"{case} {spread(self.speed[case], 1)}" for case in (ON, OFF))
        return f"  {cells}; ratio {over(self.speed[ON], self.speed[OFF])}"

    def aims(self) -> list[Aim]:
        """The aims of what was measured, each with its number."""
        limit = serve_beside.limit_of(int(str(self.machine.get("cores", 1))))
        beside = serve_beside.aims(self.beside, limit)
        return [*self._speed_aims(), *self._first_aims(), *self._gap_aims(), *beside]

    def _speed_aims(self) -> Iterator[Aim]:
        if self.speed:
            on, off = self.speed[ON], self.speed[OFF]
            limit = round(interval(off, off)[0], 3)
            what = "throughput of plain adapters, plugin on over off (1 - noise)"
            yield Aim(what, ratio(on, off), limit, at_most=False)

    def _first_aims(self) -> Iterator[Aim]:
        if not self.warm:
            return
        plain = self.warm[WARM]
        limit = round(1 + noise(self.warm[AGAIN], plain), 3)
        yield Aim(
            "a warm merge over a warm plain adapter (1 + noise)", ratio(self.warm[MERGED], plain), limit
        )
        load = statistics.median(self.first[COLD].cost)
        for case, use in self.first.items():
            if case != COLD:
                what = f"{case}: what a new merge costs, over a plain load from disk"
                yield Aim(what, statistics.median(use.cost) / load, 1.0)

    def _gap_aims(self) -> Iterator[Aim]:
        if self.gaps:
            largest, merged = self.gaps[ON].largest, statistics.median(self.gaps[ON].merged)
            growth = 1e3 * (statistics.median(largest[NEW]) - statistics.median(largest[SEEN]))
            what = "gap with a new merge less gap with one in its slot, ms; the merge"
            yield Aim(what, growth, round(merged, 1))
