"""Merges written straight into the slots of vLLM's own layers, without an engine."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.lora import layers as lora_layers
from vllm.lora.layers import ColumnParallelLinearWithLoRA, RowParallelLinearWithLoRA
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear
from vllm.utils import gpu_sync_debug

import slots
import tiny
from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.backends import load_backend
from merged_lora.engine import merge, plan
from merged_lora.errors import BackendError, PlanError
from merged_lora.peft_files import tensors_of
from merged_lora.spec import parse
from merged_lora.triton_kernels.packed import DeviceSources
from merged_lora.vllm_plugin.hooks import models as model_hooks
from merged_lora.vllm_plugin.hooks import slots as slot_hooks
from merged_lora.vllm_plugin.hooks import worker as worker_hooks
from merged_lora.vllm_plugin.hooks.wrapping import ATTRIBUTE
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.settings import Settings
from merged_lora.vllm_plugin.worker.makers import HostMaker, Maker, SlotMaker
from merged_lora.vllm_plugin.worker.merge_worker import LIGHT_MERGES, MergeWorker
from slots import CopyingBackend, activate, contents
from tiny import HIDDEN, MAX_RANK, SPECS, VOCABULARY

OTHERS = {
    "model.embed_tokens": (HIDDEN, VOCABULARY),
    "model.layers.0.mlp.fused_proj": (sum(slots.FUSED), HIDDEN),
    "lm_head": (VOCABULARY, HIDDEN),
}
"""Modules whose layers take whole tensors through vLLM's own code."""

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmConfig]:
    """vLLM's configuration, with its groups of processes made for one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_HOST_IP", "127.0.0.1")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        with slots.distributed(tmp_path_factory.mktemp("distributed")) as made:
            yield made


@pytest.fixture(autouse=True)
def hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one hook that activation goes through."""
    original = vars(LoRAModelManager)["activate_adapter"]
    monkeypatch.setattr(LoRAModelManager, "activate_adapter", worker_hooks.wrap_activate_adapter(original))


@pytest.fixture(scope="module")
def sources() -> dict[str, Adapter]:
    """The adapters that SPECS names, and two of the modules in OTHERS."""
    return {
        "sql": tiny.make_adapter(1),
        "chat": tiny.make_adapter(2, scaling=1.0),
        "tone": tiny.make_adapter(3),
        "attention": tiny.make_adapter(4, only="self_attn"),
        "keys": tiny.make_adapter(5, only="0.self_attn.k_proj"),
        "ends": random_adapter(OTHERS, 8, torch.bfloat16, 6, embeddings=["model.embed_tokens"]),
        "tails": random_adapter(OTHERS, 8, torch.bfloat16, 7, embeddings=["model.embed_tokens"]),
    }


def maker(manager: Any, backend: CopyingBackend) -> SlotMaker[LoRAModel]:
    """The maker of a worker."""
    build = functools.partial(model_hooks.slot_model, manager, backend)
    return SlotMaker(backend, build, model_hooks.compile_slot_writer)


def written(manager: Any, backend: CopyingBackend, spec: str, sources: Mapping[str, Adapter]) -> LoRAModel:
    """A merge to be written into slots."""
    return maker(manager, backend).prepare(7, plan(parse(spec), sources, MAX_RANK))[0]


def copied(manager: Any, spec: str, sources: Mapping[str, Adapter]) -> LoRAModel:
    """The same merge in host memory, which vLLM copies into slots with its own code."""
    merged = merge(spec, sources, backend="cpu", rank=MAX_RANK)
    return model_hooks.lora_model(manager, 7, merged, "cpu")


def filled(manager: Any, spec: str, sources: Mapping[str, Adapter]) -> LoRAModel:
    """The same merge in host memory, which is copied into slots all at once."""
    merged = merge(spec, sources, backend="cpu", rank=MAX_RANK)
    lora = model_hooks.host_model(manager, 7, merged)
    assert isinstance(getattr(lora, ATTRIBUTE), slot_hooks.HostSlotWriter)
    return lora


