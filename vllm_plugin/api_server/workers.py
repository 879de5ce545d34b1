"""The workers of a server, as an API server reaches them: calls that are answered at once or asked for later.

Knows nothing of vLLM, whose calls to all workers are a function given at construction.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

from merged_lora.vllm_plugin.rpc import (
    CANCEL,
    CAPTURE,
    POLL,
    PREPARE,
    RELEASE,
    REPLAY,
    Pending,
    Reply,
    agreed,
)

Call = Callable[[str, tuple[Any, ...]], Awaitable[Sequence[Reply]]]
"""Calls a method of every worker of every engine; returns their replies."""
Watch = Callable[[Pending], None]
"""Called with the state of work that goes on."""

FIRST_PAUSE, LONGEST_PAUSE = 0.002, 0.25
"""Seconds between two questions about work that goes on: an eighth of what it took so far, within these."""


class Workers:
    """All workers of all engines.

    call: reaches them.

    Work that takes long goes on beside the engine's steps, and no call waits for it.  It is asked for again
    and again, with growing pauses.
    """

    def __init__(self, call: Call) -> None:
        self.owner = uuid.uuid4().hex
        self._call = call
        self._cancelling: set[asyncio.Task[Sequence[Reply]]] = set()  # so that nobody collects them

    async def capture(self, needed: Sequence[str], path: str, options: Mapping[str, Any] | None) -> Reply:
        """Copy an adapter; see :meth:`merge_worker.MergeWorker.capture`."""
        return await self._beside(CAPTURE, self.owner, needed, path, options)

    async def prepare(self, path: str, merges: Collection[str], watch: Watch) -> Reply:
        """Make a merge; see :meth:`merge_worker.MergeWorker.prepare`.

        watch: called with the state of the merge whenever it was asked for.

        If this is cancelled, the workers give the merge up, unless another API server waits for it.
        """
        return await self._beside(PREPARE, self.owner, list(merges), path, watch=watch)

    async def release(self, needed: Sequence[str], merges: Collection[str] | None = None) -> Reply:
        """Drop copies and merges; see :meth:`merge_worker.MergeWorker.release`."""
        given = None if merges is None else list(merges)
        return agreed(await self._call(RELEASE, (self.owner, needed, given)))

    async def replay(self, key: str, name: str, strategy: str) -> Reply:
        """Get prompts and answers; see :meth:`merge_worker.MergeWorker.replay`."""
        return agreed(await self._call(REPLAY, (key, name, strategy)))

    async def _beside(self, method: str, *arguments: Any, watch: Watch = lambda _: None) -> Reply:
        ticket, start = uuid.uuid4().hex, time.monotonic()
        try:
            replies = await self._call(method, (ticket, *arguments))
            while True:
                reply = agreed(replies)
                if "pending" not in reply:
                    break
                pending = Pending(**reply["pending"])
                watch(pending)
                await asyncio.sleep(pause(time.monotonic() - start, pending))
                replies = await self._call(POLL, (ticket,))
        except BaseException:
            self._give_up(ticket)
            raise
        if not reply["ok"]:
            self._give_up(ticket)  # what fails in one worker fails for all
        return reply

    def _give_up(self, ticket: str) -> None:
        task = asyncio.create_task(self._cancel(ticket))
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    async def _cancel(self, ticket: str) -> Sequence[Reply]:
        return await self._call(CANCEL, (ticket,))


def pause(elapsed: float, pending: Pending) -> float:
    """Seconds until work is asked for again.

    elapsed: seconds since it was begun.
    """
    growing = max(elapsed / 8, FIRST_PAUSE)
    expected = pending.left if pending.running and pending.announced else 0.0
    return min(max(growing, expected / 2), LONGEST_PAUSE)
