"""What is kept of the merges that were made: within a budget, and as long as a request needs it."""

from __future__ import annotations

import asyncio
import gc
import logging
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

import tiny
from gates import (
    SMALL,
    SteeredMaker,
    ask,
    budget,
    gate_with,
    leave,
    prepared,
    register,
    small_worker,
    two_small_sources,
    until,
    worker,
)
from merged_lora.engine import merge
from merged_lora.spec import parse
from merged_lora.vllm_plugin.api_server.gate import Lease
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.rpc import CacheFullError
from merged_lora.vllm_plugin.settings import GIB


def test_merges_that_no_request_needs_make_room_and_are_made_again(tmp_path: Path) -> None:
    async def run() -> None:
        maker, registry = SteeredMaker(), CollectorRegistry()
        maker.let.set()
        merges = small_worker(maker=maker)
        gate = gate_with(merges, registry=registry, ready_gib=budget(2))
        await two_small_sources(gate, tmp_path)
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
        await two_small_sources(gate, tmp_path)
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
        await two_small_sources(gate, tmp_path)
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
            await two_small_sources(gate, tmp_path)
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
        await two_small_sources(gate, tmp_path)
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
            await two_small_sources(gate, tmp_path)
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
        await two_small_sources(gate, tmp_path)
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
        await two_small_sources(gate, tmp_path)
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


def test_the_copies_that_a_merge_in_the_making_needs_make_no_room_for_others(tmp_path: Path) -> None:
    adapters = {name: tiny.make_adapter(seed, only=SMALL) for seed, name in enumerate("abc", 1)}
    for name, adapter in adapters.items():
        adapter.save(tmp_path / name)

    async def run() -> None:
        maker = SteeredMaker()
        merges = worker(maker=maker, limit=2 * adapters["a"].nbytes)
        gate = gate_with(merges, source_dir=str(tmp_path))
        client = ask(gate, "ties(a, b)", request := Lease())
        await until(lambda: bool(maker.begun))
        with pytest.raises(CacheFullError):
            await ask(gate, "sum(c)")
        maker.let.set()
        live = await client
        assert (
            merges.load_merge(live.identity.path).digest
            == merge("ties(a, b)", adapters, backend="cpu").digest
        )
        del request, client
        await ask(gate, "sum(c)")

    asyncio.run(run())


def test_a_merge_that_nobody_needs_any_more_can_still_be_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        merges = small_worker()
        gate = gate_with(merges)
        await two_small_sources(gate, tmp_path)
        one = MergeIdentity(parse("sum(a)"), (gate.sources.key("a"),))
        assert prepared(merges, one.path)["made"]
        first = merges.load_merge(one.path).digest
        assert prepared(merges, MergeIdentity(parse("sum(b)"), (gate.sources.key("b"),)).path)["made"]
        assert merges.load_merge(one.path).digest == first

    monkeypatch.setattr(logging.getLogger("vllm.merged_lora"), "handlers", [caplog.handler])
    asyncio.run(run())
    assert "made again within a step: sum(a)" in caplog.text
