"""The workers of a server, as an API server reaches them: calls that are answered at once or asked for later.

Knows nothing of vLLM, whose calls to all workers are a function given at construction.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
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
    agreed_under,
)

logger = logging.getLogger("vllm.merged_lora")

Call = Callable[[str, tuple[Any, ...]], Awaitable[Sequence[Reply]]]
"""Calls a method of every worker of every engine; returns their replies."""
Watch = Callable[[Pending], None]
"""Called with the state of work that goes on."""

FIRST_PAUSE, LONGEST_PAUSE = 0.002, 0.25
"""Seconds between two questions about work that goes on: an eighth of what it took so far, within these."""


@dataclass
class _Awaited:
    """Work that goes on in the workers.

    watch:   called with its state whenever that is known.
    pending: its state when it was last asked for.
    began:   time at which it was begun, as ``time.monotonic`` has it.
    reply:   gets the reply of all workers when it is done.
    """

    watch: Watch
    pending: Pending
    began: float = field(default_factory=time.monotonic)
    reply: asyncio.Future[Reply] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Workers:
    """All workers of all engines.

    call: reaches them.

    Work that takes long goes on beside the engine's steps, and no call waits for it.  One call asks for all
    work of this API server, again and again, with pauses that grow as long as nothing is begun or finished.
    """

    def __init__(self, call: Call) -> None:
        self.owner = uuid.uuid4().hex
        self._call = call
        self._work: dict[str, _Awaited] = {}  # by ticket
        self._given_up: list[str] = []  # tickets that the workers do not know of yet
        self._changed = asyncio.Event()  # a new one for each task
        self._asked = 0.0  # time of the last question
        self._asking: asyncio.Task[None] | None = None

    async def capture(self, needed: Sequence[str], path: str, options: Mapping[str, Any] | None) -> Reply:
        """Copy an adapter; see :meth:`merge_worker.MergeWorker.capture`."""
        return await self._beside(CAPTURE, self.owner, needed, path, options)

    async def prepare(self, path: str, needed: Collection[str], watch: Watch) -> Reply:
        """Make a merge; see :meth:`merge_worker.MergeWorker.prepare`.

        watch: called with the state of the merge whenever it was asked for.

        If this is cancelled, the workers give the merge up, unless another API server waits for it.
        """
        return await self._beside(PREPARE, self.owner, list(needed), path, watch=watch)

    async def release(self, needed: Sequence[str]) -> Reply:
        """Drop copies; see :meth:`merge_worker.MergeWorker.release`."""
        return agreed(await self._call(RELEASE, (self.owner, needed)))

    async def replay(self, key: str, name: str, strategy: str) -> Reply:
        """Get prompts and answers; see :meth:`merge_worker.MergeWorker.replay`."""
        return agreed(await self._call(REPLAY, (key, name, strategy)))

    async def _beside(self, method: str, *arguments: Any, watch: Watch = lambda _: None) -> Reply:
        ticket = uuid.uuid4().hex
        try:
            reply = agreed(await self._call(method, (ticket, *arguments)))
            if "pending" in reply:
                self._work[ticket] = _Awaited(watch, Pending(**reply["pending"]))
                watch(self._work[ticket].pending)
                self._wake()
                reply = await self._work[ticket].reply
        except BaseException:
            self._give_up(ticket)
            raise
        finally:
            self._work.pop(ticket, None)
        if not reply["ok"]:
            self._give_up(ticket)  # what fails in one worker fails for all
        return reply

    def _give_up(self, ticket: str) -> None:
        self._given_up.append(ticket)
        self._wake()

    def _wake(self) -> None:
        if self._asking is None or self._asking.done():
            self._changed, self._asked = asyncio.Event(), time.monotonic()
            self._asking = asyncio.create_task(self._ask())
        self._changed.set()

    async def _ask(self) -> None:
        """Ask for all work until there is none; whatever else ends this is the outcome of all work."""
        try:
            while self._work or self._given_up:
                self._changed.clear()
                if self._given_up:
                    await self._cancel()
                else:
                    await self._poll()
        except BaseException as error:
            self._fail(list(self._work), error)
            raise

    async def _cancel(self) -> None:
        """Report what was given up, once: work that the workers do not hear of ends by itself."""
        tickets, self._given_up = self._given_up, []
        try:
            await self._call(CANCEL, (tickets,))
        except Exception as error:
            logger.warning("work that nobody waits for goes on: %s", error)

    async def _poll(self) -> None:
        """Ask for all work after a pause, which ends when something is begun or given up."""
        now = time.monotonic()
        shortest = min(pause(now - work.began, work.pending) for work in self._work.values())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), self._asked + shortest - now)
            return  # the pause is another one now
        tickets = list(self._work)
        try:
            replies = await self._call(POLL, (tickets,))
            self._asked = time.monotonic()
            for ticket in tickets:
                reply, work = agreed_under(ticket, replies), self._work.get(ticket)
                if work is None or work.reply.done():  # its client has left
                    continue
                if "pending" in reply:
                    work.pending = Pending(**reply["pending"])
                    work.watch(work.pending)
                else:
                    del self._work[ticket]
                    work.reply.set_result(reply)
        except Exception as error:
            self._fail(tickets, error)

    def _fail(self, tickets: Collection[str], error: BaseException) -> None:
        """Let the work under these tickets end with an error, as far as it has not ended."""
        for ticket in tickets:
            work = self._work.pop(ticket, None)
            if work is not None and not work.reply.done():
                work.reply.set_exception(error)


def pause(elapsed: float, pending: Pending) -> float:
    """Seconds until work is asked for again.

    elapsed: seconds since it was begun.
    """
    growing = max(elapsed / 8, FIRST_PAUSE)
    expected = pending.left if pending.running and pending.announced else 0.0
    return min(max(growing, expected / 2), LONGEST_PAUSE)
