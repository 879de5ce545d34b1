"""Merges that are made beside the steps: who waits for them, what is kept of them, and what ends them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

import tiny
from gates import (
    FolderAdapters,
    SteeredMaker,
    captured,
    gate_with,
    prepared,
    register,
    size,
    until,
    worker,
)
from merged_lora import weighing
from merged_lora.adapters import Adapter
from merged_lora.backends import Progress, load_backend, no_progress
from merged_lora.engine import merge
from merged_lora.errors import MergeError
from merged_lora.planning import make_plan
from merged_lora.spec import parse
from merged_lora.vllm_plugin.api_server.gate import BusyError, Lease, MergeGate
from merged_lora.vllm_plugin.api_server.ready import LiveMerge
from merged_lora.vllm_plugin.api_server.routes import report
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.rpc import agreed_under
from merged_lora.vllm_plugin.settings import GIB
from merged_lora.vllm_plugin.worker.background import CancelledError
from merged_lora.vllm_plugin.worker.makers import HostMaker
from merged_lora.vllm_plugin.worker.merge_worker import MergeWorker
from merged_lora.vllm_plugin.worker.pace import Pace

SMALL = "layers.0.self_attn.k_proj"
"""A part of a module's name; adapters of it alone are small."""


class KnownPace(Pace):
    """Merges take as many seconds as they have weight in their first source."""

    def seconds(self, plan: Any) -> float:
        return float(plan.spec.sources[0].weight)


def ask(gate: MergeGate, spec: str, request: object | None = None) -> asyncio.Task[LiveMerge]:
    """Ask for a merge as a client does that may leave."""
    return asyncio.create_task(gate.ready(parse(spec), request or Lease()))


