"""Layers of one rank of several: slots hold this rank's shard of a merge."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.lora.layers import ColumnParallelLinearWithLoRA
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.linear import MergedColumnParallelLinear

import tiny
from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.engine import merge, plan
from merged_lora.errors import PlanError
from merged_lora.spec import parse
from merged_lora.vllm_plugin.hooks import slots as slot_hooks
from slots import (
    CopyingBackend,
    activate,
    assert_same,
    contents,
    copied,
    filled,
    stacked,
    worker_manager,
    written,
)
from tiny import HIDDEN, MAX_RANK

pytestmark = pytest.mark.usefixtures("activation_hook")


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["", "fully sharded"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("spec", ["linear(sql, chat)", "sum(sql, chat)", "sum(keys)", "ties(ends, tails)"])
def test_a_rank_holds_the_shards_that_vllm_would_have_copied(
    vllm_config: VllmConfig, sources: dict[str, Adapter], spec: str, rank: int, fully_sharded: bool
) -> None:
    if fully_sharded and "ends" in spec:
        pytest.skip("vLLM gives a layer of three slices no fully sharded LoRA")

    def manager() -> Any:
        made = worker_manager(vllm_config, 1, rank, 2, fully_sharded)
        for tensor in stacked(made):
            tensor.fill_(9.0)
        return made

    clean = manager()
    expected = contents(clean, activate(clean, copied(clean, spec, sources)))
    for make in (functools.partial(written, backend=CopyingBackend()), filled):
        made = manager()
        assert_same(contents(made, activate(made, make(made, spec=spec, sources=sources))), expected)
    assert any(tensor.any() for tensor in expected.values())


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["", "fully sharded"])
def test_all_sharded_layers_of_a_rank_are_filled_at_once(
    vllm_config: VllmConfig, sources: dict[str, Adapter], fully_sharded: bool
) -> None:
    manager, backend = worker_manager(vllm_config, 2, 1, 2, fully_sharded), CopyingBackend()
    lora = written(manager, backend, "linear(sql, chat)", sources)
    activate(manager, lora)
    assert backend.placed == backend.compiled == [sorted(tiny.MODULES)]


def test_a_layer_that_vllm_puts_together_of_several_parts_is_handed_over_to_it(
    vllm_config: VllmConfig,
) -> None:
    manager, backend = worker_manager(vllm_config), CopyingBackend()
    layers = manager._adapter_manager
    name = "text.layers.0.mlp.two_proj"  # as Phi-3's gate_up_proj: one module of an adapter, two slices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "get_tensor_model_parallel_rank", lambda: 1)
        patch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: 2)
        with set_current_vllm_config(vllm_config):
            two = ColumnParallelLinearWithLoRA(MergedColumnParallelLinear(HIDDEN, [48, 48], bias=False))
    two.create_lora_weights(2, manager.lora_config)
    layers.modules[name] = two
    adapters = {"a": random_adapter({name: (96, HIDDEN)}, 8)}
    slot_map = slot_hooks.SlotMap(layers)
    assert name not in slot_map.shards
    merges = plan(parse("sum(a)"), adapters)
    staged = backend.stage(merges, torch.float32)
    slot_hooks.DeviceSlotWriter(backend, staged, slot_map, {name: name}).write(0)
    b = adapters["a"].modules[name].b  # the weight is on A
    assert torch.equal(two.lora_b_stacked[0][0, 0, :, :8], torch.cat([b[24:48], b[72:]]))


def test_a_sharded_layer_takes_its_shard_of_the_whole_merge(
    vllm_config: VllmConfig, sources: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, backend = worker_manager(vllm_config), CopyingBackend()
    name = "text.layers.0.mlp.down_proj"
    layer = manager._adapter_manager.modules[name]
    half = layer.input_size // 2
    monkeypatch.setattr(layer, "tp_size", 2)
    monkeypatch.setattr(layer, "tp_rank", 1)
    monkeypatch.setattr(layer, "input_size", half)
    layer.lora_a_stacked = (torch.full((2, 1, MAX_RANK, half), 9.0),)
    slot = activate(manager, written(manager, backend, "linear(sql, chat)", sources))
    whole = merge("linear(sql, chat)", sources, backend="cpu").modules["model.layers.0.mlp.down_proj"]
    got = layer.lora_a_stacked[0][slot, 0]
    assert torch.equal(got[:8], whole.a[:, half:].float())
    assert not got[8:].any()
    assert torch.equal(layer.lora_b_stacked[0][slot, 0, :, :8], whole.b.float())


def test_a_shape_is_checked_on_a_sharded_layer_too(
    vllm_config: VllmConfig, sources: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = worker_manager(vllm_config)
    layer = manager._adapter_manager.modules["text.layers.0.self_attn.qkv_proj"]
    monkeypatch.setattr(layer, "tp_size", 2)
    wrong = {"wrong": random_adapter({"model.layers.0.self_attn.k_proj": (64, HIDDEN)}, 8, torch.bfloat16)}
    with pytest.raises(PlanError, match=r"k_proj has shape \(32, 64\)"):
        written(manager, CopyingBackend(), "sum(wrong)", wrong)
    written(manager, CopyingBackend(), "sum(keys)", sources)
