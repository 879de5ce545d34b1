"""An API server's calls to its workers: begun, asked for with pauses, given up."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from typing import Any

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from gates import until
from merged_lora.vllm_plugin.api_server.workers import FIRST_PAUSE, LONGEST_PAUSE, Workers, pause
from merged_lora.vllm_plugin.hooks import api_server as hooks
from merged_lora.vllm_plugin.rpc import CANCEL, POLL, PREPARE, Pending, Reply

PENDING: dict[str, Any] = {"running": True, "done": 0, "total": 1, "spent": 0.0, "announced": None}


class Engine:
    """Workers whose work is done when a test says so; counts the calls."""

    def __init__(self, ranks: int = 1) -> None:
        self.calls: Counter[str] = Counter()
        self.tickets: list[str] = []
        self.cancelled: list[str] = []
        self.done: set[str] = set()
        self.broken: set[str] = set()
        self.broken_words = False
        self.held = asyncio.Event()
        self.held.set()
        self._ranks = ranks

    async def call(self, method: str, arguments: tuple[Any, ...]) -> list[Reply]:
        self.calls[method] += 1
        await asyncio.sleep(0)
        if method == POLL:
            await self.held.wait()
        if method in self.broken:
            raise ConnectionError("the engine is gone")
        if method == PREPARE:
            self.tickets.append(arguments[0])
            return [self._state(arguments[0])] * self._ranks
        if method == CANCEL:
            self.cancelled += arguments[0]
            return [Reply(ok=True, key="", held=0)] * self._ranks
        work = {} if self.broken_words else {ticket: self._state(ticket) for ticket in arguments[0]}
        return [Reply(ok=True, work=work)] * self._ranks

    def _state(self, ticket: str) -> Reply:
        if ticket in self.done:
            return Reply(ok=True, key="done", held=0, made=True)
        return Reply(ok=True, pending=PENDING)


def ask(workers: Workers) -> asyncio.Task[Reply]:
    return asyncio.create_task(workers.prepare("path", [], lambda _: None))


def test_one_call_asks_for_all_work_and_the_pauses_grow() -> None:
    async def run() -> None:
        engine = Engine()
        workers = Workers(engine.call)
        tasks = [ask(workers) for _ in range(40)]
        await asyncio.sleep(1.0)
        assert engine.calls[PREPARE] == 40
        # Each pause is an eighth of what went before: about 8 * ln(1000 / 16) + 8 of them in a second.
        assert 10 <= engine.calls[POLL] <= 50
        engine.done |= set(engine.tickets)
        assert {reply["key"] for reply in await asyncio.gather(*tasks)} == {"done"}
        asked = engine.calls[POLL]
        await asyncio.sleep(0.05)
        assert engine.calls[POLL] == asked  # nobody is asked when there is nothing to ask for
        assert engine.calls[CANCEL] == 0

    asyncio.run(run())


def test_work_that_is_begun_all_the_time_does_not_put_the_question_off() -> None:
    async def run() -> None:
        engine = Engine()
        workers = Workers(engine.call)
        first = ask(workers)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        engine.done.add(engine.tickets[0])
        others, end = [], time.monotonic() + 10
        while not first.done():
            assert time.monotonic() < end
            others.append(ask(workers))
            await asyncio.sleep(FIRST_PAUSE / 4)
        engine.done |= set(engine.tickets)
        engine.done |= {"later"}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    asyncio.run(run())


def test_clients_that_leave_together_are_reported_in_few_calls() -> None:
    async def run() -> None:
        engine = Engine()
        workers = Workers(engine.call)
        tasks = [ask(workers) for _ in range(50)]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.02)
        assert sorted(engine.cancelled) == sorted(engine.tickets)
        assert engine.calls[CANCEL] <= 3

    asyncio.run(run())


def test_an_engine_that_is_gone_is_the_outcome_of_all_work_and_the_next_call_tries_again() -> None:
    async def run() -> None:
        engine = Engine()
        workers = Workers(engine.call)
        tasks = [ask(workers) for _ in range(3)]
        await asyncio.sleep(0)
        engine.broken = {POLL}
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, ConnectionError)
        engine.broken.clear()
        again = ask(workers)
        await asyncio.sleep(0.01)
        engine.done |= set(engine.tickets)
        assert (await again)["made"]

    asyncio.run(run())


def test_a_question_that_fails_is_the_outcome_of_the_work_that_it_was_about() -> None:
    async def run() -> None:
        engine = Engine()
        workers = Workers(engine.call)
        engine.held.clear()
        asked = ask(workers)
        await until(lambda: engine.calls[POLL] == 1)
        later = ask(workers)
        await until(lambda: len(workers._work) == 2)
        engine.broken = {POLL}
        engine.held.set()
        with pytest.raises(ConnectionError):
            await asked
        engine.broken.clear()
        engine.done |= set(engine.tickets)
        assert (await later)["made"]

    asyncio.run(run())


def test_work_that_cannot_be_given_up_fails_no_other(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm.merged_lora"), "handlers", [caplog.handler])

    async def run() -> None:
        engine = Engine()
        workers = Workers(engine.call)
        stays, leaves = ask(workers), ask(workers)
        await until(lambda: len(workers._work) == 2)
        engine.broken = {CANCEL}
        leaves.cancel()
        await until(lambda: engine.calls[CANCEL] > 0)
        await asyncio.sleep(0.02)
        assert engine.calls[CANCEL] == 1  # once, however long the engine is broken
        assert not stays.done()
        engine.done |= set(engine.tickets)
        assert (await stays)["made"]

    asyncio.run(run())
    assert "work that nobody waits for goes on: the engine is gone" in caplog.text


@pytest.mark.parametrize("end", ["nonsense", "cancelled"])
def test_nobody_waits_for_ever_whatever_ends_the_questions(end: str) -> None:
    async def run() -> None:
        engine = Engine()
        workers = Workers(engine.call)
        tasks = [ask(workers) for _ in range(3)]
        await until(lambda: len(workers._work) == 3)
        if end == "nonsense":
            engine.broken_words = True
        else:
            assert workers._asking is not None
            workers._asking.cancel()
        done, waiting = await asyncio.wait(tasks, timeout=5)
        assert not waiting
        assert all(task.cancelled() or isinstance(task.exception(), KeyError) for task in done)
        engine.broken_words = False
        again = ask(workers)
        await until(lambda: len(workers._work) == 1)
        engine.done |= set(engine.tickets)
        assert (await again)["made"]

    asyncio.run(run())


@pytest.mark.parametrize("engines", [1, 2])
def test_a_call_ends_with_the_error_of_vllm_when_the_engine_dies(
    engines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "LOOK", 0.01)

    class Client:
        """A client of engines that do not answer until they are let, which vLLM would wait for."""

        errored, dead_error = False, EngineDeadError()

        def __init__(self) -> None:
            self.let = asyncio.Event()
            self.waiting = 0
            self.engine_core = self
            self.core_engines = list(range(engines))

        async def collective_rpc(self, method: str, args: Any) -> list[Reply]:
            self.waiting += 1
            try:
                await self.let.wait()
            finally:
                self.waiting -= 1
            return [Reply(ok=True, key=f"{method}{args}")]

        async def _call_utility_async(self, _: str, method: str, *more: Any, engine: int) -> list[Reply]:
            return await self.collective_rpc(method, more[1])

    async def run() -> None:
        client = Client()
        for end in ("answers", "leaves", "dies"):
            client.let.clear()
            call = asyncio.create_task(hooks._on_every_worker(client, "poll", (1,)))
            await asyncio.sleep(0.05)
            assert not call.done()
            assert client.waiting == engines
            if end == "answers":
                client.let.set()
                assert await call == [Reply(ok=True, key="poll(1,)")] * engines
                continue
            if end == "leaves":
                call.cancel()
            client.errored = end == "dies"
            with pytest.raises(EngineDeadError if end == "dies" else asyncio.CancelledError):
                await asyncio.wait_for(call, 10)
            await asyncio.sleep(0)
            assert client.waiting == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("elapsed", "left", "expected"),
    [
        (0.0, None, FIRST_PAUSE),
        (0.8, None, 0.1),
        (100.0, None, LONGEST_PAUSE),
        (0.0, 0.1, 0.05),
        (0.0, 60.0, LONGEST_PAUSE),
        (4.0, 0.001, LONGEST_PAUSE),
    ],
)
def test_a_pause_follows_from_what_is_announced_and_what_has_passed(
    elapsed: float, left: float | None, expected: float
) -> None:
    pending = Pending(running=True, done=0, total=1, spent=0.0, announced=left)
    assert pause(elapsed, pending) == pytest.approx(expected)
