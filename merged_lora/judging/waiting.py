"""Waits for asynchronous work, also in a notebook.  Knows nothing of what the work is."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def finished(work: Coroutine[Any, Any, T]) -> T:
    """What the work returns; an interrupt cancels it.

    A notebook runs an event loop of its own in this thread, so that the work then gets one in another.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(_run, loop, task).result()
        except KeyboardInterrupt:
            loop.call_soon_threadsafe(task.cancel)
            raise


def _run(loop: asyncio.AbstractEventLoop, task: asyncio.Task[T]) -> T:
    """Run a loop until a task is done, and close it."""
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(task)
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def gathered(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all the work, done at the same time; the first error ends all of it."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
