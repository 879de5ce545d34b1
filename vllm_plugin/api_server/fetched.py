"""Sources that requests name by a location: which ones the operator allows, and their way here.

Each is fetched once, however many requests ask, in a thread of its own beside the engine's loop.  Knows no
weights: what is here is given on as a folder.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from merged_lora.errors import AdapterError, FetchError, ForbiddenError, MergeError, NotFoundError, listed
from merged_lora.fetching.files import Bound
from merged_lora.fetching.opening import local_folder
from merged_lora.locations import SCHEMES, Location, Pattern, parse
from merged_lora.lru import Lru
from merged_lora.vllm_plugin.settings import GIB, Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

logger = logging.getLogger("vllm.merged_lora")

AT_A_TIME = 4
"""Number of fetches in progress; others wait for their turn."""
RECHECK = 300.0
"""Seconds after which a source is looked for again in its place."""
QUIET = 10.0
"""Seconds for which a fetch that failed is not tried again."""
REMEMBERED = 1024
"""Number of failures that are kept for so long."""
LASTING = (FetchError, NotFoundError, ForbiddenError, AdapterError)
"""Kinds of failures that are given again for so long."""

_COMMIT = re.compile(r"[0-9a-f]{40}")

Made = TypeVar("Made")


@dataclass(eq=False)
class Fetch(Generic[Made]):
    """A source on its way.

    location: its place.
    nbytes:   bytes that have come in.
    task:     brings it here, and makes of it what its requests wait for.
    """

    location: Location
    nbytes: int = 0
    task: asyncio.Task[Made] = field(init=False, repr=False)

    def report(self, nbytes: int) -> None:
        """Count bytes; called in the thread that fetches."""
        self.nbytes += nbytes


class Fetches(Generic[Made]):
    """The sources that are fetched for requests of one API server.

    settings: with the patterns of allowed locations, and how long a request waits.
    make:     makes a source of the folder that holds it, as long as it is called; raises MergeError if it
              cannot.
    """

    def __init__(self, settings: Settings, make: Callable[[str, Path], Awaitable[Made]]) -> None:
        self._patterns = [Pattern(text) for text in settings.allow]
        self._patience = settings.fetch_seconds
        self._most = AT_A_TIME + settings.max_waiting
        self._bound = Bound(int(settings.cache_gib * GIB), "its operator can raise --merged-lora-cache-gib")
        self._make = make
        self._turns = asyncio.Semaphore(AT_A_TIME)
        self._under_way: dict[str, Fetch[Made]] = {}
        self._looked: dict[str, float] = {}
        self._failed: Lru[str, tuple[float, type[MergeError], str]] = Lru()

    @property
    def under_way(self) -> Iterable[Fetch[Made]]:
        """The fetches that have begun or wait for their turn."""
        return list(self._under_way.values())

    def allowed(self, name: str) -> Location:
        """The location that a name is; raises ForbiddenError if the operator does not allow it."""
        location = parse(name)
        if str(location) != name:
            raise AdapterError(f"{name!r} is written {str(location)!r}")
        if not self._patterns:
            raise ForbiddenError(
                f"{name}: this server fetches no sources; its operator allows them with --merged-lora-allow"
            )
        if not any(pattern.allows(location) for pattern in self._patterns):
            patterns = listed(pattern.text for pattern in self._patterns)
            raise ForbiddenError(f"{name}: this server fetches no such source, only {patterns}")
        return location

    def is_fresh(self, name: str) -> bool:
        """Whether a source was looked for within :data:`RECHECK`, or can never change."""
        looked = self._looked.get(name)
        pinned = _COMMIT.fullmatch(parse(name).revision or "") is not None
        return looked is not None and (pinned or time.monotonic() - looked < RECHECK)

    def begin(self, name: str) -> Fetch[Made]:
        """A fetch of an allowed source, which is begun unless it is under way; raises MergeError.

        That is FetchError if too many are under way, and the same error again if a fetch has just failed.
        """
        known = self._under_way.get(name)
        if known is not None:
            return known
        location = self.allowed(name)
        failed = self._failed.get(name)
        if failed is not None and time.monotonic() - failed[0] < QUIET:
            raise failed[1](failed[2])
        if len(self._under_way) >= self._most:
            raise FetchError(
                f"{name}: {len(self._under_way)} other sources are on their way; ask again later"
            )
        fetch = self._under_way[name] = Fetch[Made](location)
        fetch.task = asyncio.create_task(self._run(name, fetch))
        fetch.task.add_done_callback(_noticed)
        return fetch

    async def wait(self, fetch: Fetch[Made], until: float | None) -> Made:
        """What was made of a source when it is here; raises MergeError.

        until: time of ``time.monotonic`` after which it is a FetchError that the source is still on its way.
        """
        left = None if until is None else max(0.0, until - time.monotonic())
        try:
            # Shielded: a client that leaves must not end the fetch for the others who wait for it.
            return await asyncio.wait_for(asyncio.shield(fetch.task), left)
        except TimeoutError:
            raise FetchError(
                f"{fetch.location}: on its way, {fetch.nbytes / 1e6:.1f} MB have come in; ask again in "
                f"{FetchError.seconds} s"
            ) from None

    def deadline(self) -> float:
        """The time of ``time.monotonic`` until which a request that comes at this moment waits."""
        return time.monotonic() + self._patience

    @asynccontextmanager
    async def folder(self, location: Location, fetch: Fetch[Made] | None = None) -> AsyncIterator[Path]:
        """The folder of an adapter, fetched in a thread; nothing removes it meanwhile.  Raises MergeError.

        A MergeError of whoever uses it becomes a FetchError if the folder was damaged, which removes it.
        """
        async with self._turns:
            held = await _in_thread(lambda: _Held(location, self._bound, fetch))
        try:
            yield held.folder
        except MergeError as error:
            await asyncio.to_thread(held.fail, error)
            raise
        finally:
            held.close()

    async def _run(self, name: str, fetch: Fetch[Made]) -> Made:
        try:
            async with self.folder(fetch.location, fetch) as folder:
                made = await self._make(name, folder)
        except LASTING as error:
            # Without the error itself, which would keep the frames that it passed.
            self._failed.add(name, (time.monotonic(), type(error), str(error)), REMEMBERED)
            if name in self._looked:
                self._looked[name] = time.monotonic()
                logger.warning("not fetched again, its copy in memory stays: %s", error)
            elif isinstance(error, FetchError):
                logger.warning("not fetched: %s", error)
            raise
        finally:
            del self._under_way[name]
        self._looked[name] = time.monotonic()
        return made


def is_location(name: str) -> bool:
    """Whether the name of a source is a location, and not that of an adapter that the server has."""
    return name.startswith(SCHEMES)


class _Held:
    """A folder that is fetched when this is made, and that nothing removes until it is closed."""

    def __init__(self, location: Location, bound: Bound, fetch: Fetch[Made] | None) -> None:
        self._holds = ExitStack()
        report = fetch.report if fetch is not None else (lambda nbytes: None)
        self.folder = self._holds.enter_context(local_folder(location, bound, report))

    def fail(self, error: MergeError) -> None:
        """Close it after an error of whoever used it; raises FetchError if the folder was damaged."""
        self._holds.__exit__(type(error), error, error.__traceback__)

    def close(self) -> None:
        self._holds.close()


async def _in_thread(work: Callable[[], _Held]) -> _Held:
    """The result of some work in a thread of its own, which keeps no process from its end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Held] = loop.create_future()

    def run() -> None:
        result: _Held | None = None
        error: BaseException | None = None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        try:
            loop.call_soon_threadsafe(finish, result, error)
        except RuntimeError:  # the loop is closed, and nobody waits any more
            if result is not None:
                result.close()

    def finish(result: _Held | None, error: BaseException | None) -> None:
        if future.cancelled():
            if result is not None:
                result.close()
        elif error is not None:
            future.set_exception(error)
        elif result is not None:
            future.set_result(result)

    threading.Thread(target=run, name="merged-lora-fetch", daemon=True).start()
    return await future


def _noticed(task: asyncio.Task[Made]) -> None:
    """Log the end of a fetch by a fault; whoever waits for it gets the error as well."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, MergeError):
        logger.error("fetching a source failed", exc_info=error)
