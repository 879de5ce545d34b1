"""Adapters whose experts share a factor, in vLLM's own slots for ``--enable-moe-shared-loras``."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vllm.config import VllmConfig

from expert_layers import (
    APART,
    ATTENTION,
    EXPERTS,
    HIDDEN,
    HOLDERS,
    INNER,
    STACKED,
    WHOLE,
    Place,
    adapter,
    make_manager,
    sharing,
)
from merged_lora.adapters import Adapter
from merged_lora.engine import merge
from merged_lora.errors import PlanError
from merged_lora.vllm_plugin.hooks import models as model_hooks
from merged_lora.vllm_plugin.worker.merge_worker import MergeWorker
from slots import CopyingBackend, assert_same, maker
from tiny import MAX_RANK

pytestmark = pytest.mark.usefixtures("activation_hook")


@pytest.fixture
def shared(vllm_config: VllmConfig, experts_model: Path, tmp_path: Path) -> Place:
    """A model with --enable-moe-shared-loras."""
    return Place(make_manager(experts_model, False, enable_moe_shared_loras=True), tmp_path)


@pytest.mark.parametrize("three", [False, True])
@pytest.mark.parametrize("spec", ["ties(a, b, density=0.5)", "sum(0.5*a, b)", "cat(a, -1*b)", "linear(a, b)"])
def test_the_slots_of_shared_factors_hold_what_vllm_reads_of_the_offline_merge(
    vllm_config: VllmConfig, experts_model: Path, tmp_path: Path, spec: str, three: bool
) -> None:
    place = Place(make_manager(experts_model, three, enable_moe_shared_loras=True), tmp_path)
    for name, seed in (("a", 1), ("b", 2)):
        assert place.capture(name, sharing(seed))["ok"]
    merge(spec, {name: tmp_path / name for name in "ab"}, backend="cpu").save(tmp_path / "offline")
    got = place.slot(spec)
    assert_same(got, place.read("offline"))
    assert all(tensor.any() for name, tensor in got.items() if "experts" in name)
    assert len(got[f"{HOLDERS[0]} w13_lora_a 1"]) == len(got[f"{HOLDERS[0]} w2_lora_b 0"]) == 1


def test_a_slot_of_shared_factors_holds_the_delta_of_every_expert(shared: Place) -> None:
    source = sharing(1)
    shared.capture("a", source)
    slot = shared.slot("cat(a)")
    kinds = {"w1": ("w13", 0), "w2": ("w2", 0), "w3": ("w13", 1)}
    for holder, (parameter, (kind, i)) in itertools.product(HOLDERS, kinds.items()):
        a, b = (slot[f"{holder} {kind}_lora_{side} {i}"].double() for side in "ab")
        for expert, got in enumerate(b @ a):
            wanted = source.modules[f"{holder}.{parameter}[{expert}]"].delta()
            assert torch.allclose(got, wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))


def test_stacks_that_no_source_has_are_zero(shared: Place) -> None:
    """An expert that is not there has the shared factor too, of which there is one for all."""
    given = [f"{HOLDERS[0]}.w1[{expert}]" for expert in (0, 1, 3)]
    some = {name: sharing(1).modules[name] for name in given}
    slot = shared.held(model_hooks.host_model(shared.manager, 7, Adapter(some)))
    assert torch.equal(slot[f"{HOLDERS[0]} w13_lora_a 0"][0, :4], some[given[0]].a.float())
    rows = [bool(of_expert.any()) for of_expert in slot.pop(f"{HOLDERS[0]} w13_lora_b 0")]
    assert rows == [True, True, False, True]
    assert {name for name, tensor in slot.items() if tensor.any()} == {f"{HOLDERS[0]} w13_lora_a 0"}


@pytest.mark.parametrize("spec", ["svd(a, b, rank=3)", "sum(a, b)", "dare_ties(a, b, seed=3)"])
def test_a_merge_whose_experts_share_nothing_is_refused_with_the_way_out(shared: Place, spec: str) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        shared.capture(name, sharing(seed, 10))
    reply, _ = shared.prepare(spec)
    assert (reply["ok"], reply["kind"]) == (False, "user")
    assert f"{HOLDERS[0]}.w1: each expert has its own lora_A" in reply["error"]
    assert "of sum whose rank is not cut, or of cat, linear, ties" in reply["error"]


@pytest.mark.parametrize(("name", "side"), [("w1", "A"), ("w2", "B"), ("w3", "A")])
def test_vllm_is_given_no_factor_of_which_it_would_take_the_first(
    shared: Place, name: str, side: str
) -> None:
    own = adapter(STACKED, 1).modules
    modules = {key: own[key] if f".{name}[" in key else f for key, f in sharing(1).modules.items()}
    with pytest.raises(PlanError, match=rf"{HOLDERS[0]}\.{name}: each expert has its own lora_{side}"):
        model_hooks.host_model(shared.manager, 7, Adapter(modules))


def test_stacks_of_another_shape_or_a_larger_rank_are_refused_before_a_slot_is_filled(shared: Place) -> None:
    wide = {name: replace(f, b=torch.cat([f.b, f.b])) for name, f in sharing(1).modules.items()}
    for modules, message in (
        (wide, r"w1\[0\] has shape \(32, 64\) in the model, another one"),
        (sharing(1, MAX_RANK + 1).modules, r"rank 17 .*, the limit is 16 \(--max-lora-rank\)"),
    ):
        experts = {name: f for name, f in modules.items() if "experts" in name}
        with pytest.raises(PlanError, match=message):
            model_hooks.host_model(shared.manager, 7, Adapter(experts))


@pytest.mark.parametrize(
    ("kind", "modules", "words"),
    [
        ("shared", APART, rf"no module {HOLDERS[0]}\.0\.gate_proj"),
        ("shared", WHOLE, rf"no module {HOLDERS[0]}\.gate_up_proj,"),
        ("shared", {f"{HOLDERS[0]}.w2": (HIDDEN, INNER)}, rf"no module {HOLDERS[0]}\.w2 "),
        ("shared", {f"{HOLDERS[0]}.w2[{EXPERTS}]": (HIDDEN, INNER)}, rf"no module {HOLDERS[0]}\.w2 "),
        ("apart", STACKED, rf"no module {HOLDERS[0]}\.w1"),
        ("whole", STACKED, rf"no module {HOLDERS[0]}\.w1"),
        ("whole", {HOLDERS[0]: (HIDDEN, INNER)}, rf"no module {HOLDERS[0]} "),
    ],
)
def test_experts_in_a_form_that_the_server_does_not_take_are_refused_by_name(
    vllm_config: VllmConfig,
    experts_model: Path,
    tmp_path: Path,
    kind: str,
    modules: dict[str, tuple[int, int]],
    words: str,
) -> None:
    flags = {"enable_moe_shared_loras": kind == "shared"}
    place = Place(make_manager(experts_model, kind == "whole", **flags), tmp_path)
    with pytest.raises(PlanError, match=words):
        place.adapters.fit(adapter(modules, 1))


def test_the_rest_of_an_adapter_is_served_where_factors_are_shared(shared: Place) -> None:
    assert shared.capture("attention", adapter(ATTENTION, 1))["ok"]
    assert any(tensor.any() for tensor in shared.slot("sum(attention)").values())


def test_a_backend_on_a_device_refuses_stacks(shared: Place) -> None:
    shared.worker = MergeWorker(MAX_RANK, 1 << 30, shared.adapters, maker(shared.manager, CopyingBackend()))
    shared.capture("a", sharing(1))
    reply, _ = shared.prepare("sum(a)")
    assert (reply["ok"], reply["kind"]) == (False, "user")
    assert "start the server with --merged-lora-backend cpu" in reply["error"]


@pytest.mark.parametrize("mixed", [False, True])
def test_an_adapter_of_stacks_is_served_from_memory_as_vllm_reads_it(
    vllm_config: VllmConfig, experts_model: Path, tmp_path: Path, mixed: bool
) -> None:
    flags = {"enable_moe_shared_loras": True, "enable_mixed_moe_lora_format": mixed}
    place = Place(make_manager(experts_model, False, **flags), tmp_path)
    reply = place.capture("a", sharing(1), {})
    assert (reply["ok"], reply["refusal"]) == (True, "")
    lora = place.worker.load_plain(str(tmp_path / "a"), 3)
    assert lora is not None
    assert not lora.is_3d_lora_weight
    assert_same(place.held(lora), place.read("a"))
