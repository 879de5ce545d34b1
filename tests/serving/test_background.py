"""Work beside the steps: what comes first, what interrupts what, and how it ends."""

from __future__ import annotations

import gc
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from merged_lora.backends import Progress
from merged_lora.vllm_plugin.worker import background
from merged_lora.vllm_plugin.worker.background import (
    BRIEF,
    Background,
    CancelledError,
    Job,
    OverdueError,
    Task,
)

PATIENCE = 20.0


@pytest.fixture
def thread() -> Iterator[Background]:
    """A thread that works."""
    made = Background("test")
    yield made
    made.stop()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the clock, to be set."""
    now = [0.0]
    monkeypatch.setattr("merged_lora.vllm_plugin.worker.background.time.monotonic", lambda: now[0])
    return now


class Steps:
    """Work of a few steps, each of which waits until it is let through; notes when each is done."""

    def __init__(self, name: str, seconds: float, steps: int, notes: list[str]) -> None:
        self.name, self.seconds, self.steps, self.notes = name, seconds, steps, notes
        self.begun, self._let = threading.Event(), threading.Semaphore(0)

    def let(self, steps: int) -> None:
        """Let through that many steps."""
        for _ in range(steps):
            self._let.release()

    def task(self) -> Task[str]:
        def run(progress: Progress) -> str:
            self.begun.set()
            for step in range(self.steps):
                assert self._let.acquire(timeout=PATIENCE)
                self.notes.append(f"{self.name}{step}")
                progress(1)
            return self.name

        return Task(self.seconds, self.steps, run)


def nested(thread: Background, given: list[Steps]) -> list[Job[str]]:
    """Begin work, each of which interrupts the one before at its first step."""
    jobs = []
    for outer, steps in zip([None, *given], given, strict=False):
        jobs.append(thread.submit(steps.task))
        if outer is not None:
            outer.let(1)
        assert steps.begun.wait(PATIENCE)
    return jobs


def begun(thread: Background, steps: Steps) -> Job[str]:
    """The job of work that was handed over and has begun."""
    job = thread.submit(steps.task)
    assert steps.begun.wait(PATIENCE)
    return job


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_work_is_done_and_its_state_can_be_read(thread: Background) -> None:
    steps = Steps("a", 3.0, 2, [])
    job = begun(thread, steps)
    assert (job.running, job.finished, job.done, job.total, job.announced) == (True, False, 0, 2, 3.0)
    steps.let(1)
    eventually(lambda: job.done == 1)
    steps.let(1)
    assert job.result() == "a"
    assert (job.running, job.finished, job.done, job.announced) == (False, True, 2, 3.0)
    assert job.spent > 0


def test_short_work_that_comes_later_interrupts_long_work(thread: Background) -> None:
    notes: list[str] = []
    long, short = Steps("long", 100.0, 3, notes), Steps("short", 0.1, 2, notes)
    first = begun(thread, long)
    second = thread.submit(short.task)
    short.let(2)
    long.let(3)
    assert (first.result(), second.result()) == ("long", "short")
    assert notes == ["long0", "short0", "short1", "long1", "long2"]


def test_long_work_that_comes_later_waits(thread: Background) -> None:
    notes: list[str] = []
    short, long = Steps("short", 0.1, 2, notes), Steps("long", 100.0, 1, notes)
    jobs = [begun(thread, short)]
    jobs.append(thread.submit(long.task))
    for steps in (long, short):
        steps.let(2)
    assert [job.result() for job in jobs] == ["short", "long"]
    assert notes == ["short0", "short1", "long0"]


def test_of_those_that_wait_the_one_that_is_due_first_comes_first(thread: Background) -> None:
    notes: list[str] = []
    gate = Steps("gate", 0.0, 1, notes)
    begun(thread, gate)
    given = [Steps(name, seconds, 1, notes) for name, seconds in (("c", 90.0), ("a", 30.0), ("b", 60.0))]
    jobs = [thread.submit(steps.task) for steps in given]
    for steps in (gate, *given):
        steps.let(1)
    for job in jobs:
        job.result()
    assert notes == ["gate0", "a0", "b0", "c0"]


def test_nothing_is_overtaken_for_ever(thread: Background, clock: list[float]) -> None:
    notes: list[str] = []
    gate, long = Steps("gate", 0.0, 1, notes), Steps("long", 5.0, 1, notes)
    jobs = [begun(thread, gate)]
    jobs.append(thread.submit(long.task))
    stream = []
    for i in range(12):  # a second apart, each of them a second long
        clock[0] = float(i)
        stream.append(Steps(f"{i}.", 1.0, 1, notes))
        jobs.append(thread.submit(stream[-1].task))
    for steps in (gate, long, *stream):
        steps.let(1)
    for job in jobs:
        job.result()
    # It is due after twice its five seconds; those that are due later, because they came later, wait for it.
    assert notes.index("long0") == 1 + 8


def test_the_time_of_an_interruption_does_not_count(thread: Background) -> None:
    notes: list[str] = []
    long, short = Steps("long", 100.0, 2, notes), Steps("short", 0.1, 1, notes)
    first = begun(thread, long)
    thread.submit(short.task)
    long.let(1)
    assert short.begun.wait(PATIENCE)
    time.sleep(0.3)
    short.let(1)
    long.let(1)
    first.result()
    assert first.spent < 0.25


def test_what_is_given_up_before_it_began_never_begins(thread: Background) -> None:
    notes: list[str] = []
    gate, other = Steps("gate", 0.0, 1, notes), Steps("other", 0.0, 1, notes)
    begun(thread, gate)
    job = thread.submit(other.task)
    job.cancel()
    gate.let(1)
    with pytest.raises(CancelledError):
        job.result()
    assert notes == ["gate0"]
    assert not other.begun.is_set()


def test_what_is_given_up_ends_at_its_next_step_and_the_next_work_begins(thread: Background) -> None:
    notes: list[str] = []
    long, other = Steps("long", 100.0, 50, notes), Steps("other", 200.0, 1, notes)
    job = begun(thread, long)
    after = thread.submit(other.task)
    job.cancel()
    long.let(50)
    other.let(1)
    assert after.result() == "other"
    assert notes == ["long0", "other0"]


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("ours"), MemoryError(), SystemExit(3), KeyboardInterrupt()]
)
@pytest.mark.parametrize("where", ["size_up", "run"])
def test_whatever_work_raises_it_is_its_own_outcome_and_the_thread_lives_on(
    thread: Background, error: BaseException, where: str
) -> None:
    def fail(*_: object) -> str:
        raise error

    job: Job[str] = thread.submit((lambda: Task(0.0, 1, fail)) if where == "run" else fail)  # type: ignore[arg-type]
    expected = type(error) if isinstance(error, Exception) else RuntimeError
    with pytest.raises(expected):
        job.result()
    assert thread.submit(lambda: Task(0.0, 1, lambda _: "next")).result() == "next"


def fail_always(*_: object) -> Any:
    raise MemoryError("no memory for the thread")


def logged_failures(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The errors in the log whose traceback is given."""
    return [str(record.exc_info[1]) for record in caplog.records if record.exc_info]