def assert_same(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


@pytest.mark.parametrize("spec", [*SPECS.values(), "ties(ends, tails)", "sum(keys, ends)"])
def test_a_slot_holds_what_vllm_would_have_copied_into_it(
    config: VllmConfig, sources: dict[str, Adapter], spec: str
) -> None:
    manager = slots.worker_manager(config)
    expected = contents(manager, activate(manager, copied(manager, spec, sources)))
    for make in (functools.partial(written, backend=CopyingBackend()), filled):
        manager = slots.worker_manager(config)
        got = contents(manager, activate(manager, make(manager, spec=spec, sources=sources)))
        assert_same(got, expected)
        assert any(tensor.any() for tensor in got.values())


@pytest.mark.parametrize("spec", ["sum(keys)", "sum(attention)", "sum(ends)"])
def test_nothing_is_left_of_the_slots_last_tenant(
    config: VllmConfig, sources: dict[str, Adapter], spec: str
) -> None:
    manager = slots.worker_manager(config, max_loras=1)
    expected = contents(manager, activate(manager, copied(manager, spec, sources)))
    for make in (functools.partial(written, backend=CopyingBackend()), filled):
        for tensor in stacked(manager):
            tensor.fill_(9.0)
        slot = activate(manager, make(manager, spec=spec, sources=sources))
        assert_same(contents(manager, slot), expected)


def test_a_slot_that_was_filled_is_cleared_of_larger_ranks_and_other_modules(
    config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    manager = slots.worker_manager(config, max_loras=1)
    specs = (
        "sum(sql, chat)",
        "sum(keys)",
        "linear(sql, chat)",
        "",
        "sum(keys)",
        "sum(ends)",
        "sum(attention)",
    )
    for spec in specs:
        if not spec:  # an adapter that vLLM copies itself, of a rank larger than the last
            activate(manager, copied(manager, "sum(sql, chat)", sources))
            continue
        got = contents(manager, activate(manager, filled(manager, spec, sources)))
        clean = slots.worker_manager(config, max_loras=1)
        assert_same(got, contents(clean, activate(clean, copied(clean, spec, sources))))


def test_a_slot_in_which_vllm_failed_halfway_is_cleared_by_the_next_merge(
    config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    manager = slots.worker_manager(config, max_loras=1)
    activate(manager, filled(manager, "linear(sql, chat)", sources))
    broken = copied(manager, "sum(sql, chat)", sources)  # of rank 16
    broken.loras["text.layers.1.mlp.down_proj"].lora_a = torch.ones(MAX_RANK + 1, 3)
    with pytest.raises(RuntimeError):
        activate(manager, broken)
    got = contents(manager, activate(manager, filled(manager, "linear(sql, chat)", sources)))
    clean = slots.worker_manager(config, max_loras=1)
    assert_same(got, contents(clean, activate(clean, copied(clean, "linear(sql, chat)", sources))))


def test_a_merge_that_fills_its_slot_halfway_is_not_active_and_is_filled_anew(
    config: VllmConfig, sources: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, backend = slots.worker_manager(config, max_loras=1), CopyingBackend()
    lora = written(manager, backend, "linear(sql, chat)", sources)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            activate(manager, lora)
    layers = manager._adapter_manager
    assert layers.lora_index_to_id == [None]
    assert layers.activate_adapter(lora.id)
    clean = slots.worker_manager(config, max_loras=1)
    expected = contents(clean, activate(clean, copied(clean, "linear(sql, chat)", sources)))
    assert_same(contents(manager, 0), expected)


class Keeping(RowParallelLinearWithLoRA):  # type: ignore[misc]
    """A layer of a kind that the plugin has never seen, which keeps more of an adapter than A and B."""

    def set_lora(self, index: int, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        super().set_lora(index, lora_a, lora_b)
        self.kept = {index: lora_a.sum().item()}

    def reset_lora(self, index: int) -> None:
        super().reset_lora(index)
        self.kept = {index: 0.0}


OUTPUT = "text.layers.0.self_attn.o_proj"


def test_a_layer_of_an_unknown_kind_is_left_to_vllm(config: VllmConfig, sources: dict[str, Adapter]) -> None:
    manager = slots.worker_manager(config, max_loras=1)
    layer = manager._adapter_manager.modules[OUTPUT]
    layer.__class__ = Keeping
    with pytest.raises(PlanError, match=rf"{OUTPUT} cannot be merged on a device"):
        written(manager, CopyingBackend(), "sum(sql)", sources)
    activate(manager, model_hooks.host_model(manager, 7, merge("sum(sql)", sources)))
    whole = merge("sum(sql)", sources).modules["model.layers.0.self_attn.o_proj"]
    assert layer.kept == {0: whole.a.float().sum().item()}
    activate(manager, written(manager, CopyingBackend(), "sum(keys)", sources))
    assert layer.kept == {0: 0.0}
    clean = slots.worker_manager(config, max_loras=1)
    assert_same(contents(manager, 0), contents(clean, activate(clean, copied(clean, "sum(keys)", sources))))


HEADS = [
    kind
    for kind in vars(lora_layers).values()
    if isinstance(kind, type) and issubclass(kind, slot_hooks.ClassificationHead)
]
"""Classes of layers that hold a whole classification head for each adapter; vLLM 0.31 brought the first."""


@pytest.mark.parametrize("kind", HEADS)
def test_a_slot_keeps_no_head_of_the_adapter_before(
    config: VllmConfig, sources: dict[str, Adapter], kind: Any
) -> None:
    manager = slots.worker_manager(config, max_loras=1)
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
    """One that is new is left to vLLM until it was read; then it stands in SUPPORTED_LAYERS, or here."""
    left = {"BaseLayerWithLoRA", "BaseClassificationHeadWithLoRA", "FusedMoE3DWithLoRA", "FusedMoEWithLoRA"}
    left |= {"Step5FusedQKVIndexerWithLoRA", "Step5SparseIndexerWWithLoRA"}
    there = {name for name in lora_layers.__all__ if name.endswith("LoRA")}
    assert there <= slot_hooks.SUPPORTED_LAYERS | left


def text_only(manager: Any) -> None:
    """Make the tiny model one that vLLM takes for multimodal, its language model being ``text``."""
    layers = manager._adapter_manager
    if not slot_hooks.HAS_TEXT_NAMES:
        pytest.skip("this release has no adapters of the text model alone")
    layers.supports_mm = True
    layers.mm_mapping = SimpleNamespace(language_model=["text."])
    layers.model.hf_to_vllm_mapper = None


def test_adapters_of_the_text_model_alone_are_merged_for_a_multimodal_one(
    config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    clean = slots.worker_manager(config)
    expected = contents(clean, activate(clean, copied(clean, "ties(sql, chat)", sources)))
    for make in (functools.partial(written, backend=CopyingBackend()), filled):
        manager = slots.worker_manager(config)
        text_only(manager)
        slot = activate(manager, make(manager, spec="ties(sql, chat)", sources=sources))
        assert_same(contents(manager, slot), expected)


def test_sources_that_name_one_module_in_two_ways_are_refused(
    config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    manager = slots.worker_manager(config)
    text_only(manager)
    keys = sources["keys"].modules["model.layers.0.self_attn.k_proj"]
    long = {"long": sources["keys"].moved({"text.layers.0.self_attn.k_proj": keys}), **sources}
    for make in (functools.partial(written, backend=CopyingBackend()), filled):
        with pytest.raises(PlanError, match=r"k_proj are one module of the model"):
            make(manager, spec="sum(keys, long)", sources=long)


def test_mixed_ranks_are_read_off_the_tensors(
    config: VllmConfig, sources: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_one_rank(cls: type[LoRALayerWeights], name: str, helper: PEFTHelper, *_: str) -> LoRALayerWeights:
        return cls(name, helper.r, helper.lora_alpha, None, None, 1.0)  # as vLLM did before 0.32

    spec = "svd(sql, chat, ends, rank=16)"
    manager = slots.worker_manager(config)
    expected = contents(manager, activate(manager, copied(manager, spec, sources)))
    monkeypatch.setattr(LoRALayerWeights, "from_config", classmethod(of_one_rank))
    manager = slots.worker_manager(config)
    assert_same(contents(manager, activate(manager, filled(manager, spec, sources))), expected)


@pytest.mark.parametrize("spec", ["ties(sql, chat)", "ties(ends, tails)"])
def test_each_slot_has_its_own_merge(config: VllmConfig, sources: dict[str, Adapter], spec: str) -> None:
    manager, backend = slots.worker_manager(config), CopyingBackend()
    other, _ = maker(manager, backend).prepare(8, plan(parse("sum(tone, tails)"), sources))
    first = activate(manager, other)
    before = contents(manager, first)
    second = activate(manager, written(manager, backend, spec, sources))
    assert first != second
    assert_same(contents(manager, first), before)
    other = slots.worker_manager(config)
    expected = contents(other, activate(other, copied(other, spec, sources)))
    assert_same(contents(manager, second), expected)


def test_a_module_the_merge_lacks_is_zeroed_though_the_adapter_has_a_stranger_of_its_name(
    config: VllmConfig,
) -> None:
    manager, backend = slots.worker_manager(config), CopyingBackend()
    name = "text.layers.0.self_attn.o_proj"
    stranger = {"a": random_adapter({name: (HIDDEN, HIDDEN)}, 8)}
    slot_map = slot_hooks.SlotMap(manager._adapter_manager)
    slot_hooks.DeviceSlotWriter(backend, plan(parse("sum(a)"), stranger), slot_map, {}).write(0)
    assert not any(tensor.any() for tensor in contents(manager, 0).values())


def stacked(manager: Any) -> list[torch.Tensor]:
    """Every tensor that holds slots."""
    return [
        tensor
        for layer in manager._adapter_manager.modules.values()
        for pair in (layer.lora_a_stacked, layer.lora_b_stacked)
        for tensor in (pair if isinstance(pair, tuple) else (pair,))
    ]


def test_all_linear_layers_of_one_device_are_written_at_once(
    config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    manager, backend = slots.worker_manager(config), CopyingBackend()
    activate(manager, written(manager, backend, "sum(sql, chat)", sources))
    assert backend.written == [sorted(tiny.MODULES)]


def test_layers_of_another_form_are_merged_one_by_one(
    config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    manager, backend = slots.worker_manager(config), CopyingBackend()
    activate(manager, written(manager, backend, "sum(ends, tails)", sources))
    assert sorted(backend.written[1:]) == sorted([name] for name in OTHERS)


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["", "fully sharded"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("spec", ["linear(sql, chat)", "sum(sql, chat)", "sum(keys)", "ties(ends, tails)"])
def test_a_rank_holds_the_shards_that_vllm_would_have_copied(
    config: VllmConfig, sources: dict[str, Adapter], spec: str, rank: int, fully_sharded: bool
) -> None:
    if fully_sharded and "ends" in spec:
        pytest.skip("vLLM gives a layer of three slices no fully sharded LoRA")

    def manager() -> Any:
        made = slots.worker_manager(config, 1, rank, 2, fully_sharded)
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
def test_all_sharded_layers_of_a_rank_are_written_at_once(
    config: VllmConfig, sources: dict[str, Adapter], fully_sharded: bool
) -> None:
    manager, backend = slots.worker_manager(config, 2, 1, 2, fully_sharded), CopyingBackend()
    lora = written(manager, backend, "linear(sql, chat)", sources)
    activate(manager, lora)
    assert backend.written == backend.compiled == [sorted(tiny.MODULES)]


def test_a_layer_that_vllm_puts_together_of_several_parts_is_handed_over_to_it(config: VllmConfig) -> None:
    manager, backend = slots.worker_manager(config), CopyingBackend()
    layers = manager._adapter_manager
    name = "text.layers.0.mlp.two_proj"  # as Phi-3's gate_up_proj: one module of an adapter, two slices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "get_tensor_model_parallel_rank", lambda: 1)
        patch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: 2)
        with set_current_vllm_config(config):
            two = ColumnParallelLinearWithLoRA(MergedColumnParallelLinear(HIDDEN, [48, 48], bias=False))
    two.create_lora_weights(2, manager.lora_config)
    layers.modules[name] = two
    adapters = {"a": random_adapter({name: (96, HIDDEN)}, 8)}
    slot_map = slot_hooks.SlotMap(layers)
    assert name not in slot_map.shards
    merges = plan(parse("sum(a)"), adapters)
    slot_hooks.DeviceSlotWriter(backend, merges, slot_map, {name: name}).write(0)
    b = adapters["a"].modules[name].b  # the weight is on A
    assert torch.equal(two.lora_b_stacked[0][0, 0, :, :8], torch.cat([b[24:48], b[72:]]))


def test_a_sharded_layer_takes_its_shard_of_the_whole_merge(
    config: VllmConfig, sources: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, backend = slots.worker_manager(config), CopyingBackend()
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


def test_a_prepared_merge_holds_no_values(config: VllmConfig, sources: dict[str, Adapter]) -> None:
    manager = slots.worker_manager(config)
    lora = written(manager, CopyingBackend(), "ties(sql, chat)", sources)
    activate(manager, lora)  # after which vLLM has packed what it holds
    held = [tensor for weights in lora.loras.values() for tensor in flat(weights.lora_a, weights.lora_b)]
    assert len(held) == 2 * len(tiny.MODULES)
    assert {tensor.device.type for tensor in held} == {"meta"}


def flat(*given: Any) -> list[torch.Tensor]:
    """The tensors in weights, packed or not."""
    return [t for each in given for t in (each if isinstance(each, list) else [each]) if t is not None]


def test_a_merge_that_was_evicted_comes_back_the_same_and_is_not_tried_again(
    config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    manager, backend = slots.worker_manager(config, max_loras=1), CopyingBackend()
    makes = maker(manager, backend)
    merges = plan(parse("dare_ties(sql, chat, seed=3)"), sources, MAX_RANK)
    first = contents(manager, activate(manager, makes.prepare(7, merges)[0]))
    activate(manager, makes.prepare(8, plan(parse("sum(attention)"), sources, MAX_RANK))[0])
    manager._adapter_manager.remove_adapter(7)
    checked = len(backend.checked)
    assert_same(contents(manager, activate(manager, makes.remake(7, merges))), first)
    assert len(backend.checked) == checked


def test_an_adapter_from_disk_is_left_to_vllm(config: VllmConfig, sources: dict[str, Adapter]) -> None:
    manager = slots.worker_manager(config)
    tensors = {name: tensor.clone() for name, tensor in tensors_of(sources["sql"].modules).items()}
    helper = PEFTHelper(r=8, lora_alpha=16, target_modules=[])
    mapper = slots.Model.hf_to_vllm_mapper
    lora = LoRAModel.from_lora_tensors(7, tensors, helper, "cpu", weights_mapper=mapper)
    got = contents(manager, activate(manager, lora))["text.layers.0.self_attn.o_proj b 0"][0, :, :8]
    assert torch.equal(got, 2.0 * sources["sql"].modules["model.layers.0.self_attn.o_proj"].b.float())


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
    config: VllmConfig, modules: dict[str, tuple[int, int]], embeddings: list[str], words: str
) -> None:
    manager, backend = slots.worker_manager(config), CopyingBackend()
    wrong = {"wrong": random_adapter(modules, 8, torch.bfloat16, embeddings=embeddings)}
    with pytest.raises(PlanError, match=words):
        written(manager, backend, "sum(wrong)", wrong)
    assert backend.checked == []
    with pytest.raises(PlanError, match=words):
        copied(manager, "sum(wrong)", wrong)


def test_an_output_head_with_fewer_tokens_is_filled_up_as_vllm_does(config: VllmConfig) -> None:
    manager = slots.worker_manager(config)
    short = {"short": random_adapter({"lm_head": (VOCABULARY - 20, HIDDEN)}, 8, torch.bfloat16)}
    slot = activate(manager, written(manager, CopyingBackend(), "sum(short)", short))
    b = contents(manager, slot)["lm_head b 0"][0]
    assert b[: VOCABULARY - 20].any()
    assert not b[VOCABULARY - 20 :].any()


def test_a_shape_is_checked_on_a_sharded_layer_too(
    config: VllmConfig, sources: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = slots.worker_manager(config)
    layer = manager._adapter_manager.modules["text.layers.0.self_attn.qkv_proj"]
    monkeypatch.setattr(layer, "tp_size", 2)
    wrong = {"wrong": random_adapter({"model.layers.0.self_attn.k_proj": (64, HIDDEN)}, 8, torch.bfloat16)}
    with pytest.raises(PlanError, match=r"k_proj has shape \(32, 64\)"):
        written(manager, CopyingBackend(), "sum(wrong)", wrong)
    written(manager, CopyingBackend(), "sum(keys)", sources)


def test_experts_are_refused_with_the_way_out(config: VllmConfig, sources: dict[str, Adapter]) -> None:
    manager = slots.worker_manager(config)
    manager._adapter_manager.modules["text.layers.0.self_attn"] = BaseLayerWithLoRA()
    with pytest.raises(PlanError, match=r"k_proj cannot be merged on a device.*--merged-lora-backend cpu"):
        written(manager, CopyingBackend(), "sum(keys)", sources)


def test_a_merge_that_the_backend_refuses_is_answered_and_not_kept(
    config: VllmConfig, sources: dict[str, Adapter], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, backend = slots.worker_manager(config), CopyingBackend()
    merges = MergeWorker(MAX_RANK, 1 << 30, worker_hooks.VllmPlainAdapters(manager), maker(manager, backend))
    sources["keys"].save(tmp_path / "keys")
    digest = merges.capture("one", None, str(tmp_path / "keys"))["key"]

    def full(plan: Any) -> float:
        raise PlanError("the sources need 3 GiB, 1 is reserved")

    monkeypatch.setattr(backend, "check", full)
    path = MergeIdentity(parse("sum(keys)"), (digest,)).path
    reply = merges.prepare(path, set())
    assert (reply["ok"], reply["kind"]) == (False, "user")
    assert "1 is reserved" in reply["error"]


def test_a_merge_without_values_is_kept_for_the_next_slot(
    config: VllmConfig, sources: dict[str, Adapter], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = slots.worker_manager(config)
    makes = maker(manager, CopyingBackend())
    merges = MergeWorker(MAX_RANK, 1 << 30, worker_hooks.VllmPlainAdapters(manager), makes)
    sources["keys"].save(tmp_path / "keys")
    digest = merges.capture("one", None, str(tmp_path / "keys"))["key"]
    paths = [MergeIdentity(parse(f"sum({1 + i}*keys)"), (digest,)).path for i in range(LIGHT_MERGES + 1)]
    assert all(merges.prepare(path, set())["ok"] for path in paths)
    made: list[int] = []
    monkeypatch.setattr(makes, "remake", lambda number, plan: made.append(number))
    newest = merges.load_merge(paths[-1])
    assert merges.load_merge(paths[-1]) is newest
    assert made == []
    merges.load_merge(paths[0])  # the oldest of more than are kept
    assert len(made) == 1


TRITON = Settings(enable=True, backend="triton")


def start(
    manager: Any, backend: CopyingBackend, settings: Settings, sleeps: bool = False
) -> Maker[LoRAModel]:
    """What happens when a worker starts, on a machine where the device backend is this one."""
    with pytest.MonkeyPatch.context() as patch:
        real = load_backend
        patch.setattr(worker_hooks, "load_backend", lambda name: real("cpu") if name == "cpu" else backend)
        made = worker_hooks._maker(manager, settings, sleeps)
        worker_hooks._make_ready(manager, made.backend, settings)
        return made


def test_device_memory_for_sources_is_reserved_when_the_worker_starts(config: VllmConfig) -> None:
    backend = CopyingBackend()
    start(slots.worker_manager(config), backend, Settings(enable=True, gpu_gib=0.25))
    assert backend.reserved == [268_435_456]
    assert backend.reason == "--merged-lora-gpu-gib"


@pytest.mark.parametrize(
    ("max_loras", "max_sources", "count", "words"),
    [
        (2, 8, 8, "8 adapters, as --merged-lora-max-sources says"),
        (2, 3, 3, "3 adapters, as --merged-lora-max-sources says"),
        (4, 3, 4, "4 adapters, as --max-loras says"),
    ],
)
def test_unless_it_is_said_there_is_room_for_the_sources_of_any_merge(
    config: VllmConfig, max_loras: int, max_sources: int, count: int, words: str
) -> None:
    backend = CopyingBackend()
    settings = Settings(enable=True, max_sources=max_sources)
    start(slots.worker_manager(config, max_loras), backend, settings)
    assert words in backend.reason
    shapes = tiny.MODULES | OTHERS | {"model.layers.1.mlp.fused_proj": (sum(slots.FUSED), HIDDEN)}
    embeddings = ["model.embed_tokens"]
    largest = [
        random_adapter(shapes, MAX_RANK, torch.float32, seed, embeddings=embeddings) for seed in range(9)
    ]
    assert f"{len(shapes)} modules, rank {MAX_RANK}, float32" in backend.reason
    room = DeviceSources(torch.device("cpu"))
    (nbytes,) = backend.reserved
    room.reserve(nbytes, backend.reason)
    room.load(largest[:count])
    with pytest.raises(PlanError, match="gpu-gib") as refused:
        room.load(largest[: count + 1])
    assert backend.reason in str(refused.value)
    each = f"{largest[0].nbytes / 2**30:.3g}"
    assert " + ".join([each] * (count + 1)) in str(refused.value)


def test_a_worker_is_made_ready_when_vllm_has_made_its_layers(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, backend = slots.worker_manager(config), CopyingBackend()
    layers = vars(manager).pop("_adapter_manager")
    vllm_config = SimpleNamespace(
        additional_config={"merged_lora": {"enable": True}},
        model_config=SimpleNamespace(enable_sleep_mode=False),
    )
    monkeypatch.setattr(worker_hooks, "load_backend", lambda name: backend)
    worker_hooks.wrap_init(lambda self, vllm_config: None)(manager, vllm_config)
    assert backend.reserved == []

    def create_lora_manager(self: Any, model: str, vllm_config: Any) -> str:
        self._adapter_manager = layers
        return f"{model} with LoRA"

    ready = worker_hooks.wrap_create_lora_manager(create_lora_manager)
    assert ready(manager, "a model", vllm_config) == "a model with LoRA"
    assert len(backend.reserved) == 1
    assert backend.warmed == [manager.lora_config.lora_dtype]


def test_a_backend_of_another_device_than_vllms_is_refused(config: VllmConfig) -> None:
    backend = CopyingBackend()
    backend.device = torch.device("cuda", 0)
    with pytest.raises(
        BackendError, match=r"merges on cuda:0, vLLM runs on cpu; .*--merged-lora-backend cpu"
    ):
        start(slots.worker_manager(config), backend, TRITON)
    assert backend.reserved == []


def test_sleep_mode_is_refused_with_a_backend_that_keeps_sources_on_the_device(config: VllmConfig) -> None:
    with pytest.raises(BackendError, match="sleep mode"):
        start(slots.worker_manager(config), CopyingBackend(), TRITON, sleeps=True)


def test_where_the_device_does_not_serve_auto_takes_the_cpu_and_says_so(
    config: VllmConfig, caplog: pytest.LogCaptureFixture
) -> None:
    backend = CopyingBackend()
    logging.getLogger("vllm.merged_lora").addHandler(caplog.handler)
    try:
        made = start(slots.worker_manager(config), backend, Settings(enable=True), sleeps=True)
    finally:
        logging.getLogger("vllm.merged_lora").removeHandler(caplog.handler)
    assert isinstance(made, HostMaker)
    assert backend.reserved == []
    assert "sleep mode takes the memory" in caplog.text


def test_what_fills_a_slot_is_compiled_when_the_merge_is_prepared(
    config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    manager, backend = slots.worker_manager(config), CopyingBackend()
    activate(manager, written(manager, backend, "ties(sql, ends)", sources))
    assert backend.compiled == backend.written


def test_what_waits_for_the_device_in_a_step_is_allowed_where_vllm_looks_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # VLLM_GPU_SYNC_CHECK=error: a decomposition waits for the device, and is made while a slot is filled.
    monkeypatch.setattr(gpu_sync_debug, "_SYNC_CHECK_MODE", "error")
    monkeypatch.setattr(gpu_sync_debug, "_sync_check_enabled", True)
    seen: list[tuple[str, str | None]] = []

    def noting(name: str, result: object) -> Any:
        def noted(*_: object) -> object:
            seen.append((name, gpu_sync_debug._active_check_mode()))
            return result

        return noted

    layers = MagicMock(activate_adapter=noting("activated", True))
    layers.__len__.return_value, layers.capacity = 0, 1
    manager = SimpleNamespace(
        list_adapters=set, _load_adapter=noting("loaded", SimpleNamespace(id=7)), _adapter_manager=layers
    )
    token = gpu_sync_debug._checking.set("error")
    try:
        noting("before", None)()
        LRUCacheWorkerLoRAManager.add_adapter(manager, LoRARequest("merge", 7, "path"))
    finally:
        gpu_sync_debug._checking.reset(token)
    assert seen == [("before", "error"), ("loaded", None), ("activated", None)]


def test_a_backend_that_cannot_be_loaded_is_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merged_lora.backends.MODULES", {"triton": "merged_lora.no_such_backend"})
    load_backend.cache_clear()
    try:
        with pytest.raises(BackendError, match="backend triton cannot be loaded"):
            worker_hooks._maker(SimpleNamespace(), Settings(enable=True, backend="triton"), False)
    finally:
        load_backend.cache_clear()
