"""The gate of an API server and its workers in one process, without vLLM: our adapters replace its models."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

import tiny
from merged_lora.adapters import Adapter
from merged_lora.backends import Progress, load_backend, no_progress
from merged_lora.plan import MergePlan
from merged_lora.replay import Replayed
from merged_lora.spec import parse
from merged_lora.vllm_plugin.api_server.gate import Lease, MergeGate
from merged_lora.vllm_plugin.api_server.metrics import Metrics
from merged_lora.vllm_plugin.api_server.ready import LiveMerge
from merged_lora.vllm_plugin.api_server.replaying import Replays, Tokens
from merged_lora.vllm_plugin.api_server.sources import Sources
from merged_lora.vllm_plugin.api_server.workers import Workers
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.rpc import CAPTURE, PREPARE, Reply, agreed_under
from merged_lora.vllm_plugin.settings import GIB, Settings
from merged_lora.vllm_plugin.worker.makers import HostMaker, Made, Maker
from merged_lora.vllm_plugin.worker.merge_worker import MergeWorker
from merged_lora.vllm_plugin.worker.pace import Pace

Rate = Callable[[MergeIdentity, Tokens, Tokens], Awaitable[Replayed]]
PATIENCE = 60.0
"""Seconds after which work counts as stuck."""
LONGEST = 32
"""Most tokens of a prompt with its answer."""
SMALL = "layers.0.self_attn.k_proj"
"""A part of a module's name; adapters of it alone are small."""


class FolderAdapters:
    """Plain adapters read as sources are, in the place of vLLM's."""

    def find(self, path: str) -> Path:
        return Path(path)

    def read(self, path: str, options: Mapping[str, Any]) -> Adapter:
        return Adapter.load(path, drop=["modules_to_save"])

    def fit(self, adapter: Adapter) -> Adapter:
        return adapter

    def size(self, model: Adapter) -> int:
        return model.nbytes

    def scalings(self, model: Adapter) -> dict[str, float]:
        return {}

    def build(self, number: int, adapter: Adapter, scalings: Mapping[str, float]) -> Adapter:
        return adapter

    def copy(self, model: Adapter, number: int) -> Adapter:
        return model

    def share(self, model: Adapter) -> Adapter:
        return model


class SteeredMaker:
    """Makes merges as a worker does, once it is let; until then it takes steps in which it can be stopped.

    ``begun`` has the spec of every merge that was begun, ``made`` of every one that was made, in their order.
    """

    def __init__(self) -> None:
        self.backend = load_backend("cpu")
        self.let = threading.Event()
        self.begun: list[str] = []
        self.made: list[str] = []
        self.errors: dict[str, BaseException] = {}

    def adopt(self, adapter: Adapter) -> Adapter:
        return adapter

    def make(self, number: int, plan: MergePlan, progress: Progress = no_progress) -> Made[Adapter]:
        spec = str(plan.spec)
        self.begun.append(spec)
        end = time.monotonic() + PATIENCE
        while not self.let.wait(0.001):
            assert time.monotonic() < end
            progress(0)
        if spec in self.errors:
            raise self.errors[spec]
        self.made.append(spec)
        return HostMaker(self.backend, lambda _, adapter: adapter, size).make(number, plan, progress)


def size(adapter: Adapter) -> int:
    """Bytes of an adapter."""
    return adapter.nbytes


