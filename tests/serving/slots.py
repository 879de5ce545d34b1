"""vLLM's own layers without an engine, and a backend that writes into their slots by plain copies."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.utils import WeightsMapper

from merged_lora.adapters import Adapter
from merged_lora.backends import Progress, Result, Slot, StagedMerge, load_backend, no_progress
from merged_lora.engine import merge, run
from merged_lora.factors import Factors
from merged_lora.plan import MergePlan
from merged_lora.planning import make_plan
from merged_lora.spec import parse
from merged_lora.triton_kernels.packed import view_like
from merged_lora.triton_kernels.results import Outline
from merged_lora.vllm_plugin.hooks import models as model_hooks
from merged_lora.vllm_plugin.hooks import slots as slot_hooks
from merged_lora.vllm_plugin.hooks.wrapping import ATTRIBUTE
from merged_lora.vllm_plugin.worker.makers import SlotMaker
from tiny import HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS, MAX_RANK, VOCABULARY

FUSED = (48, 32, 16)  # one module of an adapter, three slices in vLLM

OTHERS = {
    "model.embed_tokens": (HIDDEN, VOCABULARY),
    "model.layers.0.mlp.fused_proj": (sum(FUSED), HIDDEN),
    "lm_head": (VOCABULARY, HIDDEN),
}
"""Modules whose layers take whole tensors through vLLM's own code."""


class CopyingBackend:
    """The backend ``cpu`` behind the interface of those that fill slots; remembers what it did.

    reserved, reason, largest: of the last reservation, and of all of them.
    staged:   plans of the merges that were made.
    compiled: names of the modules that kernels were compiled for, one list for each call.
    placed:   names of the modules that were put into slots, one list for each call.
    whole:    names of the modules that were returned as whole tensors, one list for each call.
    """

    name = "copying"

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.reserved: list[int] = []
        self.reason = ""
        self.largest: int | None = None
        self.warmed: list[torch.dtype] = []
        self.staged: list[MergePlan] = []
        self.compiled: list[list[str]] = []
        self.placed: list[list[str]] = []
        self.whole: list[list[str]] = []
        self._staging = torch.empty(0, dtype=torch.uint8)

    def reserve(self, nbytes: int, reason: str = "", largest: int | None = None) -> None:
        self.reserved.append(nbytes)
        self.reason, self.largest = reason, largest

    def adopt(self, adapter: Adapter) -> Adapter:
        return adapter

    def warm_up(self, dtype: torch.dtype) -> None:
        self.warmed.append(dtype)

    def confine(self, threads: int, nice: int) -> None:
        load_backend("cpu").confine(threads, nice)

    def make_room(self, progress: Progress) -> None:
        """Ignored."""

    def merge(self, plan: MergePlan, progress: Progress = no_progress) -> Result:
        return load_backend("cpu").merge(plan, progress)

    def stage(self, plan: MergePlan, dtype: torch.dtype, progress: Progress = no_progress) -> StagedMerge:
        self.staged.append(plan)
        merged = self.merge(plan, progress)
        outline = Outline(plan, [list(plan.modules)], dtype)
        host = torch.empty(outline.nbytes, dtype=torch.uint8)
        modules = outline.modules(host, list(plan.modules))
        for name, factors in modules.items():
            factors.a.copy_(merged.modules[name].a)
            factors.b.copy_(merged.modules[name].b)
        return StagedMerge(host, modules, Result({}, merged.energy, merged.repeated))

    def compile(self, staged: StagedMerge, slots: Mapping[str, Slot], empty: Sequence[Slot] = ()) -> None:
        self.compiled.append(sorted(slots))

    def place(
        self,
        staged: StagedMerge,
        slots: Mapping[str, Slot],
        empty: Sequence[Slot] = (),
        whole: Collection[str] = (),
    ) -> dict[str, Factors]:
        self.placed.append(sorted(slots))
        self.whole.append(sorted(whole))
        self._staging.fill_(255)  # NaN, in what was returned before
        self._staging = staged.host.clone()
        for slot in (*slots.values(), *empty):
            slot.a.zero_()
            slot.b.zero_()
        for name, slot in slots.items():
            merged = staged.modules[name]
            sides = (slot.a, merged.a, slot.begin_a), (slot.b, merged.b, slot.begin_b)
            for target, factor, (row, column) in sides:
                part = factor[row : row + target.shape[0], column : column + target.shape[1]]
                target[: part.shape[0], : part.shape[1]] = part
        return {name: self._copied(staged, staged.modules[name]) for name in whole}

    def _copied(self, staged: StagedMerge, f: Factors) -> Factors:
        """A module in the copy of a merge."""
        begin = staged.host.data_ptr()
        a, b = (view_like(self._staging, t.data_ptr() - begin, t) for t in (f.a, f.b))
        return Factors(a, b, f.scaling, f.embedding)


