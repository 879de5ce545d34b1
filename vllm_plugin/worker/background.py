"""Work beside an engine's steps: one thread, in which short work interrupts long work.

Knows nothing of merges or vLLM.  Whoever hands over work uses one thread for that; the work itself runs in
another, and shares nothing with the first but its :class:`Job`.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from merged_lora.backends import Progress

logger = logging.getLogger("vllm.merged_lora")

Outcome = TypeVar("Outcome")

PATIENCE = 2.0
"""Work is overtaken by what arrives later for at most this many times as long as it takes by itself."""
DEEPEST = 3
"""Number of pieces of work that are in memory at a time, because each interrupted the one before."""
BRIEF = 1.0
"""Seconds that work may be expected to take to interrupt the last of these as well."""
LEAVE = 5.0
"""Seconds that the end of the process waits for the thread."""


class CancelledError(Exception):
    """Nobody waits for this work any more."""


class OverdueError(Exception):
    """This work took longer than it may."""


class _DisplacedError(Exception):
    """What this work interrupted has to go on; the work begins anew later."""


@dataclass(frozen=True)
class Task(Generic[Outcome]):
    """Work of known size.

    seconds: how long it is expected to take.
    total:   number of steps.
    run:     does it, calling a function with the number of steps finished since the last call; whatever that
             raises has to pass on.
    limit:   seconds after which it is given up, with an OverdueError.
    took:    called with the seconds that it took, when it is done or was given up for its length.
    idle:    whether it is only done while there is nothing else; it ends as given up as soon as there is.
    """

    seconds: float
    total: int
    run: Callable[[Progress], Outcome]
    limit: float = math.inf
    took: Callable[[float], None] = lambda _: None
    idle: bool = False


class Job(Generic[Outcome]):
    """Work that was handed over.

    size_up: finds out how large the work is; takes little time.

    ``done`` of ``total`` steps are finished, in ``spent`` seconds; ``announced`` is how many seconds were
    expected, None until the work was sized up; if it was ``displaced``, it had to begin anew.  When
    ``finished``, ``outcome`` has what it gave, or ``error`` has what it raised.
    """

    def __init__(self, size_up: Callable[[], Task[Outcome]]) -> None:
        self.size_up = size_up
        self.task: Task[Outcome] | None = None
        self.arrived = time.monotonic()
        self.running = False
        self.finished = False
        self.cancelled = False
        self.displaced = False
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
        if error is not None:
            _let_go(error)
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
    work that arrives later is due later.  Work that interrupted another and then takes so much longer than
    expected that the other is due before it makes way, once, and begins anew when nothing else runs.

    If the thread itself fails, and not its work, then all work fails, also what is handed over later.

    name:  of the thread.
    enter: called in the thread before anything else; if it fails, so does all work.
    """

    def __init__(self, name: str, enter: Callable[[], None] = lambda: None) -> None:
        self._enter = enter
        self._changed = threading.Condition()
        self._waiting: list[Job[Any]] = []
        self._jobs: WeakSet[Job[Any]] = WeakSet()  # what is over stays only with those who want it
        self._stopping = False
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def submit(self, size_up: Callable[[], Task[Outcome]]) -> Job[Outcome]:
        """Hand over work."""
        job = Job(size_up)
        with self._changed:
            broken = self._broken
            if broken is None:
                self._jobs.add(job)
                self._waiting.append(job)
                self._changed.notify()
        if broken is not None:
            job.finish(error=_failure(broken))
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
            while not self._stopping and self._broken is None:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting or self._stopping)
                self._advance(())
        except BaseException as error:
            self._broken = error
        if self._broken is not None:
            self._fail_all(self._broken)

    def _fail_all(self, broken: BaseException) -> None:
        with self._changed:  # what is handed over after this sees that the thread is broken
            left = [job for job in self._jobs if not job.finished]
        for job in left:
            job.finish(error=_failure(broken))
        logger.error("the thread %s has ended, and all its work fails", self._thread.name, exc_info=broken)

    def _advance(self, running: tuple[Job[Any], ...]) -> bool:
        """Do one piece of work that comes before what is running; returns whether there was any.

        running: work that has begun, each of which interrupted the one before.

        Raises what goes wrong in the thread itself; what work raises is its outcome.
        """
        if self._broken is not None:
            raise self._broken  # what is running takes this for its own, and then the thread ends
        try:
            return self._begin(running)
        except BaseException as error:
            self._broken = error
            raise

    def _begin(self, running: tuple[Job[Any], ...]) -> bool:
        with self._changed:
            if self._stopping:
                return False
            given_up = [job for job in self._waiting if job.cancelled]
            self._waiting = [job for job in self._waiting if not job.cancelled]
            job = self._next(running)
            if job is not None:
                self._waiting.remove(job)
        for other in given_up:
            other.finish(error=CancelledError())
        if job is None:
            return bool(given_up)
        if job.task is None:
            self._size_up(job)
        else:
            self._run(job, job.task, running)
        return True

    def _next(self, running: tuple[Job[Any], ...]) -> Job[Any] | None:
        able = (job for job in self._waiting if job.task is None or _interrupts(job, job.task, running))
        return min(able, key=_order, default=None)

    def _size_up(self, job: Job[Any]) -> None:
        try:
            job.task = job.size_up()
        except BaseException as error:  # whatever it is, the thread lives on
            job.finish(error=error)
            return
        with self._changed:
            self._waiting.append(job)

    def _run(self, job: Job[Any], task: Task[Any], interrupted: tuple[Job[Any], ...]) -> None:
        since = time.monotonic()

        def progress(steps: int) -> None:
            nonlocal since
            now = time.monotonic()
            job.done, job.spent = job.done + steps, job.spent + now - since
            if task.idle and self._waiting:
                job.cancel()
            while not job.cancelled and self._advance((*interrupted, job)):
                pass
            since = time.monotonic()
            if job.cancelled or self._stopping:
                raise CancelledError
            if job.spent > task.limit:
                raise OverdueError(f"given up after {job.spent:.1f} s")
            if interrupted and interrupted[-1].due < job.due:
                raise _DisplacedError

        outcome, error = None, None
        job.running = True
        try:
            outcome = task.run(progress)
        except _DisplacedError:
            job.task = replace(task, seconds=max(task.seconds, job.spent))
            job.running, job.displaced, job.done, job.spent = False, True, 0, 0.0
            with self._changed:
                self._waiting.append(job)
            return
        except BaseException as raised:  # whatever it is, the thread lives on
            error = raised
        job.spent += time.monotonic() - since
        if error is None or isinstance(error, OverdueError):
            try:
                task.took(job.spent)
            except Exception as raised:
                error = raised
        job.finish(outcome, error)


def _interrupts(job: Job[Any], task: Task[Any], running: tuple[Job[Any], ...]) -> bool:
    """Whether work that was sized up comes before what is running; yes if nothing is."""
    if not running:
        return True
    deepest = DEEPEST + (task.seconds <= BRIEF)
    return not (job.displaced or task.idle) and job.due < running[-1].due and len(running) < deepest


def _order(job: Job[Any]) -> tuple[bool, bool, float]:
    """What is new comes first, and what is for idle times comes last."""
    return job.task is not None, job.task is not None and job.task.idle, job.due


def _failure(broken: BaseException) -> RuntimeError:
    """The error of work for a thread that is broken."""
    return RuntimeError(f"the thread for this work has failed: {type(broken).__name__}: {broken}")


def _forgotten(*_: object) -> Any:
    raise RuntimeError("this work is over")


def _let_go(error: BaseException) -> None:
    """Keep as a text where an error came from, because its frames hold what the work was made from."""
    if error.__traceback__ is not None:
        with contextlib.suppress(MemoryError):  # which may be the error itself
            error.add_note("".join(traceback.format_exception(error)))
    error.__traceback__ = error.__cause__ = error.__context__ = None