async def until(condition: Callable[[], bool]) -> None:
    """Let the other tasks of the loop run until a condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


def worker(
    limit: int = 1 << 30,
    adapters: FolderAdapters | None = None,
    maker: Maker[Adapter] | None = None,
    **more: Any,
) -> MergeWorker[Adapter]:
    """A worker with our adapters in the place of vLLM's models.

    limit:    bytes for copies of adapters.
    adapters: reads plain adapters.
    maker:    makes merges.
    more:     further arguments of a worker.
    """
    host = HostMaker(load_backend("auto"), lambda _, adapter: adapter, size)
    return MergeWorker(16, limit, adapters or FolderAdapters(), maker or host, **more)


def begun(reply: Reply) -> Reply:
    """The first reply about work: no call does the work itself, unless it refuses it or finds it done."""
    assert "pending" in reply or not reply["ok"] or not reply.get("made", True)
    return reply


def finished(merges: MergeWorker[Adapter], reply: Reply, ticket: str) -> Reply:
    """The reply of work that was begun under a ticket with a first reply, when it is done."""
    begun(reply)
    end = time.monotonic() + PATIENCE
    while "pending" in reply:
        assert time.monotonic() < end, "the work does not end"
        time.sleep(0.001)
        reply = agreed_under(ticket, [merges.poll([ticket])])
    return reply


def captured(
    merges: MergeWorker[Adapter], owner: str, needed: list[str] | None, path: str, *more: Any
) -> Reply:
    """The reply about a copy of an adapter."""
    ticket = uuid.uuid4().hex
    return finished(merges, merges.capture(ticket, owner, needed, path, *more), ticket)


def prepared(
    merges: MergeWorker[Adapter], path: str, needed: Collection[str] = (), loaded: Collection[int] = ()
) -> Reply:
    """The reply about a merge."""
    ticket = uuid.uuid4().hex
    return finished(merges, merges.prepare(ticket, "one", needed, path, loaded), ticket)


def workers_with(merges: Sequence[MergeWorker[Adapter]], calls: list[str] | None = None) -> Workers:
    """What an API server knows as the workers.

    merges: one for each rank.
    calls:  receives the path of every merge that the workers are asked for.
    """

    async def call(method: str, arguments: tuple[Any, ...]) -> list[Reply]:
        if method == PREPARE and calls is not None:
            calls.append(arguments[-1])
        await asyncio.sleep(0)
        return replies(merges, method, arguments)

    return Workers(call)


def replies(merges: Sequence[MergeWorker[Adapter]], method: str, arguments: tuple[Any, ...]) -> list[Reply]:
    """The replies of all ranks to a call, as vLLM's workers pass it on."""
    more = (set[int](),) if method == PREPARE else ()
    found = [getattr(each, method.removeprefix("merged_lora_"))(*arguments, *more) for each in merges]
    return [begun(reply) for reply in found] if method in (CAPTURE, PREPARE) else found


def gate_with(
    merges: MergeWorker[Adapter] | Sequence[MergeWorker[Adapter]],
    calls: list[str] | None = None,
    registry: CollectorRegistry | None = None,
    rate: Rate | None = None,
    servers: int = 1,
    **settings: Any,
) -> MergeGate:
    """A gate in front of one worker, with the alias ``mix``.

    merges:   the worker, or those of all ranks.
    calls:    receives the path of every merge that the worker is asked for.
    registry: registry of the metrics.
    rate:     the engine's answer to a request of a replay; by default, every answer is kept.
    servers:  number of API servers.
    settings: settings that differ from the defaults.
    """

    async def kept(merge: MergeIdentity, prompt: Tokens, answer: Tokens) -> Replayed:
        return Replayed(True, -0.5 * len(answer), len(answer))

    metrics = Metrics(registry or CollectorRegistry())
    workers = workers_with([merges] if isinstance(merges, MergeWorker) else merges, calls)
    replays = Replays(workers, rate or kept, LONGEST, metrics)
    given = Settings(enable=True, **{"aliases": {"mix": parse("ties(a, b)")}, **settings})
    return MergeGate(given, Sources(workers, metrics, given), workers, replays, metrics, servers)


async def register(gate: MergeGate, name: str, folder: Path, seed: int, **make: Any) -> None:
    """Make an adapter, or replace it, and load it under its name."""
    tiny.make_adapter(seed, **make).save(folder / name, overwrite=True)
    async with gate.sources.changes:
        await gate.sources.serve(name, await gate.sources.copy(str(folder / name), {}))


# Clients of a gate


class KnownPace(Pace):
    """Merges take as many seconds as they have weight in their first source."""

    def seconds(self, plan: MergePlan) -> float:
        return float(plan.spec.sources[0].weight)


def budget(merges: int) -> float:
    """GiB for that many merges of the small sources."""
    return (merges + 0.5) * tiny.make_adapter(1, only=SMALL).nbytes / GIB


def small_worker(**more: Any) -> MergeWorker[Adapter]:
    """A worker that knows how large its merges are."""
    return worker(largest=tiny.make_adapter(1, only=SMALL).nbytes, **more)


async def two_small_sources(gate: MergeGate, folder: Path) -> None:
    """Register ``a`` and ``b``, which are small."""
    for seed, name in enumerate("ab", 1):
        await register(gate, name, folder, seed, only=SMALL)


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
