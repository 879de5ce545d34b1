"""A pool of threads, one for each core, each with torch limited to that core. Knows nothing of merges."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from merged_lora.backends import Progress

Integers = NDArray[np.int64]
Item = TypeVar("Item")
Made = TypeVar("Made")

BATCHES_PER_CORE = 4  # enough to even out the load, few enough that handing them out costs nothing


class Pool:
    """Runs compiled loops and torch operations on every core."""

    def __init__(self) -> None:
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._threads = _start(self.cores)

    def each(self, function: Callable[[Item], Made], items: Sequence[Item], /) -> list[Made]:
        """The results of a function for every item, in the inference mode of the caller."""
        # The mode is a thread's own, and tensors made in it, as in a server, must not be written to outside.
        mode = torch.is_inference_mode_enabled()

        def call(item: Item) -> Made:
            with torch.inference_mode(mode):
                return function(item)

        return list(self._threads.map(call, items))

    def run(self, cost: Integers, work: Callable[[Integers], None], progress: Progress) -> None:
        """Call ``work`` on batches of item indices of about equal cost.

        cost:     of every item ``[n]``, in any unit.
        work:     takes the indices of a batch.
        progress: called with the number of items of each finished batch.
        """
        count = min(len(cost), self.cores * BATCHES_PER_CORE)
        shares: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for item in np.argsort(-cost, kind="stable").tolist():
            lightest = loads.index(min(loads))
            shares[lightest].append(item)
            loads[lightest] += int(cost[item])
        futures = {self._threads.submit(work, np.array(share)): len(share) for share in shares}
        for future in as_completed(futures):
            future.result()
            progress(futures[future])


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


def _start(cores: int) -> ThreadPoolExecutor:
    """A thread per core; torch is limited to one core inside each.

    With more, torch's helpers of every thread would spin on the cores that the other threads need.
    """
    # A thread inherits the most recently set value at its first torch call. So every thread is forced to make
    # that call before any other sets its own value, and then the caller's value is restored.
    before = torch.get_num_threads()
    started = threading.Barrier(cores)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()
        started.wait()

    threads = ThreadPoolExecutor(cores, "merged-lora", start)
    wait([threads.submit(int) for _ in range(cores)])
    torch.set_num_threads(before)
    return threads