async def leave(*tasks: asyncio.Task[Any]) -> None:
    """Let clients leave."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def results(registry: CollectorRegistry, strategy: str = "sum") -> dict[str, float]:
    """The number of new merges of a strategy, by result."""
    words = ("made", "shared", "refused", "busy", "cancelled", "failed")
    found = {
        word: registry.get_sample_value("merged_lora_merges_total", {"strategy": strategy, "result": word})
        for word in words
    }
    return {word: value for word, value in found.items() if value}


async def two_sources(gate: MergeGate, folder: Path) -> None:
    """Register ``a`` and ``b``, which are small."""
    for seed, name in enumerate("ab", 1):
        await register(gate, name, folder, seed, only=SMALL)


# Clients that leave


def test_a_merge_is_given_up_when_its_last_client_leaves(tmp_path: Path) -> None:
    async def run() -> None:
        maker, registry = SteeredMaker(), CollectorRegistry()
        gate = gate_with(worker(maker=maker), registry=registry)
        await two_sources(gate, tmp_path)
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
        await two_sources(gate, tmp_path)
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
        await two_sources(gate, tmp_path)
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
            await two_sources(gate, tmp_path)
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
        await two_sources(gate, tmp_path)
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
        await two_sources(gate, tmp_path)
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
        await two_sources(gate, tmp_path)
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
        await two_sources(gate, tmp_path)
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


# What is kept


def budget(merges: int) -> float:
    """GiB for that many merges of the small sources."""
    return (merges + 0.5) * tiny.make_adapter(1, only=SMALL).nbytes / GIB


def small_worker(**more: Any) -> MergeWorker[Adapter]:
    """A worker that knows how large its merges are."""
    return worker(largest=tiny.make_adapter(1, only=SMALL).nbytes, **more)


def test_merges_that_no_request_needs_make_room_and_are_made_again(tmp_path: Path) -> None:
    async def run() -> None:
        maker, registry = SteeredMaker(), CollectorRegistry()
        maker.let.set()
        merges = small_worker(maker=maker)
        gate = gate_with(merges, registry=registry, ready_gib=budget(2))
        await two_sources(gate, tmp_path)
        for spec in ("sum(a)", "sum(b)", "sum(a)", "ties(a, b)", "sum(a)"):
            await ask(gate, spec)
        assert maker.made == ["sum(a)", "sum(b)", "ties(a, b)"]
        await ask(gate, "sum(b)")  # the one that was used least recently
        assert maker.made[3:] == ["sum(b)"]
        assert len(merges._ready) == len(gate.merges) == 2
        assert registry.get_sample_value("merged_lora_made_again_total") == 1
        assert registry.get_sample_value("merged_lora_cache_hits_total") == 2
        assert registry.get_sample_value("merged_lora_evictions_total", {"what": "merge"}) == 2

    asyncio.run(run())


def test_a_merge_stays_until_its_requests_end_and_a_new_one_waits_for_room(tmp_path: Path) -> None:
    async def run() -> None:
        maker = SteeredMaker()
        maker.let.set()
        merges = small_worker(maker=maker)
        gate = gate_with(merges, ready_gib=budget(2))
        await two_sources(gate, tmp_path)
        requests = [Lease(), Lease()]
        paths = [
            (await ask(gate, spec, request)).identity.path
            for spec, request in zip(("sum(a)", "sum(b)"), requests, strict=True)
        ]
        waiting = ask(gate, "ties(a, b)")
        await asyncio.sleep(0.05)
        assert not waiting.done()
        assert len(gate.making) == 1
        for path in paths:
            merges.load_merge(path)
        assert maker.begun == ["sum(a)", "sum(b)"]  # a slot was filled from memory
        del requests[0]
        gc.collect()
        await waiting
        assert [str(live.identity.spec) for live in gate.merges] == ["ties(a, b)", "sum(b)"]
        merges.load_merge(paths[1])
        assert maker.begun == ["sum(a)", "sum(b)", "ties(a, b)"]

    asyncio.run(run())


def test_clients_that_wait_for_room_may_leave(tmp_path: Path) -> None:
    async def run() -> None:
        gate = gate_with(small_worker(), ready_gib=budget(1))
        await two_sources(gate, tmp_path)
        request = Lease()
        await ask(gate, "sum(a)", request)
        waiting = [ask(gate, f"sum({2 + i}*b)") for i in range(5)]
        await until(lambda: len(gate.making) == 5)
        await leave(*waiting)
        assert gate.making == []
        del request
        await ask(gate, "sum(b)")
        assert gate.ready_bytes <= budget(1) * GIB

    asyncio.run(run())


def test_a_worker_keeps_what_any_api_server_needs(tmp_path: Path) -> None:
    async def run() -> None:
        merges = small_worker()
        one, other = (gate_with(merges, ready_gib=budget(1)) for _ in range(2))
        for gate in (one, other):
            await two_sources(gate, tmp_path)
            await ask(gate, "sum(a)")
        path = one.merges[0].identity.path
        await ask(one, "sum(b)")
        assert len(merges._ready) == 2
        merges.load_merge(path)
        await ask(other, "sum(b)")
        assert len(merges._ready) == 1

    asyncio.run(run())


def test_a_merge_that_was_just_finished_is_not_dropped_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The API server has not asked yet when the next merge begins, so that it does not know of the end.
    monkeypatch.setattr("merged_lora.vllm_plugin.api_server.workers.FIRST_PAUSE", 0.2)

    async def run() -> None:
        maker = SteeredMaker()
        maker.let.set()
        merges = worker(maker=maker)
        gate = gate_with(merges)
        await two_sources(gate, tmp_path)
        clients = [ask(gate, "sum(a)", first := Lease())]
        await until(lambda: all(work.job.finished for work in merges._work.values()) and bool(maker.made))
        clients.append(ask(gate, "sum(b)", second := Lease()))
        for live in await asyncio.gather(*clients):
            merges.load_merge(live.identity.path)
        assert maker.made == ["sum(a)", "sum(b)"]
        del first, second

    asyncio.run(run())


def test_a_merge_that_one_rank_has_already_is_waited_for_on_the_other(tmp_path: Path) -> None:
    async def run() -> None:
        makers = [SteeredMaker(), SteeredMaker()]
        makers[0].let.set()
        ranks = [worker(maker=maker) for maker in makers]
        one, other = gate_with(ranks), gate_with(ranks)
        for gate in (one, other):
            await two_sources(gate, tmp_path)
        clients = [ask(one, "sum(a)")]
        await until(lambda: len(ranks[0]._ready) == 1)
        clients.append(ask(other, "sum(a)"))
        await until(lambda: bool(other.making) and other.making[0].state is not None)
        await asyncio.sleep(0.02)  # asked again
        makers[1].let.set()
        assert len({live.identity.digest for live in await asyncio.gather(*clients)}) == 1
        assert [maker.made for maker in makers] == [["sum(a)"]] * 2

    asyncio.run(run())


def test_a_request_that_waited_has_its_merge_however_much_room_others_need(tmp_path: Path) -> None:
    """Between a merge's end and its request's next turn, no other may push it out."""

    async def run() -> None:
        merges = small_worker()
        gate = gate_with(merges, ready_gib=budget(1))
        await two_sources(gate, tmp_path)
        requests = [Lease() for _ in range(8)]

        async def serve(i: int) -> None:
            live = await gate.ready(parse(f"sum({1 + i}*a)"), requests[i])
            for _ in range(3):
                assert live.identity.digest in gate._ready
                assert live.identity.digest in merges._ready
                await asyncio.sleep(0)
            requests[i] = None  # type: ignore[call-overload]

        await asyncio.gather(*map(serve, range(8)))

    asyncio.run(run())


@pytest.mark.parametrize("event", ["unloaded", "replaced"])
def test_a_merge_in_the_making_is_of_what_its_sources_were(tmp_path: Path, event: str) -> None:
    async def run() -> None:
        maker = SteeredMaker()
        merges = worker(maker=maker)
        gate = gate_with(merges)
        await two_sources(gate, tmp_path)
        before = {name: tiny.make_adapter(seed, only=SMALL) for seed, name in enumerate("ab", 1)}
        client = ask(gate, "ties(a, b)", request := Lease())
        await until(lambda: bool(maker.begun))
        if event == "unloaded":
            async with gate.sources.changes:
                await gate.sources.forget("a")
        else:
            await register(gate, "a", tmp_path, 7, only=SMALL)
        maker.let.set()
        live = await client
        expected = merge("ties(a, b)", before, backend="cpu").digest
        assert merges.load_merge(live.identity.path).digest == expected
        del request

    asyncio.run(run())


def test_a_merge_that_nobody_needs_any_more_can_still_be_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        merges = small_worker()
        gate = gate_with(merges)
        await two_sources(gate, tmp_path)
        one = MergeIdentity(parse("sum(a)"), (gate.sources.key("a"),))
        assert prepared(merges, one.path)["made"]
        first = merges.load_merge(one.path).digest
        assert prepared(merges, MergeIdentity(parse("sum(b)"), (gate.sources.key("b"),)).path)["made"]
        assert merges.load_merge(one.path).digest == first

    monkeypatch.setattr(logging.getLogger("vllm.merged_lora"), "handlers", [caplog.handler])
    asyncio.run(run())
    assert "made again within a step: sum(a)" in caplog.text


# Fairness and cost


def test_a_short_merge_passes_a_long_one(tmp_path: Path) -> None:
    async def run() -> None:
        maker = SteeredMaker()
        gate = gate_with(worker(maker=maker, pace=KnownPace()), max_strength=1e9)
        await two_sources(gate, tmp_path)
        clients = [ask(gate, "sum(1000*a)")]
        await until(lambda: len(maker.begun) == 1)
        for begun, spec in enumerate(("sum(500*a)", "sum(2*a)"), 2):  # each interrupts the one before
            clients.append(ask(gate, spec))
            await until(lambda begun=begun: len(maker.begun) == begun)  # type: ignore[misc]
        maker.let.set()
        await asyncio.gather(*clients)
        assert maker.made == ["sum(2*a)", "sum(500*a)", "sum(1000*a)"]

    asyncio.run(run())


def test_a_merge_that_would_take_too_long_is_refused_with_the_strategies_that_would_do(
    tmp_path: Path,
) -> None:
    class Slow(Pace):
        def seconds(self, plan: Any) -> float:
            return 40.0 if plan.recipe.space == "entries" else 0.25

    async def run() -> None:
        maker = SteeredMaker()
        maker.let.set()
        gate = gate_with(worker(maker=maker, pace=Slow(), seconds=10.0))
        await two_sources(gate, tmp_path)
        with pytest.raises(MergeError) as refusal:
            await ask(gate, "ties_svd(a, b)")
        words = str(refusal.value)
        assert "ties_svd of these sources takes about 40 s here" in words
        assert "at most 10 s (--merged-lora-max-seconds)" in words
        assert "these would do: ties (0.25 s), knots (0.25 s), core_ties (0.25 s)" in words
        assert maker.begun == []
        await ask(gate, "ties(a, b)")

    asyncio.run(run())


def test_a_merge_that_takes_longer_than_allowed_is_given_up_whatever_was_expected(tmp_path: Path) -> None:
    async def run() -> None:
        maker = SteeredMaker()
        gate = gate_with(worker(maker=maker, pace=KnownPace(), seconds=0.05))
        await two_sources(gate, tmp_path)
        with pytest.raises(MergeError) as refusal:
            await ask(gate, "sum(0.001*a)")
        assert re.fullmatch(
            r"sum of these sources was expected to take 0.001 s, and was given up after \d+\.\d s; "
            r"this server merges for at most 0.05 s \(--merged-lora-max-seconds\)",
            str(refusal.value),
        )
        assert maker.made == []

    asyncio.run(run())


def test_what_was_slow_in_a_busy_hour_is_made_again_after_a_few_refusals(tmp_path: Path) -> None:
    tiny.make_adapter(1).save(tmp_path / "a")
    pace = Pace()
    pace._measured["sum"] = 1e-9
    merges = worker(pace=pace, seconds=10.0)
    key = captured(merges, "one", None, str(tmp_path / "a"))["key"]
    identity = MergeIdentity(parse("sum(a)"), (key,))
    sources = merges._sources(identity)
    while pace.seconds(make_plan(identity.spec, sources)) <= 10.0:
        merges._task(identity, sources).took(12.0)
    refusals = 0
    while refusals < 10:
        try:
            merges._task(identity, sources)
            break
        except MergeError:
            refusals += 1
    assert 0 < refusals < 10


def test_weights_that_have_to_be_found_are_found_with_the_merge_and_not_while_it_is_sized_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.make_adapter(1).save(tmp_path / "a")
    tiny.make_adapter(2).save(tmp_path / "b")
    pace = Pace()
    pace._measured["sum"] = 1e-12
    merges = worker(pace=pace)
    keys = [captured(merges, "one", None, str(tmp_path / name))["key"] for name in "ab"]
    identity = MergeIdentity(parse("sum(a, b, weights=auto)"), tuple(keys))
    found: list[int] = []

    def auto_weights(sources: list[Any], *more: Any) -> Any:
        found.append(len(sources))
        return weighing.auto_weights(sources, *more)

    monkeypatch.setattr("merged_lora.planning.auto_weights", auto_weights)
    task = merges._task(identity, merges._sources(identity))
    assert found == []
    task.took(1e9)
    assert [kind[:2] for kind in pace._learned] == [("sum", True)]  # nothing of merges without such weights

    def cancel(_: int) -> None:
        raise CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(merges.maker, "make", None)  # before anything is merged
        with pytest.raises(CancelledError):
            task.run(cancel)
    made = task.run(no_progress)
    assert found == [2, 2]
    expected = merge("sum(a, b, weights=auto)", {name: tmp_path / name for name in "ab"}, rank=16)
    assert made.model.digest == expected.digest


def test_who_is_refused_is_told_how_long_those_before_take(tmp_path: Path) -> None:
    async def run() -> None:
        maker = SteeredMaker()
        gate = gate_with(worker(maker=maker, pace=KnownPace()), max_waiting=1, max_strength=1e9)
        await two_sources(gate, tmp_path)
        clients = [ask(gate, "sum(40*a)")]
        await until(lambda: len(maker.begun) == 1)
        clients.append(ask(gate, "sum(60*a)"))
        await until(lambda: len(gate.making) == 2)
        await until(lambda: all(making.state and making.state.announced for making in gate.making))
        with pytest.raises(BusyError) as busy:
            await ask(gate, "sum(b)")
        assert 95 <= busy.value.seconds <= 100
        await leave(*clients)

    asyncio.run(run())


def test_a_merge_that_takes_longer_than_announced_is_a_line_in_the_log_and_a_lesson(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm.merged_lora"), "handlers", [caplog.handler])
    monkeypatch.setattr("merged_lora.vllm_plugin.api_server.gate.LATE_SECONDS", 0.0)
    pace = Pace()
    pace._measured["sum"] = 1e-12

    async def run() -> None:
        gate = gate_with(worker(pace=pace))
        await two_sources(gate, tmp_path)
        await ask(gate, "sum(a)")

    asyncio.run(run())
    assert "sum(a) took 0.0 s instead of the 0.0 s that were expected" in caplog.text
    assert list(pace._learned.values()) == [pytest.approx(1.75e-12)]


# What is going on


def test_the_report_shows_what_is_being_made_and_what_waits(tmp_path: Path) -> None:
    async def run() -> None:
        maker = SteeredMaker()
        gate = gate_with(worker(maker=maker, pace=KnownPace()), max_strength=1e9)
        await two_sources(gate, tmp_path)
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


# Everything at once


class Restless(FolderAdapters):
    """Reads adapters at the pace of a disk."""

    def read(self, path: str, options: Any) -> Adapter:
        import time

        time.sleep(random.random() * 0.002)
        return super().read(path, options)


def test_five_hundred_interleavings_give_the_offline_merge_and_memory_returns(tmp_path: Path) -> None:
    specs = ["ties(a, b)", "sum(0.5*a, b)", "linear(c)", "dare_ties(b, c, seed=3)", "ties(a, b, c)"]
    adapters = {name: tiny.make_adapter(seed, only=SMALL) for seed, name in enumerate("abc", 1)}
    others = {name: tiny.make_adapter(seed, only=SMALL) for seed, name in enumerate("abc", 11)}
    expected = {
        (spec, version): merge(spec, given, backend="cpu").digest
        for spec in specs
        for version, given in ((0, adapters), (1, others))
    }
    maker = SteeredMaker()
    maker.let.set()
    merges = worker(
        maker=maker, adapters=Restless(), limit=1 << 20, largest=tiny.make_adapter(1, only=SMALL).nbytes
    )
    random.seed(5)

    async def client(gate: MergeGate, contents: dict[str, str]) -> None:
        spec = random.choice(specs)
        request = Lease()
        task = asyncio.create_task(gate.ready(parse(spec), request))
        if random.random() < 0.2:
            await asyncio.sleep(random.random() * 0.004)
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            live = await task
            versions = {contents[key] for key in live.identity.contents}
            for _ in range(random.randrange(3)):
                await asyncio.sleep(random.random() * 0.002)
                digest = merges.load_merge(live.identity.path).digest
                if len(versions) == 1:
                    assert digest == expected[spec, int(versions.pop())]
                    versions = {contents[key] for key in live.identity.contents}
        del request

    async def disturb(gates: list[MergeGate], folder: Path) -> None:
        for turn in range(40):
            await asyncio.sleep(random.random() * 0.01)
            gate, name = random.choice(gates), random.choice("abc")
            given = random.choice((adapters, others))
            given[name].save(folder / f"{turn}" / name)
            async with gate.sources.changes:
                copy = await gate.sources.copy(str(folder / f"{turn}" / name), {})
                await gate.sources.serve(name, copy)

    async def run() -> None:
        contents = {
            adapter.digest: version
            for version, given in (("0", adapters), ("1", others))
            for adapter in given.values()
        }
        gates = [gate_with(merges, ready_gib=budget(4), max_waiting=1000) for _ in range(2)]
        for gate in gates:
            for name, adapter in adapters.items():
                adapter.save(tmp_path / "first" / name, overwrite=True)
                async with gate.sources.changes:
                    await gate.sources.serve(
                        name, await gate.sources.copy(str(tmp_path / "first" / name), {})
                    )
        troubled = asyncio.create_task(disturb(gates, tmp_path))
        for _ in range(25):
            await asyncio.gather(*(client(random.choice(gates), contents) for _ in range(20)))
        await troubled
        gc.collect()
        await asyncio.sleep(0.05)
        for gate in gates:
            assert gate.making == []
            assert gate.ready_bytes <= budget(4) * GIB
            await ask(gate, "sum(2*c)")  # the worker hears what this API server still needs
        assert set(merges._ready) == {digest for gate in gates for digest in gate._ready.digests}
        for gate in gates:
            async with gate.sources.changes:
                for name in "abc":
                    await gate.sources.forget(name)
            assert not gate.sources._leases
            assert not gate._ready._leases
        assert merges._snapshots.nbytes == 0
        assert [len(each) for each in (merges._making, merges._work)] == [0, 0]

    asyncio.run(run())
    assert len(maker.made) >= 20


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
