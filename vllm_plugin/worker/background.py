"""Work beside an engine's steps: one thread, in which short work interrupts long work.

Knows nothing of merges or vLLM.  Whoever hands over work uses one thread for that; the work itself runs in
another, and shares nothing with the first but its :class:`Job`.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from merged_lora.backends import Progress

Outcome = TypeVar("Outcome")

PATIENCE = 2.0
"""Work is overtaken by what arrives later for at most this many times as long as it takes by itself."""
DEEPEST = 3
"""Number of interrupted pieces of work that are in memory at a time."""
LEAVE = 5.0
"""Seconds that the end of the process waits for the thread."""


class CancelledError(Exception):
    """Nobody waits for this work any more."""


@dataclass(frozen=True)
class Task(Generic[Outcome]):
    """Work of known size.

    seconds: how long it is expected to take.
    total:   number of steps.
    run:     does it, calling a function with the number of steps finished since the last call; whatever that
             raises has to pass on.
    """

    seconds: float
    total: int
    run: Callable[[Progress], Outcome]


class Job(Generic[Outcome]):
    """Work that was handed over.

    size_up: finds out how large the work is; takes little time.

    ``done`` of ``total`` steps are finished, in ``spent`` seconds; ``announced`` is how many seconds were
    expected, None until the work was sized up.  When ``finished``, ``outcome`` has what it gave, or ``error``
    has what it raised.
    """

    def __init__(self, size_up: Callable[[], Task[Outcome]]) -> None:
        self.size_up = size_up
        self.task: Task[Outcome] | None = None
        self.arrived = time.monotonic()
        self.running = False
        self.finished = False
        self.cancelled = False
        self.done = 0
        self.spent = 0.0
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None
        self._over = threading.Event()

    @property
    def announced(self) -> float | None:
        """Seconds that the work was expected to take; None until it was sized up."""
        return self.task.seconds if self.task is not None else None

    @property
    def total(self) -> int:
        """Number of steps; 0 until the work was sized up."""
        return self.task.total if self.task is not None else 0

    def cancel(self) -> None:
        """Give the work up: it does not begin, or ends at its next step."""
        self.cancelled = True

    @property
    def due(self) -> float:
        """The time by which it would be done if it were overtaken for as long as that may be."""
        return self.arrived + PATIENCE * max(self.announced or 0.0, self.spent)

    def finish(self, outcome: Outcome | None = None, error: BaseException | None = None) -> None:
        """Note how the work ended, and let go of what it was made from."""
        self.outcome, self.error = outcome, error
        self.size_up = _forgotten
        if self.task is not None:
            self.task = Task(self.task.seconds, self.task.total, _forgotten)
        self.running, self.finished = False, True
        self._over.set()

    def result(self) -> Outcome:
        """Wait for the end; returns the outcome, or raises what the work raised."""
        self._over.wait()
        if self.error is None:
            return self.outcome  # type: ignore[return-value]  # may be None, if that is the outcome
        if isinstance(self.error, Exception):
            raise self.error
        raise RuntimeError(f"the thread was told to end: {type(self.error).__name__}") from self.error


class Background:
    """A thread that does one piece of work at a time.

    New work is sized up first, at the next step of whatever is running.  Then what is due earliest comes
    first, and interrupts what is running: short work passes long work, and nothing waits for ever, because
    work that arrives later is due later.

    name:  of the thread.
    enter: called in the thread before anything else; if it fails, so does all work.
    """

    def __init__(self, name: str, enter: Callable[[], None] = lambda: None) -> None:
        self._enter = enter
        self._changed = threading.Condition()
        self._new: deque[Job[Any]] = deque()
        self._waiting: list[Job[Any]] = []
        self._stopping = False
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def submit(self, size_up: Callable[[], Task[Outcome]]) -> Job[Outcome]:
        """Hand over work."""
        job = Job(size_up)
        with self._changed:
            self._new.append(job)
            self._changed.notify()
        return job

    def stop(self) -> None:
        """Give up all work, and wait a little for the thread to end."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(LEAVE)
        atexit.unregister(self.stop)

    def _live(self) -> None:
        try:
            self._enter()
        except BaseException as error:
            self._broken = error
        while not self._stopping:
            with self._changed:
                self._changed.wait_for(lambda: self._new or self._waiting or self._stopping)
            self._advance(None, 0)

    def _advance(self, running: Job[Any] | None, depth: int) -> bool:
        """Do one piece of work that comes before the running one; returns whether there was any."""
        with self._changed:
            if self._stopping:
                return False
            if self._new:
                job = self._new.popleft()
            else:
                self._waiting.sort(key=lambda job: job.due)
                if not self._waiting or (running is not None and self._waiting[0].due >= running.due):
                    return False
                if depth >= DEEPEST and not self._waiting[0].cancelled:
                    return False
                job = self._waiting.pop(0)
        if self._broken is not None:
            job.finish(error=self._broken)
        elif job.cancelled:
            job.finish(error=CancelledError())
        elif job.task is None:
            self._size_up(job)
        else:
            self._run(job, job.task, depth)
        return True

    def _size_up(self, job: Job[Any]) -> None:
        try:
            job.task = job.size_up()
        except BaseException as error:  # whatever it is, the thread lives on
            job.finish(error=error)
            return
        with self._changed:
            self._waiting.append(job)

    def _run(self, job: Job[Any], task: Task[Any], depth: int) -> None:
        since = time.monotonic()

        def progress(steps: int) -> None:
            nonlocal since
            now = time.monotonic()
            job.done, job.spent = job.done + steps, job.spent + now - since
            while not job.cancelled and self._advance(job, depth + 1):
                pass
            since = time.monotonic()
            if job.cancelled or self._stopping:
                raise CancelledError

        job.running = True
        try:
            outcome = task.run(progress)
            error = None
        except BaseException as raised:  # whatever it is, the thread lives on
            outcome, error = None, raised
        job.spent += time.monotonic() - since
        job.finish(outcome, error)


def _forgotten(*_: object) -> Any:
    raise RuntimeError("this work is over")
