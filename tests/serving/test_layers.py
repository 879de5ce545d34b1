"""Each kind of vLLM's layers: what is merged into it, handed over to vLLM, or refused."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.lora import layers as lora_layers
from vllm.lora.layers import RowParallelLinearWithLoRA
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.model_executor.layers.linear import ReplicatedLinear

from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.engine import merge
from merged_lora.errors import PlanError
from merged_lora.vllm_plugin.hooks import models as model_hooks
from merged_lora.vllm_plugin.hooks import slots as slot_hooks
from slots import (
    OTHERS,
    CopyingBackend,
    activate,
    assert_same,
    contents,
    copied,
    filled,
    worker_manager,
    written,
)
from tiny import HIDDEN, VOCABULARY

pytestmark = pytest.mark.usefixtures("activation_hook")

QUERY = "model.layers.0.self_attn.q_proj"


class Keeping(RowParallelLinearWithLoRA):  # type: ignore[misc]
    """A layer of a class that the plugin does not know, which stores more of an adapter than A and B."""

    def set_lora(self, index: int, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        super().set_lora(index, lora_a, lora_b)
        self.kept = {index: lora_a.sum().item()}

    def reset_lora(self, index: int) -> None:
        super().reset_lora(index)
        self.kept = {index: 0.0}


OUTPUT = "text.layers.0.self_attn.o_proj"


def test_a_layer_of_an_unknown_kind_is_left_to_vllm(
    vllm_config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    manager = worker_manager(vllm_config, max_loras=1)
    layer = manager._adapter_manager.modules[OUTPUT]
    layer.__class__ = Keeping
    with pytest.raises(PlanError, match=rf"{OUTPUT} cannot be merged on a device"):
        written(manager, CopyingBackend(), "sum(sql)", sources)
    activate(manager, model_hooks.host_model(manager, 7, merge("sum(sql)", sources)))
    whole = merge("sum(sql)", sources).modules["model.layers.0.self_attn.o_proj"]
    assert layer.kept == {0: whole.a.float().sum().item()}
    activate(manager, written(manager, CopyingBackend(), "sum(keys)", sources))
    assert layer.kept == {0: 0.0}
    clean = worker_manager(vllm_config, max_loras=1)
    assert_same(contents(manager, 0), contents(clean, activate(clean, copied(clean, "sum(keys)", sources))))


HEADS = [
    kind
    for kind in vars(lora_layers).values()
    if isinstance(kind, type) and issubclass(kind, slot_hooks.ClassificationHead)
]
"""Classes of layers that hold a whole classification head for each adapter; there are none before 0.31."""


@pytest.mark.parametrize("kind", HEADS)
def test_a_slot_keeps_no_head_of_the_adapter_before(
    vllm_config: VllmConfig, sources: dict[str, Adapter], kind: Any
) -> None:
    manager = worker_manager(vllm_config, max_loras=1)
    head = kind(ReplicatedLinear(HIDDEN, 4, bias=False))
    head.create_lora_weights(1, manager.lora_config)
    manager._adapter_manager.modules["score"] = head
    for make in (functools.partial(written, backend=CopyingBackend()), filled):
        head.set_module_to_save(0, torch.ones(4, HIDDEN), None)
        head.lora_a_stacked[0].fill_(9.0)
        activate(manager, make(manager, spec="sum(keys)", sources=sources))
        assert not head.full_module_enabled.any()
        assert not head.full_weight_stacked.any()
        assert not head.lora_a_stacked[0].any()


def test_the_kinds_of_layers_are_those_of_the_newest_release() -> None:
    """A new class is left to vLLM until it was read; then it is listed in SUPPORTED_LAYERS, or here."""
    left = {"BaseLayerWithLoRA", "BaseClassificationHeadWithLoRA", "FusedMoE3DWithLoRA", "FusedMoEWithLoRA"}
    left |= {"Step5FusedQKVIndexerWithLoRA", "Step5SparseIndexerWWithLoRA"}
    there = {name for name in lora_layers.__all__ if name.endswith("LoRA")}
    assert there <= slot_hooks.SUPPORTED_LAYERS | left


def text_only(manager: Any) -> None:
    """Make vLLM treat the tiny model as multimodal, with the language model ``text``."""
    layers = manager._adapter_manager
    if not hasattr(layers, "_get_text_lora_names"):
        pytest.skip("this release has no adapters of the text model alone")
    layers.supports_mm = True
    layers.mm_mapping = SimpleNamespace(language_model=["text."])
    layers.model.hf_to_vllm_mapper = None


def test_adapters_of_the_text_model_alone_are_merged_for_a_multimodal_one(
    vllm_config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    clean = worker_manager(vllm_config)
    expected = contents(clean, activate(clean, copied(clean, "ties(sql, chat)", sources)))
    for make in (functools.partial(written, backend=CopyingBackend()), filled):
        manager = worker_manager(vllm_config)
        text_only(manager)
        slot = activate(manager, make(manager, spec="ties(sql, chat)", sources=sources))
        assert_same(contents(manager, slot), expected)


def test_sources_that_name_one_module_in_two_ways_are_refused(
    vllm_config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    manager = worker_manager(vllm_config)
    text_only(manager)
    keys = sources["keys"].modules["model.layers.0.self_attn.k_proj"]
    long = {"long": sources["keys"].moved({"text.layers.0.self_attn.k_proj": keys}), **sources}
    for make in (functools.partial(written, backend=CopyingBackend()), filled):
        with pytest.raises(PlanError, match=r"k_proj are one module of the model"):
            make(manager, spec="sum(keys, long)", sources=long)


def test_layers_of_another_form_get_whole_tensors(
    vllm_config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    manager, backend = worker_manager(vllm_config), CopyingBackend()
    activate(manager, written(manager, backend, "sum(ends, tails)", sources))
    assert backend.placed == [[]]
    assert backend.whole == [sorted(OTHERS)]


@pytest.mark.parametrize(
    ("modules", "embeddings", "words"),
    [
        ({QUERY: (HIDDEN, 32)}, [], f"{QUERY[5:]} has shape \\(64, 64\\) in the model"),
        ({QUERY: (32, HIDDEN)}, [], "another one in the adapters"),
        ({"model.layers.0.mixer": (HIDDEN, HIDDEN)}, [], "no module text.layers.0.mixer"),
        ({"model.layers.0.mlp.fused_proj": (48, HIDDEN)}, [], "\\(96, 64\\) in the model"),
        ({"lm_head": (VOCABULARY, 32)}, [], "lm_head has shape \\(320, 64\\)"),
        ({"lm_head": (VOCABULARY + 1, HIDDEN)}, [], "lm_head has shape \\(320, 64\\)"),
        ({"model.embed_tokens": (32, VOCABULARY)}, ["model.embed_tokens"], "embed_tokens has shape"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_it_is_merged(
    vllm_config: VllmConfig, modules: dict[str, tuple[int, int]], embeddings: list[str], words: str
) -> None:
    manager, backend = worker_manager(vllm_config), CopyingBackend()
    wrong = {"wrong": random_adapter(modules, 8, torch.bfloat16, embeddings=embeddings)}
    with pytest.raises(PlanError, match=words):
        written(manager, backend, "sum(wrong)", wrong)
    assert backend.staged == []
    with pytest.raises(PlanError, match=words):
        copied(manager, "sum(wrong)", wrong)


def test_what_does_not_fit_is_refused_while_a_step_activates_another_adapter(vllm_config: VllmConfig) -> None:
    manager = worker_manager(vllm_config)
    layers = manager._adapter_manager
    slot_map = model_hooks.slot_map_of(layers)  # as when a worker starts
    layers.modules = slot_map.left_to_vllm  # as the hook of activations has it for a moment
    wrong = {"wrong": random_adapter({QUERY: (HIDDEN, 32)}, 8, torch.bfloat16)}
    with pytest.raises(PlanError, match=f"{QUERY[5:]} has shape"):
        filled(manager, "sum(wrong)", wrong)


def test_an_output_head_with_fewer_tokens_is_filled_up_as_vllm_does(vllm_config: VllmConfig) -> None:
    manager = worker_manager(vllm_config)
    short = {"short": random_adapter({"lm_head": (VOCABULARY - 20, HIDDEN)}, 8, torch.bfloat16)}
    slot = activate(manager, written(manager, CopyingBackend(), "sum(short)", short))
    b = contents(manager, slot)["lm_head b 0"][0]
    assert b[: VOCABULARY - 20].any()
    assert not b[VOCABULARY - 20 :].any()


def test_experts_are_refused_with_the_way_out(vllm_config: VllmConfig, sources: dict[str, Adapter]) -> None:
    manager = worker_manager(vllm_config)
    manager._adapter_manager.modules["text.layers.0.self_attn"] = BaseLayerWithLoRA()
    with pytest.raises(PlanError, match=r"k_proj cannot be merged on a device.*--merged-lora-backend cpu"):
        written(manager, CopyingBackend(), "sum(keys)", sources)
