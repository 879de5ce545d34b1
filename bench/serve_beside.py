"""What is computed of one client's stream while others request what is new: gaps, speed, tables and aims.

It knows nothing of servers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .resampling import over
from .timing import Aim, ratio, spread

COLD = "plain adapter from disk, server without the plugin"
CROWD = "new merges of ten clients at once"
QUIET = "nothing"
QUIET_SECONDS = 20.0
QUIET_LONG = f"nothing for {QUIET_SECONDS:g} s"
"""What the machine does to a stream on its own, in as long a time as a slow merge takes."""

SPARE_CORES = 4
"""Cores from which on a machine has some to spare for a merge beside a server's steps."""


def limit_of(cores: int) -> float:
    """The most that the longest gap may be, over that with a plain adapter's first request instead."""
    return 1.2 if cores >= SPARE_CORES else 2.0


@dataclass
class Watch:
    """One client's stream, and what others requested beside it, all at the time 0.

    times: seconds at which the stream's tokens arrived, negative before the requests.
    models: what was requested, each for one token.
    first_token: seconds until each request that was served had its token.
    end: seconds until the last request was served or had failed.
    failed: by what was requested, the error of each request that was not served.
    merged: milliseconds of the merges by the server's log.
    """

    times: list[float]
    models: list[str]
    first_token: list[float]
    end: float
    failed: dict[str, str] = field(default_factory=dict)
    merged: list[float] = field(default_factory=list)

    @property
    def longest(self) -> float:
        """Seconds of the longest gap between two tokens that touches the time from 0 to the end.

        The gap under way at the end counts as a whole.
        """
        return max(self._during())

    @property
    def longest_before(self) -> float:
        """Seconds of the longest gap between two tokens before the requests."""
        return max(self._before())

    @property
    def pace(self) -> float:
        """Tokens per second in the gaps that count, over those before."""
        during, before = self._during(), self._before()
        return len(during) / sum(during) / (len(before) / sum(before))

    def _during(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.times) if a < self.end and b > 0]

    def _before(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.times) if b <= 0]


Watches = Mapping[str, Sequence[Watch]]
"""By what was requested, every round."""


def lines(watches: Watches) -> list[str]:
    """The rows of the table, in milliseconds, with the number of rounds."""
    columns = ("longest gap", "worst", "over a plain adapter's", "speed", "first token", "merged in")
    widths = (52, 4, 28, 10, 28, 18, 28, 0)
    return [
        "  " + "".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (("what others request", "n", *columns), *_rows(watches))
    ]


def markdown(watches: Watches) -> list[str]:
    """The same table for a page."""
    columns = ("longest gap, ms", "worst", "over a plain adapter's", "speed", "first token, ms", "merge, ms")
    return [
        f"| what others request | rounds | {' | '.join(columns)} |",
        "|---|" + "---:|" * (1 + len(columns)),
        *(f"| {' | '.join(row)} |" for row in _rows(watches)),
    ]


def aims(watches: Watches, limit: float) -> Iterator[Aim]:
    """The aims of what was measured.

    limit: the most that the longest gap may be, over that with a plain adapter's first request.
    """
    for case, rounds in watches.items():
        if case not in (COLD, QUIET_LONG):
            what = f"{case}: longest gap of a stream, over a plain adapter's first request"
            yield Aim(what, ratio(_longest(rounds), _longest(watches[COLD])), limit)
    if CROWD in watches:
        served = min(len(watch.first_token) for watch in watches[CROWD])
        clients = len(watches[CROWD][0].models)
        yield Aim(f"{CROWD}: served in the worst round", served, clients, at_most=False)


def _longest(rounds: Sequence[Watch]) -> list[float]:
    return [watch.longest for watch in rounds]


def _rows(watches: Watches) -> Iterator[tuple[str, ...]]:
    """The case, the number of rounds and the other cells of every row."""
    quiet = [watch.longest_before for rounds in watches.values() for watch in rounds]
    yield QUIET, str(len(quiet)), spread(quiet), f"{1e3 * max(quiet):.1f}", "", "", "", ""
    for case, rounds in watches.items():
        longest = _longest(rounds)
        first_token = [seconds for watch in rounds for seconds in watch.first_token]
        merged = [ms / 1e3 for watch in rounds for ms in watch.merged]
        yield (
            case,
            str(len(rounds)),
            spread(longest),
            f"{1e3 * max(longest):.1f}",
            "" if case == COLD else over(longest, _longest(watches[COLD])),
            spread([watch.pace for watch in rounds], 1, 2),
            spread(first_token) if first_token else "",
            spread(merged) if merged else "",
        )
