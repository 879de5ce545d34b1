"""The gate of an API server and its workers in one process, without vLLM: our adapters replace its models."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

import tiny
from merged_lora.adapters import Adapter
from merged_lora.backends import load_backend
from merged_lora.replay import Replayed
from merged_lora.spec import parse
from merged_lora.vllm_plugin.api_server.gate import MergeGate
from merged_lora.vllm_plugin.api_server.metrics import Metrics
from merged_lora.vllm_plugin.api_server.replaying import Replays, Tokens
from merged_lora.vllm_plugin.api_server.sources import Sources
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.rpc import Reply, agreed
from merged_lora.vllm_plugin.settings import Settings
from merged_lora.vllm_plugin.worker.makers import HostMaker
from merged_lora.vllm_plugin.worker.merge_worker import MergeWorker

Rate = Callable[[MergeIdentity, Tokens, Tokens], Awaitable[Replayed]]
LONGEST = 32
"""Most tokens of a prompt with its answer."""


class FolderAdapters:
    """Plain adapters read as sources are, in the place of vLLM's."""

    def find(self, path: str) -> Path:
        return Path(path)

    def read(self, path: str, options: Mapping[str, Any]) -> Adapter:
        return Adapter.load(path, drop=["modules_to_save"])

    def size(self, model: Adapter) -> int:
        return model.nbytes

    def scalings(self, model: Adapter) -> dict[str, float]:
        return {}

    def build(self, number: int, adapter: Adapter, scalings: Mapping[str, float]) -> Adapter:
        return adapter

    def copy(self, model: Adapter, number: int) -> Adapter:
        return model


def worker(limit: int = 1 << 30, adapters: FolderAdapters | None = None) -> MergeWorker[Adapter]:
    """A worker with our adapters in the place of vLLM's models.

    limit:    bytes for copies of adapters.
    adapters: reads plain adapters.
    """
    maker = HostMaker(load_backend("auto"), lambda _, adapter: adapter)
    return MergeWorker(16, limit, adapters or FolderAdapters(), maker)


def gate_with(
    merges: MergeWorker[Adapter],
    calls: list[str] | None = None,
    registry: CollectorRegistry | None = None,
    rate: Rate | None = None,
    **settings: Any,
) -> MergeGate:
    """A gate in front of one worker, with the alias ``mix``.

    merges:   the worker.
    calls:    receives the path of every merge that the worker is asked for.
    registry: registry of the metrics.
    rate:     the engine's answer to a request of a replay; by default, every answer is kept.
    settings: settings that differ from the defaults.
    """

    async def capture(*arguments: Any) -> Reply:
        await asyncio.sleep(0)
        return agreed([merges.capture(*arguments)])

    async def release(*arguments: Any) -> Reply:
        await asyncio.sleep(0)
        return agreed([merges.release(*arguments)])

    async def prepare(path: str) -> Reply:
        if calls is not None:
            calls.append(path)
        await asyncio.sleep(0)
        return agreed([merges.prepare(path, set())])

    async def exchanges(*arguments: Any) -> Reply:
        await asyncio.sleep(0)
        return agreed([merges.replay(*arguments)])

    async def kept(merge: MergeIdentity, prompt: Tokens, answer: Tokens) -> Replayed:
        return Replayed(True, -0.5 * len(answer), len(answer))

    metrics = Metrics(registry or CollectorRegistry())
    replays = Replays(exchanges, rate or kept, LONGEST, metrics)
    given = Settings(enable=True, **{"aliases": {"mix": parse("ties(a, b)")}, **settings})
    sources = Sources(capture, release, metrics, given.source_dir)
    return MergeGate(given, sources, prepare, replays, metrics)


async def register(gate: MergeGate, name: str, folder: Path, seed: int, **make: Any) -> None:
    """Make an adapter, or replace it, and load it under its name."""
    tiny.make_adapter(seed, **make).save(folder / name, overwrite=True)
    async with gate.sources.changes:
        await gate.sources.serve(name, await gate.sources.copy(str(folder / name), {}))
