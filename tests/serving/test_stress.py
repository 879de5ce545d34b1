"""Everything at once: whatever clients, sources and threads do, a merge is that of the contents it names."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

import tiny
from gates import SMALL, FolderAdapters, SteeredMaker, ask, budget, gate_with, small_worker
from merged_lora.adapters import Adapter
from merged_lora.engine import merge
from merged_lora.vllm_plugin.api_server.gate import Lease, MergeGate
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.rpc import CacheFullError
from merged_lora.vllm_plugin.settings import GIB
from merged_lora.vllm_plugin.worker.merge_worker import MergeWorker

INTERLEAVINGS, AT_ONCE = 500, 20
SERVED, IN_FOLDER = "abc", "def"
"""Adapters that are loaded and replaced at run time, and those in the folder of sources."""
COPIES = 8
"""Copies of adapters that fit, of twelve: six adapters, each with two contents."""


class Restless(FolderAdapters):
    """Reads adapters at the pace of a disk."""

    def find(self, path: str) -> Path:
        time.sleep(random.random() * 0.002)
        return super().find(path)


@pytest.fixture
def restless_threads() -> Iterator[None]:
    """Threads take turns all the time, so that each sees the others in the middle of what they do."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@dataclass
class World:
    """Two API servers, their worker, and what their sources may hold.

    merges:   the worker.
    gates:    of the API servers.
    folder:   of sources; the contents of all adapters lie in a hidden folder in it.
    contents: every content of an adapter, by its key.
    offline:  digests of merges that were made offline, by the digest of their identity.
    compared: number of requests that were answered by such a merge.
    """

    merges: MergeWorker[Adapter]
    gates: list[MergeGate]
    folder: Path
    contents: dict[str, Adapter] = field(default_factory=dict)
    offline: dict[str, str] = field(default_factory=dict)
    compared: int = 0

    def __post_init__(self) -> None:
        for seed, name in enumerate(SERVED + IN_FOLDER, 1):
            for version in range(2):
                adapter = tiny.make_adapter(seed + 10 * version, only=SMALL)
                adapter.save(self.path(name, version))
                self.contents[adapter.identity] = adapter

    def path(self, name: str, version: int) -> Path:
        """The folder of a content."""
        return self.folder / ".contents" / f"{name}{version}"

    def publish(self, name: str, version: int) -> None:
        """Replace an adapter in the folder of sources, all at once."""
        link = self.folder / f".{name}"
        link.symlink_to(self.path(name, version))
        link.replace(self.folder / name)

    async def load(self, gate: MergeGate, name: str, version: int) -> None:
        """Load an adapter at run time, or replace it."""
        async with gate.sources.changes:
            copy = await gate.sources.copy(str(self.path(name, version)), {})
            await gate.sources.serve(name, copy)

    async def client(self) -> None:
        """Ask for a merge and use it a few times, or leave before that."""
        gate, request = random.choice(self.gates), Lease()
        task = ask(gate, new_spec() if random.random() < 0.8 else "ties(a, b, d)", request)
        if random.random() < 0.2:
            await asyncio.sleep(random.random() * 0.004)
            task.cancel()
        try:
            live = await task
        except (asyncio.CancelledError, CacheFullError):
            return
        for _ in range(random.randint(1, 3)):
            await asyncio.sleep(random.random() * 0.002)
            assert self.merges.load_merge(live.identity.path).digest == self.expected(live.identity)
        self.compared += 1

    def expected(self, identity: MergeIdentity) -> str:
        """The digest of the offline merge of exactly the contents that an identity names."""
        if identity.digest not in self.offline:
            named = zip(identity.spec.names, identity.contents, strict=True)
            sources = {name: self.contents[key] for name, key in named}
            self.offline[identity.digest] = merge(str(identity.spec), sources, backend="cpu").digest
        return self.offline[identity.digest]

    async def disturb(self) -> None:
        """Replace adapters, for ever."""
        while True:
            await asyncio.sleep(random.random() * 0.01)
            version = random.randrange(2)
            if random.random() < 0.5:
                self.publish(random.choice(IN_FOLDER), version)
            else:
                with contextlib.suppress(CacheFullError):
                    await self.load(random.choice(self.gates), random.choice(SERVED), version)


def new_spec() -> str:
    """A merge of two adapters that hardly anybody else asks for."""
    one, other = random.sample(SERVED + IN_FOLDER, 2)
    weight, seed = round(random.uniform(0.1, 2.0), 4), random.randrange(1 << 16)
    return random.choice(
        (
            f"ties({weight}*{one}, {other})",
            f"sum({weight}*{one}, {other})",
            f"linear({weight}*{one})",
            f"dare_ties({one}, {other}, seed={seed})",
        )
    )


@pytest.mark.slow
@pytest.mark.usefixtures("restless_threads")
def test_five_hundred_interleavings_give_the_offline_merge_and_memory_returns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm.merged_lora"), "handlers", [caplog.handler])
    maker, registries = SteeredMaker(), [CollectorRegistry(), CollectorRegistry()]
    maker.let.set()
    random.seed(5)

    limit = COPIES * tiny.make_adapter(1, only=SMALL).nbytes
    settings: dict[str, Any] = {"ready_gib": budget(4), "max_waiting": 1000, "source_dir": str(tmp_path)}

    async def run() -> World:
        merges = small_worker(maker=maker, adapters=Restless(), limit=limit)
        gates = [gate_with(merges, registry=registry, **settings) for registry in registries]
        world = World(merges, gates, tmp_path)
        for name in IN_FOLDER:
            world.publish(name, 0)
        for gate in gates:
            for name in SERVED:
                await world.load(gate, name, 0)
        disturbing = asyncio.create_task(world.disturb())
        for _ in range(INTERLEAVINGS // AT_ONCE):
            await asyncio.gather(*(world.client() for _ in range(AT_ONCE)))
        disturbing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await disturbing
        await all_is_given_back(world)
        return world

    world = asyncio.run(run())
    assert len(maker.made) > INTERLEAVINGS / 2
    assert world.compared > INTERLEAVINGS / 2
    assert sum(map(evicted, registries)) > 0
    assert "made again within a step" not in caplog.text


def evicted(registry: CollectorRegistry) -> float:
    """The number of copies of the folder's adapters that made room for others."""
    return registry.get_sample_value("merged_lora_evictions_total", {"what": "source"}) or 0.0


async def all_is_given_back(world: World) -> None:
    """Assert that nothing is left in memory when nobody needs it any more."""
    merges, gates = world.merges, world.gates
    gc.collect()
    await asyncio.sleep(0.05)
    for gate in gates:
        assert gate.making == []
        assert gate.ready_bytes <= budget(4) * GIB
        await ask(gate, "sum(2*c)")  # the worker hears what this API server still needs
    assert set(merges._ready) == {digest for gate in gates for digest in gate._ready.digests}
    for gate in gates:
        async with gate.sources.changes:
            for name in list(gate.sources.components):
                await gate.sources.forget(name)
        assert not gate.sources._leases
        assert not gate._ready._leases
    assert merges._snapshots.nbytes == 0
    assert [len(each) for each in (merges._making, merges._work)] == [0, 0]