def test_a_thread_that_cannot_start_fails_all_work_instead_of_hanging(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def enter() -> None:
        raise PermissionError("no priority")

    thread = Background("test", enter)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="has failed: PermissionError: no priority"):
            thread.submit(lambda: Task(0.0, 1, lambda _: None)).result()
    thread.stop()
    assert logged_failures(caplog) == ["no priority"]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_thread_that_breaks_fails_what_waits_and_what_comes_later_and_says_so_once(
    depth: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    thread = Background("test")
    running = [Steps(f"running {i}", 100.0 / 2**i, 2, []) for i in range(depth)]
    jobs = nested(thread, running)
    original = background._order

    def fail_once(_: Job[Any]) -> Any:
        monkeypatch.setattr(background, "_order", original)
        return fail_always()

    monkeypatch.setattr(background, "_order", fail_once)
    jobs += [thread.submit(Steps("waiting", 1.0, 0, []).task) for _ in range(3)]
    for steps in running[-1:]:
        steps.let(1)
    for job in jobs:
        assert "no memory for the thread" in str(eventual_error(job))
    with pytest.raises(RuntimeError, match="has failed: MemoryError: no memory for the thread"):
        thread.submit(Steps("later", 1.0, 0, []).task).result()
    thread.stop()
    assert logged_failures(caplog) == ["no memory for the thread"]


def test_without_memory_for_the_text_of_an_error_the_thread_lives_on(
    thread: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traceback, "format_exception", fail_always)
    job: Job[None] = thread.submit(lambda: Task(0.0, 1, fail_always))
    assert isinstance(eventual_error(job), MemoryError)
    monkeypatch.undo()
    assert thread.submit(lambda: Task(0.0, 1, lambda _: "next")).result() == "next"


def test_what_takes_much_longer_than_expected_makes_way_for_what_it_interrupted(
    thread: Background, clock: list[float]
) -> None:
    notes: list[str] = []
    long, short = Steps("long", 100.0, 2, notes), Steps("short", 0.1, 3, notes)
    first = begun(thread, long)
    second = thread.submit(short.task)
    long.let(1)
    assert short.begun.wait(PATIENCE)
    clock[0] = 150.0  # as if half of the short work had taken that long: the long work is due at 200
    short.let(1)
    long.let(1)
    assert first.result() == "long"
    short.let(3)
    assert second.result() == "short"
    assert notes == ["long0", "short0", "long1", "short0", "short1", "short2"]
    assert (second.displaced, second.announced, second.done) == (True, 150.0, 3)


def test_what_was_displaced_interrupts_nothing_any_more(thread: Background, clock: list[float]) -> None:
    notes: list[str] = []
    long, short = Steps("long", 100.0, 3, notes), Steps("short", 0.1, 1, notes)
    first = begun(thread, long)
    second = thread.submit(short.task)
    long.let(1)
    assert short.begun.wait(PATIENCE)
    clock[0] = 150.0
    short.let(2)
    eventually(lambda: second.displaced)
    clock[0] = 1000.0  # the long work is due at 1700 now, the short work at 300
    long.let(2)
    first.result()
    second.result()
    assert notes == ["long0", "short0", "long1", "long2", "short0"]


def test_what_takes_longer_than_it_may_is_given_up_and_counts_as_a_lesson(
    thread: Background, clock: list[float]
) -> None:
    took: list[float] = []
    steps = Steps("a", 1.0, 5, [])
    job = thread.submit(lambda: replace(steps.task(), limit=10.0, took=took.append))
    assert steps.begun.wait(PATIENCE)
    clock[0] = 9.0
    steps.let(1)
    eventually(lambda: job.done == 1)
    clock[0] = 11.0
    steps.let(1)
    with pytest.raises(OverdueError, match=r"given up after 11\.0 s"):
        job.result()
    assert took == [11.0]


class Large:
    """Something that takes much memory."""


@pytest.mark.parametrize("sized_up", [False, True])
def test_what_is_given_up_while_it_waits_is_let_go_at_the_next_step_of_other_work(
    thread: Background, sized_up: bool
) -> None:
    large = Large()
    left = weakref.ref(large)
    long = Steps("long", 1.0, 5, [])
    begun(thread, long)

    def size_up(large: Large = large) -> Task[Large]:
        return Task(100.0, 1, lambda _: large)

    job = thread.submit(size_up)
    del large, size_up
    if sized_up:
        long.let(1)
        eventually(lambda: job.announced is not None)
    job.cancel()
    long.let(1)
    assert isinstance(eventual_error(job), CancelledError)
    gc.collect()
    assert left() is None
    long.let(4)


def eventual_error(job: Job[Any]) -> BaseException | None:
    """The error of a job, when it is over."""
    eventually(lambda: job.finished)
    return job.error


@pytest.mark.parametrize("fails", [False, True])
def test_finished_work_keeps_nothing_that_its_run_knew(thread: Background, fails: bool) -> None:
    large = Large()
    left = weakref.ref(large)

    def size_up(large: Large = large) -> Task[None]:
        def run(_: Progress) -> None:
            assert large
            if fails:
                raise ZeroDivisionError

        return Task(0.0, 1, run)

    gc.disable()  # not even for as long as it takes until a circle is found
    try:
        job = thread.submit(size_up)
        del large, size_up
        assert isinstance(eventual_error(job), ZeroDivisionError) == fails
        eventually(lambda: left() is None)
    finally:
        gc.enable()


def test_what_finished_work_gave_stays_only_with_who_handed_it_over(thread: Background) -> None:
    job = thread.submit(lambda: Task(0.0, 1, lambda _: Large()))
    left = weakref.ref(job.result())
    del job
    eventually(lambda: left() is None)


def test_what_a_lesson_raises_is_the_outcome_and_the_thread_lives_on(thread: Background) -> None:
    def fail(_: float) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        thread.submit(lambda: Task(0.0, 1, lambda _: "done", took=fail)).result()
    assert thread.submit(lambda: Task(0.0, 1, lambda _: "next")).result() == "next"


def test_work_for_idle_times_comes_last_and_ends_when_there_is_other_work(thread: Background) -> None:
    notes: list[str] = []
    gate, idle, other = (Steps(name, 0.0, 2, notes) for name in ("gate", "idle", "other"))
    begun(thread, gate)
    job = thread.submit(lambda: replace(idle.task(), idle=True))
    first = thread.submit(Steps("first", 1e9, 0, notes).task)
    gate.let(2)
    assert first.result() == "first"
    assert idle.begun.wait(PATIENCE)
    second = thread.submit(other.task)
    for steps in (idle, other):
        steps.let(2)
    assert second.result() == "other"
    with pytest.raises(CancelledError):
        job.result()
    assert notes == ["gate0", "gate1", "idle0", "other0", "other1"]


def test_work_for_idle_times_interrupts_nothing_however_long_that_takes(thread: Background) -> None:
    notes: list[str] = []
    long, idle = Steps("long", 100.0, 3, notes), Steps("idle", 0.0, 1, notes)
    job = begun(thread, long)
    other = thread.submit(lambda: replace(idle.task(), idle=True))
    for steps in (long, idle):
        steps.let(steps.steps)
    assert job.result() == "long"
    assert other.result() == "idle"
    assert notes == ["long0", "long1", "long2", "idle0"]


def test_an_error_keeps_nothing_of_the_work_that_raised_it(thread: Background) -> None:
    left: list[weakref.ref[Large]] = []

    def fail(_: Progress) -> None:
        large = Large()
        left.append(weakref.ref(large))
        try:
            inner(large)
        except ZeroDivisionError as error:
            raise RuntimeError("ours") from error

    def inner(large: Large) -> None:
        raise ZeroDivisionError

    job = thread.submit(lambda: Task(0.0, 1, fail))
    error = eventual_error(job)
    assert isinstance(error, RuntimeError)
    assert left[0]() is None
    lines = "".join(traceback.format_exception(error))
    assert "in fail" in lines  # where it came from can still be logged
    assert "in inner" in lines


@pytest.mark.parametrize(("seconds", "passes"), [(BRIEF, True), (2 * BRIEF, False)])
def test_brief_work_alone_interrupts_the_last_of_those_that_interrupted_each_other(
    thread: Background, seconds: float, passes: bool
) -> None:
    notes: list[str] = []
    given = [Steps(f"{n} s ", float(n), 2, notes) for n in (300, 150, 100)]
    jobs = nested(thread, given)
    short = Steps("short", seconds, 1, notes)
    short.let(1)
    jobs.append(thread.submit(short.task))
    for steps in reversed(given):
        steps.let(2)
    for job in jobs:
        job.result()
    expected = ["300 s 0", "150 s 0", "100 s 0", "short0", "100 s 1", "150 s 1", "300 s 1"]
    assert (notes == expected) == passes
    assert notes.index("short0") == (3 if passes else 4)


def test_brief_work_passes_longer_work_that_is_due_before_and_may_not_interrupt(
    thread: Background, clock: list[float]
) -> None:
    notes: list[str] = []
    given = [Steps(f"{n} s ", float(n), 2, notes) for n in (300, 150, 100)]
    longer, brief = Steps("longer", 10.0, 1, notes), Steps("brief", BRIEF, 1, notes)
    jobs = nested(thread, given)
    jobs.append(thread.submit(longer.task))
    clock[0] = 30.0
    jobs.append(thread.submit(brief.task))
    for steps in (brief, longer, *reversed(given)):
        steps.let(2)
    for job in jobs:
        job.result()
    assert notes[3:5] == ["brief0", "100 s 1"]


@pytest.mark.parametrize(
    ("lengths", "most"),
    [([1000.0 / 2**i for i in range(8)], 3), ([1000.0, 500.0, 250.0, *(BRIEF / 2**i for i in range(8))], 4)],
)
def test_interruptions_are_bounded_in_depth(thread: Background, lengths: list[float], most: int) -> None:
    jobs: list[Job[None]] = []
    depth, deepest = 0, 0

    def submit(index: int) -> None:
        def run(progress: Progress) -> None:
            nonlocal depth, deepest
            depth += 1
            deepest = max(deepest, depth)
            if index + 1 < len(lengths):
                submit(index + 1)
            progress(1)
            depth -= 1

        jobs.append(thread.submit(lambda: Task(lengths[index], 1, run)))

    submit(0)
    eventually(lambda: len(jobs) == len(lengths))
    for job in jobs:
        job.result()
    assert deepest == most


def test_stopping_ends_work_at_its_next_step() -> None:
    thread = Background("test")
    begun = threading.Event()

    def run(progress: Progress) -> None:
        begun.set()
        while True:
            time.sleep(0.001)
            progress(0)

    job: Job[None] = thread.submit(lambda: Task(0.0, 1, run))
    assert begun.wait(PATIENCE)
    thread.stop()  # gives up waiting after LEAVE seconds
    assert not thread._thread.is_alive()
    with pytest.raises(CancelledError):
        job.result()
