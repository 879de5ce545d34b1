"""Sources of the folder that make room, are dropped or change while a merge of them is in the making."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Mapping
from pathlib import Path

import pytest

import tiny
from gates import SMALL, KnownPace, SteeredMaker, ask, gate_with, leave, until, worker
from merged_lora.adapters import Adapter
from merged_lora.engine import merge
from merged_lora.spec import parse
from merged_lora.vllm_plugin.api_server.gate import Lease
from merged_lora.vllm_plugin.api_server.ready import LiveMerge
from merged_lora.vllm_plugin.rpc import CacheFullError
from merged_lora.vllm_plugin.worker.merge_worker import MergeWorker

SPEC = "ties(a, 0.5*b)"


def made(seed: int) -> Adapter:
    """A small adapter."""
    return tiny.make_adapter(seed, only=SMALL)


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Adapter]:
    """The adapters of the folder."""
    found = {name: made(seed) for seed, name in enumerate("abcd")}
    for name, adapter in found.items():
        adapter.save(tmp_path / name)
    return found


def room(copies: int) -> int:
    """Bytes for that many copies."""
    return int((copies + 0.5) * made(0).nbytes)


def assert_is_offline_merge(
    merges: MergeWorker[Adapter], live: LiveMerge, adapters: Mapping[str, Adapter]
) -> None:
    """The worker has the bits of the same merge made offline of these adapters."""
    spec = live.identity.spec
    expected = merge(spec, {name: adapters[name] for name in spec.names}, backend="cpu").digest
    assert merges.load_merge(live.identity.path).digest == expected


def test_sources_of_a_merge_in_the_making_make_no_room_for_others(
    tmp_path: Path, adapters: dict[str, Adapter]
) -> None:
    async def run() -> None:
        maker = SteeredMaker()
        merges = worker(room(3), maker=maker)
        gate = gate_with(merges, source_dir=str(tmp_path))
        client = ask(gate, SPEC, request := Lease())
        await until(lambda: bool(maker.begun))
        idle = ask(gate, "sum(c)")
        await until(lambda: len(gate.making) == 2)
        await leave(idle)
        del idle
        gc.collect()
        other = ask(gate, "sum(d)", another := Lease())
        await until(lambda: len(gate.making) == 2)
        assert sorted(gate.sources.components) == ["a", "b", "d"]
        with pytest.raises(CacheFullError):
            await ask(gate, "sum(c)")
        maker.let.set()
        for live in await asyncio.gather(client, other):
            assert_is_offline_merge(merges, live, adapters)
        del request, another, client, other
        gc.collect()
        await ask(gate, "sum(c)")  # now one of them makes room
        assert merges._snapshots.nbytes == gate.sources.held == 3 * made(0).nbytes

    asyncio.run(run())


def test_a_merge_whose_sources_the_worker_drops_meanwhile_is_the_same(
    tmp_path: Path, adapters: dict[str, Adapter]
) -> None:
    async def run() -> None:
        maker = SteeredMaker()
        merges = worker(maker=maker, pace=KnownPace())
        gate = gate_with(merges, source_dir=str(tmp_path))
        requests = [Lease(), Lease()]
        clients = [ask(gate, SPEC, requests[0])]
        await until(lambda: bool(maker.begun))
        clients.append(ask(gate, "sum(9*c, d)", requests[1]))
        await until(lambda: len(gate.making) == 2 and all(making.state for making in gate.making))
        await gate._workers.release([])
        assert merges._snapshots.nbytes == 0
        assert len(maker.begun) == 1  # the other one is announced to take longer, and waits
        maker.let.set()
        for live in await asyncio.gather(*clients):
            assert_is_offline_merge(merges, live, adapters)

    asyncio.run(run())


def test_sources_that_change_meanwhile_make_another_merge_and_the_old_copies_go_with_their_requests(
    tmp_path: Path, adapters: dict[str, Adapter]
) -> None:
    async def run() -> None:
        maker = SteeredMaker()
        merges = worker(maker=maker)
        gate = gate_with(merges, source_dir=str(tmp_path))
        clients = [ask(gate, SPEC, first := Lease())]
        await until(lambda: bool(maker.begun))
        made(7).save(tmp_path / "a", overwrite=True)
        clients.append(ask(gate, SPEC, second := Lease()))
        await until(lambda: len(gate.making) == 2)
        assert merges._snapshots.nbytes == 3 * made(0).nbytes
        maker.let.set()
        for live, a in zip(await asyncio.gather(*clients), (adapters["a"], made(7)), strict=True):
            assert live.identity.spec == parse(SPEC)
            assert_is_offline_merge(merges, live, adapters | {"a": a})
        del first, second
        clients.clear()
        gc.collect()
        async with gate.sources.changes:
            await gate.sources.trim()
        assert merges._snapshots.nbytes == gate.sources.held == 2 * made(0).nbytes

    asyncio.run(run())
