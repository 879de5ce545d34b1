"""Waits for asynchronous work, also in a notebook.  Knows nothing of what the work is."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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

    def interrupt(*_: object) -> None:
        if task.done():
            raise KeyboardInterrupt
        loop.call_soon_threadsafe(task.cancel)

    try:
        with _on_interrupt(interrupt), ThreadPoolExecutor(1) as thread:
            return thread.submit(loop.run_until_complete, task).result()
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        loop.close()


@contextmanager
def _on_interrupt(handler: Callable[..., object]) -> Iterator[None]:
    """Let an interrupt call this, where one would be handled at all.

    By default it is raised wherever this thread is: while it starts another one, which is then never joined,
    or while it holds a lock, which is then never released.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


async def gathered(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all the work, done at the same time; the first error ends all of it."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
