"""Memory for the results of the next merge, touched before it is needed.

The operating system hands out a page when it is touched first, which can take longer than to merge into it.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque

import torch

from merged_lora.backends import Progress

REMEMBERED = 8
"""Number of results, newest first, of which the largest decides how much memory is made ready."""
STEP = 256
"""Pages that are touched between two calls of progress."""


class Room:
    """At most one piece of memory that is ready; nothing is made ready before something was taken."""

    def __init__(self) -> None:
        self._ready: mmap.mmap | None = None
        self._taken: deque[int] = deque(maxlen=REMEMBERED)
        self._lock = threading.Lock()

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor ``[count]`` without values, in memory of its own: what is ready, or else torch's."""
        nbytes = count * dtype.itemsize
        with self._lock:
            memory, self._ready = (self._ready, None) if nbytes else (None, self._ready)
            self._taken.append(nbytes)
        if memory is None:
            return torch.empty(count, dtype=dtype)
        memory.resize(nbytes)  # what it had stays touched, as far as it is needed
        return torch.frombuffer(memory, dtype=dtype)

    def make_ready(self, progress: Progress) -> None:
        """Touch as much memory as one of the last results took.

        progress: called with 0 now and then; whatever it raises passes on.
        """
        with self._lock:
            missing = 0 if self._ready is not None else max(self._taken, default=0)
        if not missing:
            return
        memory = mmap.mmap(-1, missing, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages = torch.frombuffer(memory, dtype=torch.uint8)[:: mmap.PAGESIZE]
        try:
            for at in range(0, len(pages), STEP):
                pages[at : at + STEP].zero_()
                progress(0)
        finally:
            del pages  # nobody may refer to memory that is resized, and an error knows this frame
        with self._lock:
            self._ready = memory
