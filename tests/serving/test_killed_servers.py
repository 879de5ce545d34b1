"""What a worker does for an API server that was killed, or held up so long that it looks as if it was."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import tiny
from gates import SMALL, SteeredMaker, captured, gate_with, register, replies, until, worker
from merged_lora.adapters import Adapter
from merged_lora.spec import parse
from merged_lora.vllm_plugin.api_server.gate import Lease
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.rpc import POLL, Reply
from merged_lora.vllm_plugin.worker.merge_worker import MergeWorker
from merged_lora.vllm_plugin.worker.pace import Pace
from merged_lora.vllm_plugin.worker.silence import SILENT, STRIDE, Silence


class Clock:
    """The time as a test has it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class LongPace(Pace):
    """Merges take a hundred times as many seconds as their source has weight, so that none passes another."""

    def seconds(self, plan: Any) -> float:
        return 100.0 * float(plan.spec.sources[0].weight)


class Place:
    """A worker whose merges are held up, and the merges ``sum(1*a)``, ``sum(2*a)``, ...

    Its questions come from an API server that waits for the work under ``tickets``.
    """

    def __init__(self, folder: Path) -> None:
        self.clock, self.maker = Clock(), SteeredMaker()
        self.worker: MergeWorker[Adapter] = worker(maker=self.maker, pace=LongPace())
        self.worker._silence = Silence(self.clock)
        tiny.make_adapter(1, only=SMALL).save(folder / "a")
        self._key = captured(self.worker, "killed", None, str(folder / "a"))["key"]

    def path(self, weight: int) -> str:
        return MergeIdentity(parse(f"sum({weight}*a)"), (self._key,)).path

    def prepare(self, ticket: str, weight: int, needed: Sequence[str] = ()) -> Reply:
        """Have a merge made for the API server after which the ticket is called, which needs others too."""
        return self.worker.prepare(ticket, ticket.split()[0], needed, self.path(weight), ())

    def ask(self, tickets: Sequence[str], seconds: float, pause: float = 0.25) -> dict[str, Any]:
        """Ask for the work under tickets again and again for some time; returns the last replies."""
        for _ in range(round(seconds / pause)):
            self.clock.now += pause
            found = self.worker.poll(tickets)["work"]
        return found

    def finish(self, ticket: str) -> Reply:
        """Let the merges go on, and ask until the one under this ticket is made."""
        self.maker.let.set()
        asyncio.run(until(lambda: "pending" not in self.ask([ticket], 0.25)[ticket]))
        self.maker.let.clear()
        reply: Reply = self.ask([ticket], 0.25)[ticket]
        return reply


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.worker.stop()  # merges that are still held up would disturb other tests


def begun(place: Place, *specs: str) -> Any:
    """Wait until merges have begun in this order."""
    return asyncio.run(until(lambda: place.maker.begun == list(specs)))


def test_a_merge_of_an_api_server_that_was_killed_makes_way_for_those_of_the_others(place: Place) -> None:
    place.prepare("killed", 1)
    begun(place, "sum(a)")
    place.prepare("living", 2)
    place.ask(["living"], SILENT - 1.0)
    assert set(place.worker._work) == {"killed", "living"}
    place.ask(["living"], 2.0)
    assert set(place.worker._work) == {"living"}
    begun(place, "sum(a)", "sum(2*a)")
    assert place.finish("living")["ok"]
    assert place.maker.made == ["sum(2*a)"]


def test_a_merge_that_another_api_server_waits_for_too_is_not_given_up(place: Place) -> None:
    place.prepare("killed", 1)
    place.prepare("living", 1)
    place.ask(["living"], 2 * SILENT)
    assert place.finish("living")["made"]
    assert place.maker.begun == place.maker.made == ["sum(a)"]


def test_what_a_killed_api_server_needed_stays_for_its_requests_in_the_engine(place: Place) -> None:
    place.prepare("killed", 1)
    digest = place.finish("killed")["key"]
    place.prepare("killed again", 2, [digest])
    place.prepare("living", 3)
    place.ask(["living"], 2 * SILENT)
    assert set(place.worker._work) == {"living"}
    place.prepare("living too", 4)  # says what the living one needs
    place.worker.load_merge(place.path(1))
    assert place.maker.begun.count("sum(a)") == 1
    assert place.worker.release("living", [])["held"] > 0  # the source of sum(a)


@pytest.mark.parametrize("servers", [2, 16])
def test_a_step_that_takes_long_makes_nobody_silent(servers: int) -> None:
    clock, tickets = Clock(), [f"of {i}" for i in range(servers)]
    silence = Silence(clock)
    for i in range(100):
        clock.now += 300.0  # and then the questions of all, in any order
        for ticket in tickets if i % 2 else reversed(tickets):
            assert silence.heard([ticket], tickets) == []


def test_work_goes_on_as_long_as_nobody_asks_for_anything() -> None:
    clock = Clock()
    silence = Silence(clock)
    assert silence.heard([], ["killed"]) == []
    clock.now += 1e6
    assert silence.heard(["new"], ["killed", "new"]) == []


def test_an_api_server_is_silent_after_thirty_questions_of_others_at_the_earliest() -> None:
    clock = Clock()
    silence, questions = Silence(clock), 0
    while silence.heard(["living"], ["killed", "living"]) == []:
        questions += 1
        clock.now += 10.0
    assert questions > SILENT / STRIDE


def test_an_api_server_that_was_only_held_up_has_an_error_and_serves_on(tmp_path: Path) -> None:
    async def run() -> None:
        clock, maker = Clock(), SteeredMaker()
        maker.let.set()
        merges = worker(maker=maker)
        merges._silence = Silence(clock)
        gate = gate_with(merges)
        await register(gate, "a", tmp_path, 1, only=SMALL)
        ready = await gate.ready(parse("sum(a)"), request := Lease())
        maker.let.clear()
        asked = asyncio.create_task(gate.ready(parse("sum(2*a)"), Lease()))
        await until(lambda: "sum(2*a)" in maker.begun)
        (given_up,) = merges._making.values()

        goes_on, call = asyncio.Event(), gate._workers._call

        async def held_up(method: str, arguments: tuple[Any, ...]) -> Sequence[Reply]:
            await goes_on.wait()
            return await call(method, arguments)

        gate._workers._call = held_up
        identity = ready.identity
        merges.prepare("other", "other", [], MergeIdentity(parse("sum(3*a)"), identity.contents).path, ())
        for _ in range(2 * round(SILENT)):
            clock.now += 1.0
            replies([merges], POLL, (["other"],))
        goes_on.set()
        with pytest.raises(RuntimeError, match=r"did not ask for this for 30 s.*ask again"):
            await asked

        await until(lambda: given_up.job.finished)  # the thread has noticed too
        assert "sum(2*a)" not in maker.made
        maker.let.set()
        assert (await gate.ready(parse("sum(a)"), request)) is ready
        merges.load_merge(identity.path)
        assert maker.begun.count("sum(a)") == 1
        await gate.ready(parse("sum(2*a)"), Lease())
        assert "sum(2*a)" in maker.made

    asyncio.run(run())
