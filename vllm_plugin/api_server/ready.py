"""The merges that are ready on every worker, as an API server knows them: within a budget of bytes.

What this object holds is in the workers' memory: they drop what it has dropped, and nothing else.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from merged_lora.lru import Lru
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.rpc import Facts

from .replaying import Replay


@dataclass
class LiveMerge:
    """A merge that is ready.

    identity: the merge.
    facts:    what the workers reported of it.
    used:     Unix time of its last request.
    hits:     number of requests after the first.
    replay:   what its replay showed; None if it was not replayed.
    """

    identity: MergeIdentity
    facts: Facts
    used: float = field(default_factory=time.time)
    hits: int = 0
    replay: Replay | None = None


@dataclass(frozen=True)
class _Turn:
    """A merge that waits for room.

    nbytes:   bytes that it may take.
    turn:     done when they are reserved.
    seconds:  time for which it waits while nobody gets room.
    patience: ends the wait.
    """

    nbytes: int
    turn: asyncio.Future[None]
    seconds: float
    patience: asyncio.Timeout

    def wait_on(self) -> None:
        """Begin to count anew, because another one got room; nothing if the wait is over."""
        if not self.turn.done():
            self.patience.reschedule(asyncio.get_running_loop().time() + self.seconds)


class ReadyMerges:
    """Merges by digest, the least recently used first; those of requests under way stay.

    limit:   bytes in each worker that they may take together.
    most:    returns the number of merges to keep; more are kept only for requests under way.
    dropped: called with each that is dropped to make room.
    """

    def __init__(self, limit: int, most: Callable[[], int], dropped: Callable[[LiveMerge], None]) -> None:
        self.limit = limit
        self._most = most
        self._dropped = dropped
        self._merges: Lru[str, LiveMerge] = Lru()
        self._leases: Counter[str] = Counter()
        self._reserved = 0
        self._waiting: deque[_Turn] = deque()

    def __contains__(self, digest: str) -> bool:
        return digest in self._merges

    @property
    def merges(self) -> Sequence[LiveMerge]:
        """The merges, most recently used first."""
        return list(reversed(self._merges.values()))

    @property
    def digests(self) -> list[str]:
        """The digests of the merges that the workers have to keep."""
        return list(self._merges)

    @property
    def nbytes(self) -> int:
        """Bytes of the merges in each worker."""
        return sum(live.facts.nbytes for live in self._merges.values())

    @property
    def needed(self) -> int:
        """Bytes of the merges that requests use, and those reserved for merges in the making."""
        merges = self._merges.items()
        return self._reserved + sum(live.facts.nbytes for digest, live in merges if self._leases[digest])

    def use(self, digest: str) -> LiveMerge | None:
        """A merge, which is then the most recently used one; None if it is not ready."""
        return self._merges.use(digest)

    def lease(self, digest: str, request: object) -> None:
        """Keep a merge that is ready for as long as a request lives."""
        self._leases[digest] += 1
        weakref.finalize(request, self._release, digest, asyncio.get_running_loop()).atexit = False

    def _release(self, digest: str, loop: asyncio.AbstractEventLoop) -> None:
        # The last reference to a request may go in any thread.
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._returned, digest)

    def _returned(self, digest: str) -> None:
        self._leases[digest] -= 1
        if not self._leases[digest]:
            del self._leases[digest]
            self._drop_idle(0)
            self._admit()

    async def reserve(self, nbytes: int, seconds: float) -> None:
        """Wait until there is room for a merge of at most that many bytes, and reserve it.

        Who came first is served first.  Merges that no request needs make room, once that is enough.  One
        merge is let in however large it is, because a worker that cannot hold any does not start.  Raises
        TimeoutError if nobody gets room for that many seconds; then nothing is reserved.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(seconds) as patience:
                self._waiting.append(_Turn(nbytes, turn, seconds, patience))
                self._admit()
                await turn
        except BaseException:
            self.cancel(0 if turn.cancelled() else nbytes)
            raise

    def _admit(self) -> None:
        """Reserve room for those whose turn it is, as far as there is any."""
        while self._waiting:
            first = self._waiting[0]
            if not first.turn.cancelled():
                needed = self.needed
                if needed and needed + first.nbytes > self.limit:
                    return
                self._drop_idle(first.nbytes)
                self._reserved += first.nbytes
                first.turn.set_result(None)
                for other in self._waiting:
                    other.wait_on()
            self._waiting.popleft()

    def cancel(self, nbytes: int) -> None:
        """Give back what was reserved."""
        self._reserved -= nbytes
        self._admit()

    def add(self, live: LiveMerge, nbytes: int, request: object) -> None:
        """Store a merge that is ready, in the room that was reserved for it, and lease it to a request."""
        self._reserved -= nbytes
        self._merges.add(live.identity.digest, live, len(self._merges) + 1)
        self.lease(live.identity.digest, request)
        self._drop_idle(0)
        self._admit()

    def _drop_idle(self, nbytes: int) -> None:
        """Drop merges that no request needs, until the others and ``nbytes`` more fit the limits."""
        for digest in list(self._merges):
            fits = self.nbytes + self._reserved + nbytes <= self.limit
            if fits and len(self._merges) <= self._most():
                return
            if not self._leases[digest]:
                self._dropped(self._merges.pop(digest))
