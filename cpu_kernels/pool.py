"""A pool of threads, each with torch limited to one core. Knows nothing of merges.

Work is handed out by the thread that asks for it, as much at a time as there are threads and no more. So a
caller that pauses or raises between two pieces of its work stops all of it, and work that it begins meanwhile
does not wait behind the rest of the first.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from merged_lora.backends import Progress
from merged_lora.cores import raise_nice, usable_cores

Integers = NDArray[np.int64]
Item = TypeVar("Item")
Made = TypeVar("Made")

BATCHES_PER_CORE = 4  # enough to even out the load, few enough that handing them out costs nothing
BATCH_COST = 8 << 20  # of a batch at most, in entries; about 10 ms
EXIT_SECONDS = 1.0  # that the end of the process waits for what runs

_Task = Callable[[], None]


class Pool:
    """Runs compiled loops and torch operations on threads of its own, until the process ends.

    Once the main thread has ended, no more work is handed out: whoever asks for it gets a RuntimeError.  The
    interpreter waits at most EXIT_SECONDS for work that runs by then.

    threads: number of threads; by default one for each core that the process can keep busy.
    nice:    nice value of each, 0 to 19; the process's own if that is larger.
    """

    def __init__(self, threads: int | None = None, nice: int = 0) -> None:
        self.confined = threads is not None
        self.cores = threads or usable_cores()
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._callers: list[threading.Thread] = []
        members = _start(self.cores, nice, self._tasks)
        # Threads that come back from C++ into an interpreter that is being torn down abort the process, so
        # they end before; this runs at exit, too.
        weakref.finalize(self, _dismiss, self._tasks, members, self._callers)

    @contextlib.contextmanager
    def lasting(self) -> Iterator[None]:
        """If the process ends while this lasts, it waits for the end of the calling thread, too."""
        caller = threading.current_thread()
        self._callers.append(caller)
        try:
            yield
        finally:
            if not _exiting():  # otherwise until the thread has ended, not only this
                self._callers.remove(caller)

    def each(
        self,
        function: Callable[[Item], Made],
        items: Sequence[Item],
        /,
        finished: Callable[[Item], object] = lambda _: None,
    ) -> list[Made]:
        """The results of a function for every item, in the inference mode of the caller.

        The function must not use the pool.  If it raises, or ``finished`` does, no further item is begun, and
        the exception leaves when the items that were begun are done.

        finished: called with every item that is done, in the caller's thread.  It may use the pool.
        """
        # The mode is a thread's own, and tensors made in it, as in a server, must not be written to outside.
        mode = torch.is_inference_mode_enabled()
        made: dict[int, Made] = {}
        done: SimpleQueue[tuple[int, BaseException | None]] = SimpleQueue()

        def run(index: int) -> None:
            try:
                with torch.inference_mode(mode):
                    made[index] = function(items[index])
            except BaseException as error:
                done.put((index, error))
            else:
                done.put((index, None))

        begun = running = 0
        try:
            while begun < len(items) or running:
                while begun < len(items) and running < self.cores:
                    check_exit()
                    self._tasks.put(functools.partial(run, begun))
                    begun += 1
                    running += 1
                index, error = done.get()
                running -= 1
                if error is not None:
                    try:
                        raise error
                    finally:
                        del error  # its traceback holds this frame
                finished(items[index])
        finally:
            for _ in range(running):
                done.get()
        return [made[index] for index in range(len(items))]

    def run(self, cost: Integers, work: Callable[[Integers], None], progress: Progress) -> None:
        """Call ``work`` on batches of item indices of about equal cost; stops as :meth:`each` does.

        cost:     of every item ``[n]``, in entries.
        work:     takes the indices of a batch.
        progress: called with the number of items of each finished batch.
        """
        batch_count = max(self.cores * BATCHES_PER_CORE, -(-int(cost.sum()) // BATCH_COST))
        count = min(len(cost), batch_count)
        shares: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, i) for i in range(count)]
        for item, size in zip(*_descending(cost), strict=True):
            load, lightest = loads[0]
            shares[lightest].append(item)
            heapq.heapreplace(loads, (load + size, lightest))
        self.each(work, [np.array(share) for share in shares], lambda share: progress(len(share)))


def batches(items: Iterable[Item], nbytes: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Items in their order, in lists of at most ``limit`` bytes, or of a single item if that has more."""
    batch: list[Item] = []
    size = 0
    for item in items:
        here = nbytes(item)
        if batch and size + here > limit:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += here
    if batch:
        yield batch


def _descending(cost: Integers) -> tuple[list[int], list[int]]:
    """The indices of items from the most costly to the least, and their costs."""
    order = np.argsort(-cost, kind="stable")
    return order.tolist(), cost[order].tolist()


def check_exit() -> None:
    """Raise RuntimeError if the process is ending; long work calls this between its parts."""
    if _exiting():
        raise RuntimeError("nothing can be merged any more: the process is ending")


def _exiting() -> bool:
    """Whether the interpreter waits for the last threads, or calls its exit handlers already."""
    return not threading.main_thread().is_alive()


def _start(count: int, nice: int, tasks: SimpleQueue[_Task | None]) -> list[threading.Thread]:
    """Threads that run tasks until they take None; torch is limited to one core inside each.

    With more, torch's helpers of every thread would spin on the cores that the other threads need.
    """
    # A thread inherits the most recently set value at its first torch call. So every thread is forced to make
    # that call before any other sets its own value, and then the caller's value is restored.
    # vLLM's CPU build replaces torch.set_num_threads by a function that does nothing.
    before = torch.get_num_threads()
    started = threading.Barrier(count + 1)

    def work() -> None:
        try:
            if nice:
                raise_nice(nice)
            torch._C.set_num_threads(1)
            torch.get_num_threads()
        except BaseException:
            started.abort()  # or who starts it would wait forever
            raise
        started.wait()
        while (task := tasks.get()) is not None:
            task()
            del task  # and what it holds, while the thread waits for the next

    # Daemons, because the interpreter would wait for others to the end of all work.
    threads = [threading.Thread(target=work, name=f"merged-lora-{i}", daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    started.wait()
    torch._C.set_num_threads(before)
    return threads


def _dismiss(
    tasks: SimpleQueue[_Task | None], members: Sequence[threading.Thread], callers: Sequence[threading.Thread]
) -> None:
    """End threads after the tasks that were handed out, and at exit wait for them and for their callers."""
    for _ in members:
        tasks.put(None)
    if _exiting():
        deadline = time.monotonic() + EXIT_SECONDS
        for thread in (*members, *callers):
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
