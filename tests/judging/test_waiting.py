"""Asynchronous work is waited for with and without an event loop, and an interrupt cancels it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from merged_lora.judging.waiting import finished
from running import program


async def answer() -> int:
    await asyncio.sleep(0)
    return 42


async def failure() -> int:
    raise ValueError("no")


def test_the_result_comes_back() -> None:
    assert finished(answer()) == 42


def test_the_result_comes_back_inside_of_a_running_loop() -> None:
    async def cell() -> int:
        return finished(answer())

    assert asyncio.run(cell()) == 42


def test_an_error_comes_back_inside_of_a_running_loop() -> None:
    async def cell() -> int:
        return finished(failure())

    with pytest.raises(ValueError, match="no"):
        asyncio.run(cell())


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Interrupts are raised, also in a test run whose shell has them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_is_raised_after_the_work_has_cleared_away() -> None:
    seen = []

    async def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.1)
            seen.append("cleared away")

    async def cell() -> None:
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            finished(work())
        assert seen == ["cleared away"]
        assert signal.getsignal(signal.SIGINT) is before

    asyncio.run(cell())


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_that_comes_after_the_work_is_raised() -> None:
    async def work() -> None:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)

    async def cell() -> None:
        with pytest.raises(KeyboardInterrupt):
            finished(work())

    asyncio.run(cell())


def test_another_thread_than_the_main_one_may_wait() -> None:
    async def cell() -> int:
        return finished(answer())

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(asyncio.run, cell()).result() == 42


NOTEBOOK = """
import asyncio
from merged_lora.judging.waiting import finished

async def work():
    print("begun", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        print("cleared away", flush=True)

async def cell():
    finished(work())

loop = asyncio.new_event_loop()
try:
    loop.run_until_complete(cell())
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.slow
def test_an_interrupt_inside_of_a_running_loop_cancels_the_work() -> None:
    process = program(NOTEBOOK)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (out, err) == ("cleared away\ninterrupted\n", "")
