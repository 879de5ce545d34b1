"""Merges in the slots of vLLM's own layers, without an engine."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from vllm.config import VllmConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.utils import gpu_sync_debug

import tiny
from gates import captured, prepared
from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.engine import plan
from merged_lora.errors import PlanError
from merged_lora.files.writing import tensors_of
from merged_lora.spec import parse
from merged_lora.vllm_plugin.hooks import slots as slot_hooks
from merged_lora.vllm_plugin.hooks import worker as worker_hooks
from merged_lora.vllm_plugin.hooks.wrapping import ATTRIBUTE
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.worker.background import CancelledError
from merged_lora.vllm_plugin.worker.merge_worker import MergeWorker
from slots import (
    CopyingBackend,
    Model,
    activate,
    assert_same,
    contents,
    copied,
    filled,
    maker,
    stacked,
    worker_manager,
    written,
)
from tiny import HIDDEN, MAX_RANK, SPECS

pytestmark = pytest.mark.usefixtures("activation_hook")


@pytest.mark.parametrize("spec", [*SPECS.values(), "ties(ends, tails)", "sum(keys, ends)"])
def test_a_slot_holds_what_vllm_would_have_copied_into_it(
    vllm_config: VllmConfig, sources: dict[str, Adapter], spec: str
) -> None:
    manager = worker_manager(vllm_config)
    expected = contents(manager, activate(manager, copied(manager, spec, sources)))
    for make in (functools.partial(written, backend=CopyingBackend()), filled):
        manager = worker_manager(vllm_config)
        got = contents(manager, activate(manager, make(manager, spec=spec, sources=sources)))
        assert_same(got, expected)
        assert any(tensor.any() for tensor in got.values())


@pytest.mark.parametrize("spec", ["sum(keys)", "sum(attention)", "sum(ends)"])
def test_nothing_is_left_of_the_slots_last_tenant(
    vllm_config: VllmConfig, sources: dict[str, Adapter], spec: str
) -> None:
    manager = worker_manager(vllm_config, max_loras=1)
    expected = contents(manager, activate(manager, copied(manager, spec, sources)))
    for make in (functools.partial(written, backend=CopyingBackend()), filled):
        for tensor in stacked(manager):
            tensor.fill_(9.0)
        slot = activate(manager, make(manager, spec=spec, sources=sources))
        assert_same(contents(manager, slot), expected)


def test_a_slot_that_was_filled_is_cleared_of_larger_ranks_and_other_modules(
    vllm_config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    manager = worker_manager(vllm_config, max_loras=1)
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
        clean = worker_manager(vllm_config, max_loras=1)
        assert_same(got, contents(clean, activate(clean, copied(clean, spec, sources))))


def test_a_slot_in_which_vllm_failed_halfway_is_cleared_by_the_next_merge(
    vllm_config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    manager = worker_manager(vllm_config, max_loras=1)
    activate(manager, filled(manager, "linear(sql, chat)", sources))
    broken = copied(manager, "sum(sql, chat)", sources)  # of rank 16
    broken.loras["text.layers.1.mlp.down_proj"].lora_a = torch.ones(MAX_RANK + 1, 3)
    with pytest.raises(RuntimeError):
        activate(manager, broken)
    got = contents(manager, activate(manager, filled(manager, "linear(sql, chat)", sources)))
    clean = worker_manager(vllm_config, max_loras=1)
    assert_same(got, contents(clean, activate(clean, copied(clean, "linear(sql, chat)", sources))))


def test_a_merge_that_fills_its_slot_halfway_is_not_active_and_is_filled_anew(
    vllm_config: VllmConfig, sources: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, backend = worker_manager(vllm_config, max_loras=1), CopyingBackend()
    lora = written(manager, backend, "linear(sql, chat)", sources)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "place", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            activate(manager, lora)
    layers = manager._adapter_manager
    assert layers.lora_index_to_id == [None]
    assert layers.activate_adapter(lora.id)
    clean = worker_manager(vllm_config, max_loras=1)
    expected = contents(clean, activate(clean, copied(clean, "linear(sql, chat)", sources)))
    assert_same(contents(manager, 0), expected)


def test_mixed_ranks_are_read_off_the_tensors(
    vllm_config: VllmConfig, sources: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_one_rank(cls: type[LoRALayerWeights], name: str, helper: PEFTHelper, *_: str) -> LoRALayerWeights:
        return cls(name, helper.r, helper.lora_alpha, None, None, 1.0)  # as vLLM did before 0.32

    spec = "svd(sql, chat, ends, rank=16)"
    manager = worker_manager(vllm_config)
    expected = contents(manager, activate(manager, copied(manager, spec, sources)))
    monkeypatch.setattr(LoRALayerWeights, "from_config", classmethod(of_one_rank))
    manager = worker_manager(vllm_config)
    assert_same(contents(manager, activate(manager, filled(manager, spec, sources))), expected)


@pytest.mark.parametrize("spec", ["ties(sql, chat)", "ties(ends, tails)"])
def test_each_slot_has_its_own_merge(vllm_config: VllmConfig, sources: dict[str, Adapter], spec: str) -> None:
    manager, backend = worker_manager(vllm_config), CopyingBackend()
    other = maker(manager, backend).make(8, plan(parse("sum(tone, tails)"), sources)).model
    first = activate(manager, other)
    before = contents(manager, first)
    second = activate(manager, written(manager, backend, spec, sources))
    assert first != second
    assert_same(contents(manager, first), before)
    other = worker_manager(vllm_config)
    expected = contents(other, activate(other, copied(other, spec, sources)))
    assert_same(contents(manager, second), expected)


def test_a_module_the_merge_lacks_is_zeroed_though_the_adapter_has_a_stranger_of_its_name(
    vllm_config: VllmConfig,
) -> None:
    manager, backend = worker_manager(vllm_config), CopyingBackend()
    name = "text.layers.0.self_attn.o_proj"
    stranger = {"a": random_adapter({name: (HIDDEN, HIDDEN)}, 8)}
    slot_map = slot_hooks.SlotMap(manager._adapter_manager)
    staged = backend.stage(plan(parse("sum(a)"), stranger), torch.float32)
    slot_hooks.DeviceSlotWriter(backend, staged, slot_map, {}).write(0)
    assert not any(tensor.any() for tensor in contents(manager, 0).values())


def test_all_linear_layers_of_one_device_are_filled_at_once(
    vllm_config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    manager, backend = worker_manager(vllm_config), CopyingBackend()
    activate(manager, written(manager, backend, "sum(sql, chat)", sources))
    assert backend.placed == [sorted(tiny.MODULES)]
    assert backend.whole == [[]]


def test_what_vllm_packs_of_a_merge_has_no_values(
    vllm_config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    manager = worker_manager(vllm_config)
    lora = written(manager, CopyingBackend(), "ties(sql, chat)", sources)
    activate(manager, lora)  # after which vLLM has packed what it holds
    held = [tensor for weights in lora.loras.values() for tensor in flat(weights.lora_a, weights.lora_b)]
    assert len(held) == 2 * len(tiny.MODULES)
    assert {tensor.device.type for tensor in held} == {"meta"}


def test_a_merge_counts_as_many_bytes_as_it_takes_in_host_memory(
    vllm_config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    manager, backend = worker_manager(vllm_config), CopyingBackend()
    made = maker(manager, backend).make(7, plan(parse("ties(sql, chat)"), sources, MAX_RANK))
    writer = getattr(made.model, ATTRIBUTE)
    assert made.nbytes == writer.staged.host.nbytes
    assert made.nbytes == sum(4 * 8 * (out + width) for out, width in tiny.MODULES.values())
    assert made.result.modules == {}


def test_steps_of_a_merge_on_a_device_are_told_and_may_end_it(
    vllm_config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    manager, told = worker_manager(vllm_config), list[int]()
    makes = maker(manager, CopyingBackend())
    made = makes.make(7, plan(parse("ties(sql, chat)"), sources, MAX_RANK), told.append)
    assert sum(told) == made.modules == len(tiny.MODULES)

    def cancel(_: int) -> None:
        raise CancelledError

    with pytest.raises(CancelledError):
        makes.make(8, plan(parse("ties(sql, chat)"), sources, MAX_RANK), cancel)


def flat(*given: Any) -> list[torch.Tensor]:
    """The tensors in weights, packed or not."""
    return [t for each in given for t in (each if isinstance(each, list) else [each]) if t is not None]


def test_a_merge_that_was_evicted_comes_back_the_same_and_is_not_made_again(
    vllm_config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    manager, backend = worker_manager(vllm_config, max_loras=1), CopyingBackend()
    makes, adapters = maker(manager, backend), worker_hooks.VllmPlainAdapters(manager)
    merges = plan(parse("dare_ties(sql, chat, seed=3)"), sources, MAX_RANK)
    first = contents(manager, activate(manager, made := makes.make(7, merges).model))
    activate(manager, makes.make(8, plan(parse("sum(attention)"), sources, MAX_RANK)).model)
    manager._adapter_manager.remove_adapter(7)
    staged = len(backend.staged)
    assert_same(contents(manager, activate(manager, adapters.share(made))), first)
    assert len(backend.staged) == staged


def test_an_adapter_from_disk_is_left_to_vllm(vllm_config: VllmConfig, sources: dict[str, Adapter]) -> None:
    manager = worker_manager(vllm_config)
    tensors = {name: tensor.clone() for name, tensor in tensors_of(sources["sql"].modules).items()}
    helper = PEFTHelper(r=8, lora_alpha=16, target_modules=[])
    mapper = Model.hf_to_vllm_mapper
    lora = LoRAModel.from_lora_tensors(7, tensors, helper, "cpu", weights_mapper=mapper)
    got = contents(manager, activate(manager, lora))["text.layers.0.self_attn.o_proj b 0"][0, :, :8]
    assert torch.equal(got, 2.0 * sources["sql"].modules["model.layers.0.self_attn.o_proj"].b.float())


def test_a_merge_that_the_backend_refuses_is_answered_and_not_kept(
    vllm_config: VllmConfig, sources: dict[str, Adapter], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, backend = worker_manager(vllm_config), CopyingBackend()
    merges = MergeWorker(MAX_RANK, 1 << 30, worker_hooks.VllmPlainAdapters(manager), maker(manager, backend))
    sources["keys"].save(tmp_path / "keys")
    digest = captured(merges, "one", None, str(tmp_path / "keys"))["key"]

    def full(*_: object) -> None:
        raise PlanError("the sources need 3 GiB, 1 is reserved")

    monkeypatch.setattr(backend, "stage", full)
    path = MergeIdentity(parse("sum(keys)"), (digest,)).path
    reply = prepared(merges, path)
    assert (reply["ok"], reply["kind"]) == (False, "user")
    assert "1 is reserved" in reply["error"]


def test_a_merge_is_kept_for_the_next_slot_as_long_as_it_is_needed(
    vllm_config: VllmConfig, sources: dict[str, Adapter], tmp_path: Any
) -> None:
    manager, backend = worker_manager(vllm_config), CopyingBackend()
    adapters = worker_hooks.VllmPlainAdapters(manager)
    merges = MergeWorker(MAX_RANK, 1 << 30, adapters, maker(manager, backend))
    sources["keys"].save(tmp_path / "keys")
    digest = captured(merges, "one", None, str(tmp_path / "keys"))["key"]
    merge = MergeIdentity(parse("sum(0.5*keys)"), (digest,))
    assert prepared(merges, merge.path)["made"]
    first = contents(manager, activate(manager, merges.load_merge(merge.path)))  # vLLM packs it in place
    for _ in range(2):
        assert_same(contents(manager, activate(manager, merges.load_merge(merge.path))), first)
    assert len(backend.staged) == 1
    assert prepared(merges, merge.path, [merge.digest])["made"] is False
    other = MergeIdentity(parse("sum(keys)"), (digest,))
    prepared(merges, other.path)  # nobody needs the first one any more
    merges.load_merge(merge.path)
    assert len(backend.staged) == 3


def test_what_fills_a_slot_is_compiled_when_the_merge_is_prepared(
    vllm_config: VllmConfig, sources: dict[str, Adapter]
) -> None:
    manager, backend = worker_manager(vllm_config), CopyingBackend()
    activate(manager, written(manager, backend, "ties(sql, ends)", sources))
    assert backend.compiled == backend.placed


def test_what_waits_for_the_device_in_a_step_is_allowed_where_vllm_looks_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # VLLM_GPU_SYNC_CHECK=error: a merge that nobody asked to stay is made again before its slot is filled.
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