class Attention(nn.Module):
    """Three modules of an adapter in one layer, and one that is alone."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = QKVParallelLinear(HIDDEN, HIDDEN // HEADS, HEADS, KV_HEADS, bias=False)
        self.o_proj = RowParallelLinear(HIDDEN, HIDDEN, bias=False)


class Mlp(nn.Module):
    """Two modules of an adapter in one layer; one of an adapter in three slices."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(HIDDEN, [INTERMEDIATE] * 2, bias=False)
        self.down_proj = RowParallelLinear(INTERMEDIATE, HIDDEN, bias=False)
        self.fused_proj = MergedColumnParallelLinear(HIDDEN, list(FUSED), bias=False)


class Block(nn.Module):
    """One layer, with the names that Llama has."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = Mlp()


class Model(nn.Module, SupportsLoRA):  # type: ignore[misc]
    """The layers of the tiny Llama, whose names an adapter gives with ``model.`` before them."""

    packed_modules_mapping = {  # noqa: RUF012
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}  # noqa: RUF012
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"model.": "text."})
    config = None

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Module()
        self.text.embed_tokens = VocabParallelEmbedding(VOCABULARY, HIDDEN)
        self.text.layers = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.lm_head = ParallelLMHead(VOCABULARY, HIDDEN)
        self.logits_processor = LogitsProcessor(VOCABULARY)


@contextmanager
def distributed(folder: Path) -> Iterator[VllmConfig]:
    """What vLLM's layers need around them, for one process."""
    config = VllmConfig()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder / 'store'}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        try:
            yield config
        finally:
            cleanup_dist_env_and_memory()


def worker_manager(
    config: VllmConfig, max_loras: int = 2, rank: int = 0, ranks: int = 1, fully_sharded: bool = False
) -> Any:
    """What the plugin needs of vLLM's manager in a worker, around its real manager of layers.

    rank, ranks: of tensor parallel, for linear layers; no other rank is there.
    """
    lora_config = LoRAConfig(
        max_lora_rank=MAX_RANK,
        max_loras=max_loras,
        max_cpu_loras=4,
        lora_dtype=torch.float32,
        fully_sharded_loras=fully_sharded,
    )
    with (
        set_current_vllm_config(config),
        patch.object(linear, "get_tensor_model_parallel_rank", lambda: rank),
        patch.object(linear, "get_tensor_model_parallel_world_size", lambda: ranks),
    ):
        layers = LRUCacheLoRAModelManager(
            Model(), 8, 64, VOCABULARY, lora_config, torch.device("cpu"), config
        )
    return SimpleNamespace(
        _adapter_manager=layers,
        _lora_model_cls=LoRAModel,
        lora_config=lora_config,
        max_position_embeddings=256,
        vocab_size=VOCABULARY,
        device=torch.device("cpu"),
    )


def activate(manager: Any, lora: LoRAModel) -> int:
    """Hand the adapter over as vLLM's worker does; returns its slot."""
    layers = manager._adapter_manager
    layers.remove_adapter(lora.id)
    if len(layers) + 1 > layers.capacity:
        layers.remove_oldest_adapter()
    layers.add_adapter(lora)
    layers.activate_adapter(lora.id)
    slot: int = layers.lora_index_to_id.index(lora.id)
    return slot


def contents(manager: Any, slot: int) -> dict[str, torch.Tensor]:
    """Copies of all that the layers hold in one slot."""
    return {
        f"{name} {side} {i}": tensor[slot].clone()
        for name, layer in manager._adapter_manager.modules.items()
        for side, stacked in (("a", layer.lora_a_stacked), ("b", layer.lora_b_stacked))
        for i, tensor in enumerate(stacked if isinstance(stacked, tuple) else (stacked,))
    }


def maker(manager: Any, backend: CopyingBackend) -> SlotMaker[LoRAModel]:
    """The maker of a worker."""
    build = functools.partial(model_hooks.slot_model, manager)
    equip = functools.partial(model_hooks.attach_slot_writer, manager, backend)
    return SlotMaker(backend, manager.lora_config.lora_dtype, build, equip)


def written(manager: Any, backend: CopyingBackend, spec: str, sources: Mapping[str, Adapter]) -> LoRAModel:
    """A merge that a device has made, to be put into slots."""
    return maker(manager, backend).make(7, make_plan(parse(spec), sources, MAX_RANK)).model


def copied(manager: Any, spec: str, sources: Mapping[str, Adapter]) -> LoRAModel:
    """The same merge in host memory, which vLLM copies into slots with its own code."""
    merged = merge(spec, sources, backend="cpu", rank=MAX_RANK)
    return model_hooks.lora_model(manager, 7, merged, "cpu")


def filled(manager: Any, spec: str, sources: Mapping[str, Adapter]) -> LoRAModel:
    """The same merge in host memory, which is copied into slots all at once."""
    merged = run(make_plan(parse(spec), sources, MAX_RANK), "cpu").adapter
    lora = model_hooks.host_model(manager, 7, merged)
    assert isinstance(getattr(lora, ATTRIBUTE), slot_hooks.HostSlotWriter)
    return lora


def assert_same(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


def stacked(manager: Any) -> list[torch.Tensor]:
    """Every tensor that holds slots."""
    return [
        tensor
        for layer in manager._adapter_manager.modules.values()
        for pair in (layer.lora_a_stacked, layer.lora_b_stacked)
        for tensor in (pair if isinstance(pair, tuple) else (pair,))
    ]
