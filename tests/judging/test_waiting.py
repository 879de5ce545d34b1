"""Asynchronous work is waited for with and without an event loop, and an interrupt cancels it."""

from __future__ import annotations

import asyncio
import signal

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
