"""Work for which nobody asks any more, because its API server was killed.

Knows nothing of work but its tickets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

SILENT = 30.0
"""Seconds after which work that was not asked for is given up.  API servers ask for all their work at once,
at least four times a second between two steps."""
STRIDE = 1.0
"""Longest time between two questions that counts, in seconds.  A step of the engine lets no question through,
however long it takes, and those of all API servers come after it."""


class Silence:
    """How long the API servers have not asked for the work that they have begun.

    clock: the time in seconds.

    Time passes here with the questions of any API server, at most STRIDE from one to the next.  So work is
    only given up if at least SILENT / STRIDE questions about other work were heard since the last one about
    it, and never as long as nobody else waits for anything.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()  # when a question was heard
        self._passed = 0.0  # seconds that count
        self._asked: dict[str, float] = {}  # by ticket, the seconds that had passed when it was asked for

    def heard(self, tickets: Collection[str], begun: Collection[str]) -> list[str]:
        """The tickets that nobody asks for any more.

        tickets: those that are asked for now.
        begun:   those of all work that goes on; what is new among them counts as asked for.
        """
        now = self._clock()
        self._passed += min(now - self._last, STRIDE)
        self._last = now
        known = dict.fromkeys(tickets, self._passed)
        self._asked = {t: known.get(t, self._asked.get(t, self._passed)) for t in begun}
        return [ticket for ticket, asked in self._asked.items() if self._passed - asked > SILENT]
