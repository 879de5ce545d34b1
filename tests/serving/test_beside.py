"""Merges that are made beside the steps: who waits for them, what ends them, and what is seen of them."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

import tiny
from gates import (
    KnownPace,
    SteeredMaker,
    ask,
    captured,
    gate_with,
    leave,
    prepared,
    results,
    size,
    two_small_sources,
    until,
    worker,
)
from merged_lora.backends import Progress, load_backend
from merged_lora.spec import parse
from merged_lora.vllm_plugin.api_server.gate import Lease
from merged_lora.vllm_plugin.api_server.routes import report
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.rpc import agreed_under
from merged_lora.vllm_plugin.worker.makers import HostMaker

# Clients that leave


def test_a_merge_is_given_up_when_its_last_client_leaves(tmp_path: Path) -> None:
    async def run() -> None:
        maker, registry = SteeredMaker(), CollectorRegistry()
        gate = gate_with(worker(maker=maker), registry=registry)
        await two_small_sources(gate, tmp_path)
        clients = [ask(gate, "sum(a)") for _ in range(3)]
        await until(lambda: maker.begun == ["sum(a)"])
        await leave(*clients[:2])
        assert [making.waiting for making in gate.making] == [1]
        await leave(clients[2])
        assert gate.making == []
        other = ask(gate, "sum(b)")
        await until(lambda: "sum(b)" in maker.begun)  # the first one ended at its next step
        maker.let.set()
        await other
        assert maker.made == ["sum(b)"]
        assert results(registry) == {"cancelled": 1, "made": 1}

    asyncio.run(run())


def test_fifty_requests_that_were_dropped_cost_no_merge_that_had_not_begun(tmp_path: Path) -> None:
    async def run() -> None:
        maker, registry = SteeredMaker(), CollectorRegistry()
        merges = worker(maker=maker, pace=KnownPace())
        gate = gate_with(merges, registry=registry, max_waiting=100)
        await two_small_sources(gate, tmp_path)
        first = ask(gate, "sum(a)")
        await until(lambda: bool(maker.begun))
        dropped = [ask(gate, f"sum({2 + i}*a)") for i in range(50)]
        await until(lambda: len(gate.making) == 51)
        await leave(*dropped)
        await until(lambda: len(merges._work) == 1)
        last = ask(gate, "sum(b)")
        maker.let.set()
        await asyncio.gather(first, last)
        assert maker.begun == maker.made == ["sum(a)", "sum(b)"]
        assert results(registry) == {"made": 2, "cancelled": 50}
        assert registry.get_sample_value("merged_lora_queue") == 0

    asyncio.run(run())


def test_who_asks_right_after_the_last_client_left_has_the_merge_made(tmp_path: Path) -> None:
    async def run() -> None:
        maker = SteeredMaker()
        gate = gate_with(worker(maker=maker))
        await two_small_sources(gate, tmp_path)
        first = ask(gate, "sum(a)")
        await until(lambda: bool(maker.begun))
        first.cancel()
        await asyncio.sleep(0)
        again = ask(gate, "sum(a)")
        maker.let.set()
        assert (await again).identity.spec == parse("sum(a)")
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(run())


def test_a_merge_that_two_api_servers_wait_for_outlives_the_clients_of_one(tmp_path: Path) -> None:
    async def run() -> None:
        maker = SteeredMaker()
        merges = worker(maker=maker)
        one, other = gate_with(merges), gate_with(merges)
        for gate in (one, other):
            await two_small_sources(gate, tmp_path)
        clients = [ask(gate, "sum(a)") for gate in (one, other)]
        await until(lambda: all(gate.making and gate.making[0].state for gate in (one, other)))
        await leave(clients[0])
        await asyncio.sleep(0.02)
        maker.let.set()
        await clients[1]
        assert maker.begun == maker.made == ["sum(a)"]

    asyncio.run(run())


# Faults


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), SystemExit(1), MemoryError("full")])
def test_a_fault_of_the_thread_fails_its_request_alone(tmp_path: Path, error: BaseException) -> None:
    async def run() -> None:
        maker, registry = SteeredMaker(), CollectorRegistry()
        maker.errors["sum(a)"] = error
        maker.let.set()
        gate = gate_with(worker(maker=maker), registry=registry)
        await two_small_sources(gate, tmp_path)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=type(error).__name__):
                await ask(gate, "sum(a)")
        assert (await ask(gate, "sum(b)")).facts.modules == 1
        assert results(registry) == {"failed": 2, "made": 1}

    asyncio.run(run())


def test_what_fails_on_one_rank_ends_on_all(tmp_path: Path) -> None:
    async def run() -> None:
        makers = [SteeredMaker(), SteeredMaker()]
        makers[1].let.set()
        makers[1].errors["sum(a)"] = ZeroDivisionError("rank 1 alone")
        gate = gate_with([worker(maker=maker) for maker in makers])
        await two_small_sources(gate, tmp_path)
        with pytest.raises(RuntimeError, match="rank 1 alone"):
            await ask(gate, "sum(a)")  # rank 0 would take for ever
        other = ask(gate, "sum(b)")
        await until(lambda: "sum(b)" in makers[0].begun)
        makers[0].let.set()
        assert (await other).identity.spec == parse("sum(b)")
        assert makers[0].made == ["sum(b)"]

    asyncio.run(run())


def test_a_merge_is_ready_when_it_is_on_every_rank(tmp_path: Path) -> None:
    async def run() -> None:
        makers = [SteeredMaker(), SteeredMaker()]
        ranks = [worker(maker=maker) for maker in makers]
        makers[0].let.set()
        gate = gate_with(ranks)
        await two_small_sources(gate, tmp_path)
        client = ask(gate, "sum(a)", request := Lease())
        await until(lambda: makers[0].made == ["sum(a)"])
        await asyncio.sleep(0.02)
        assert not client.done()
        makers[1].let.set()
        path = (await client).identity.path
        assert len({rank.load_merge(path).digest for rank in ranks}) == 1
        del request

    asyncio.run(run())


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Without the collector of cycles, an object ends with its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("end", ["fails", "is given up"])
def test_a_merge_that_ends_without_a_result_keeps_no_lease(tmp_path: Path, end: str) -> None:
    async def run() -> None:
        maker = SteeredMaker()
        maker.errors["sum(a)"] = ZeroDivisionError("ours")
        gate = gate_with(worker(maker=maker))
        await two_small_sources(gate, tmp_path)
        clients = [ask(gate, "sum(a)") for _ in range(3)]
        await until(lambda: bool(maker.begun))
        assert gate.sources._leases
        if end == "fails":
            maker.let.set()
            for outcome in await asyncio.gather(*clients, return_exceptions=True):
                assert isinstance(outcome, RuntimeError)
            del outcome
        else:
            await leave(*clients)
        clients.clear()
        await asyncio.sleep(0.02)  # what is given up ends in a step of its own
        assert not gate.sources._leases

    asyncio.run(run())


# What is going on


def test_the_report_shows_what_is_being_made_and_what_waits(tmp_path: Path) -> None:
    async def run() -> None:
        maker = SteeredMaker()
        gate = gate_with(worker(maker=maker, pace=KnownPace()), max_strength=1e9)
        await two_small_sources(gate, tmp_path)
        clients = [ask(gate, "sum(5*a)"), ask(gate, "sum(5*a)")]
        await until(
            lambda: bool(gate.making) and gate.making[0].state is not None and gate.making[0].state.running
        )
        clients.append(ask(gate, "sum(700*b)"))
        await until(lambda: len(gate.making) == 2 and gate.making[1].state is not None)
        await until(lambda: gate.making[1].state.announced is not None)  # type: ignore[union-attr]
        first, second = report(gate)["making"]
        assert (first["spec"], first["state"], first["requests"]) == ("sum(5*a)", "merging", 2)
        assert (first["modules_done"], first["modules"], first["announced"]) == (0, 1, 5.0)
        assert 0 < first["asked_for"] < 60
        assert (second["spec"], second["state"], second["requests"]) == ("sum(700*b)", "waiting", 1)
        assert second["announced"] == 700.0
        maker.let.set()
        await asyncio.gather(*clients)
        assert report(gate)["making"] == []
        assert report(gate)["bytes_ready"] == sum(live.facts.nbytes for live in gate.merges) > 0

    asyncio.run(run())


def test_the_reply_about_finished_work_stays_until_every_rank_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.make_adapter(1).save(tmp_path / "a")
    merges = worker()
    key = captured(merges, "one", None, str(tmp_path / "a"))["key"]
    path = MergeIdentity(parse("sum(a)"), (key,)).path
    prepared(merges, path)
    for i in range(1000):  # more than any server has under way
        assert merges.prepare(str(i), f"server {i % 2}", [], path, ())["ok"]
    assert agreed_under("0", [merges.poll(["0"])])["key"] == MergeIdentity.from_path(path).digest
    later = time.monotonic() + 301.0
    monkeypatch.setattr("merged_lora.vllm_plugin.worker.merge_worker.time.monotonic", lambda: later)
    merges.prepare("last", "server 0", [], path, ())
    assert list(merges._replies) == ["last"]


def test_after_a_merge_memory_is_made_ready_for_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm.merged_lora"), "handlers", [caplog.handler])
    made: list[str] = []

    def make_room(self: object, progress: Progress) -> None:
        made.append(threading.current_thread().name)
        if len(made) == 2:
            raise OSError(12, "Cannot allocate memory")

    backend = load_backend("cpu")
    monkeypatch.setattr(type(backend), "make_room", make_room)
    tiny.make_adapter(1).save(tmp_path / "a")
    merges = worker(maker=HostMaker(backend, lambda _, adapter: adapter, size))
    key = captured(merges, "one", None, str(tmp_path / "a"))["key"]
    for i in range(1, 4):
        assert prepared(merges, MergeIdentity(parse(f"sum({i}*a)"), (key,)).path)["made"]
        assert merges._room is not None
        merges._room.result()
        assert len(made) == i
    assert set(made) == {"merged-lora-merge"}
    assert {record.getMessage() for record in caplog.records} == {
        "there is no memory for the next merge: [Errno 12] Cannot allocate memory"
    }
