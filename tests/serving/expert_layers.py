"""vLLM's own Qwen3-MoE without an engine: its layers for experts, and a worker around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading

from gates import captured, prepared
from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.backends import load_backend
from merged_lora.spec import parse
from merged_lora.vllm_plugin.hooks import models as model_hooks
from merged_lora.vllm_plugin.hooks.worker import VllmPlainAdapters
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.worker.makers import HostMaker, Maker
from merged_lora.vllm_plugin.worker.merge_worker import MergeWorker
from slots import activate
from tiny import MAX_RANK, VOCABULARY

EXPERTS, HIDDEN, INNER, LAYERS = 4, 64, 32, 2
HOLDERS = [f"model.layers.{layer}.mlp.experts" for layer in range(LAYERS)]
ATTENTION = {f"model.layers.{layer}.self_attn.q_proj": (HIDDEN, HIDDEN) for layer in range(LAYERS)}
APART = {
    f"{holder}.{expert}.{name}": shape
    for holder in HOLDERS
    for expert in range(EXPERTS)
    for name, shape in {
        "gate_proj": (INNER, HIDDEN),
        "up_proj": (INNER, HIDDEN),
        "down_proj": (HIDDEN, INNER),
    }.items()
}
"""The modules of every expert, apart."""
WHOLE = {
    f"{holder}.{parameter}[{expert}]": shape
    for holder in HOLDERS
    for parameter, shape in {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}.items()
    for expert in range(EXPERTS)
}
"""The experts of the parameters of transformers."""
STACKED = {
    f"{holder}.{parameter}[{expert}]": shape
    for holder in HOLDERS
    for parameter, shape in {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}.items()
    for expert in range(EXPERTS)
}
"""The experts of stacks, as --enable-moe-shared-loras takes them."""


def adapter(modules: Mapping[str, tuple[int, int]], seed: int, rank: int = 4) -> Adapter:
    return replace(random_adapter(modules, rank, torch.bfloat16, seed), calibration=None)


def sharing(seed: int, rank: int = 4) -> Adapter:
    """An adapter whose experts share A of w1 and w3, and B of w2."""
    own = adapter({**STACKED, **ATTENTION}, seed, rank)
    firsts = {name: own.modules[f"{name.partition('[')[0]}[0]"] for name in STACKED}
    shared = {
        name: replace(own.modules[name], b=first.b)
        if ".w2" in name
        else replace(own.modules[name], a=first.a)
        for name, first in firsts.items()
    }
    return Adapter({**own.modules, **shared})


class Place:
    """A worker around vLLM's own Qwen3-MoE, and the adapters that it captured."""

    def __init__(self, manager: Any, folder: Path) -> None:
        self.manager, self.layers, self.folder = manager, manager._adapter_manager, folder
        self.adapters = VllmPlainAdapters(manager)
        build = lambda number, merged: model_hooks.host_model(manager, number, merged)  # noqa: E731
        self.worker = self._worker(HostMaker(load_backend("cpu"), build, self.adapters.size))
        self.keys: dict[str, str] = {}

    def _worker(self, made: Maker[LoRAModel]) -> MergeWorker[LoRAModel]:
        return MergeWorker(MAX_RANK, 1 << 30, self.adapters, made)

    def capture(self, name: str, adapter: Adapter, options: Mapping[str, Any] | None = None) -> Any:
        path = str(self.folder / name)
        adapter.save(path)
        reply = captured(self.worker, "one", None, path, options)
        self.keys[name] = reply.get("key", "")
        return reply

    def prepare(self, spec: str) -> tuple[Any, str]:
        parsed = parse(spec)
        identity = MergeIdentity(parsed, tuple(self.keys[name] for name in parsed.names))
        return prepared(self.worker, identity.path), identity.path

    def slot(self, spec: str) -> dict[str, torch.Tensor]:
        """What the layers hold of a merge of captured adapters."""
        reply, path = self.prepare(spec)
        assert reply["ok"], reply
        return self.held(self.worker.load_merge(path))

    def read(self, name: str, **options: Any) -> dict[str, torch.Tensor]:
        """What the layers hold of an adapter that vLLM reads from disk and serves."""
        return self.held(self.adapters.read(str(self.folder / name), options))

    def held(self, lora: LoRAModel) -> dict[str, torch.Tensor]:
        slot = activate(self.manager, lora)
        found = {}
        for name, layer in self.layers.modules.items():
            for kind in ("w13_lora_a", "w13_lora_b", "w2_lora_a", "w2_lora_b", "lora_a", "lora_b"):
                tensors = getattr(layer, f"{kind}_stacked", ())
                if kind.startswith("lora") and "experts" in name:
                    continue  # vLLM's views of the same memory
                for i, tensor in enumerate(tensors if isinstance(tensors, tuple) else (tensors,)):
                    found[f"{name} {kind} {i}"] = tensor[slot].clone()
        return found


def make_manager(folder: Path, three: bool, **flags: bool) -> Any:
    """What the plugin needs of vLLM's manager in a worker, around a real Qwen3-MoE with empty weights.

    three: whether vLLM takes the experts' parameters of this model, as for Qwen3.5-MoE.
    flags: of ``LoRAConfig``.
    """
    lora_config = LoRAConfig(
        max_lora_rank=MAX_RANK, max_loras=2, max_cpu_loras=4, lora_dtype=torch.float32, **flags
    )
    model_config = ModelConfig(
        model=str(folder), dtype="float32", max_model_len=256, skip_tokenizer_init=True
    )
    config = VllmConfig(model_config=model_config, lora_config=lora_config)
    with set_current_vllm_config(config):
        model = initialize_model(config)
        process_weights_after_loading(model, model_config, torch.device("cpu"))
        model.is_3d_moe_weight = three
        layers = LRUCacheLoRAModelManager(model, 8, 64, VOCABULARY, lora_config, torch.device("cpu"), config)
    manager: Any = LRUCacheWorkerLoRAManager.__new__(LRUCacheWorkerLoRAManager)
    manager._adapter_manager = layers
    manager._lora_model_cls = LoRAModel
    manager.lora_config = lora_config
    manager.max_position_embeddings = 256
    manager.vocab_size = VOCABULARY
    manager.device = torch.device("cpu")
    return manager


def make_config(folder: Path) -> Path:
    """The folder with the configuration of a Qwen3-MoE, which has no weights."""
    make: Any = Qwen3MoeConfig
    config = make(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=160,
        moe_intermediate_size=INNER,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        architectures=["Qwen3MoeForCausalLM"],
    )
    config.save_pretrained(folder)
    return folder
