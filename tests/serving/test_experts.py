"""Adapters of a mixture's experts in vLLM's own slots for experts, without its kernels.

vLLM's CPU build constructs these layers and fills their slots, but cannot run them.  For a server see
``test_served_experts.py``.
"""

from __future__ import annotations

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
    WHOLE,
    Place,
    adapter,
    make_manager,
)
from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.engine import merge
from merged_lora.factors import Factors
from merged_lora.vllm_plugin.hooks import models as model_hooks
from merged_lora.vllm_plugin.hooks.wrapping import ATTRIBUTE
from merged_lora.vllm_plugin.worker.merge_worker import MergeWorker
from slots import CopyingBackend, assert_same, maker
from tiny import MAX_RANK

SPECS = [
    "ties(a, b, density=0.5)",
    "sum(0.5*a, b)",
    "cat(a, -1*b)",
    "svd(a, b, rank=3)",
    "dare_ties(a, b, seed=3)",
]

pytestmark = pytest.mark.usefixtures("activation_hook")


@pytest.fixture
def apart(vllm_config: VllmConfig, experts_model: Path, tmp_path: Path) -> Place:
    """A model of which vLLM takes the experts' modules apart."""
    return Place(make_manager(experts_model, False), tmp_path)


@pytest.fixture
def whole(vllm_config: VllmConfig, experts_model: Path, tmp_path: Path) -> Place:
    """A model of which vLLM takes the experts' parameters."""
    return Place(make_manager(experts_model, True), tmp_path)


@pytest.fixture
def mixed(vllm_config: VllmConfig, experts_model: Path, tmp_path: Path) -> Place:
    """The same with --enable-mixed-moe-lora-format."""
    return Place(make_manager(experts_model, True, enable_mixed_moe_lora_format=True), tmp_path)


# A merge and the same merge from disk


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("kind", "experts"), [("apart", APART), ("whole", WHOLE), ("mixed", WHOLE), ("mixed", APART)]
)
def test_the_slots_of_experts_hold_what_vllm_reads_of_the_offline_merge(
    request: pytest.FixtureRequest, kind: str, experts: dict[str, tuple[int, int]], spec: str
) -> None:
    place: Place = request.getfixturevalue(kind)
    for name, seed in (("a", 1), ("b", 2)):
        assert place.capture(name, adapter({**experts, **ATTENTION}, seed))["ok"]
    folders = {name: place.folder / name for name in "ab"}
    merge(spec, folders, backend="cpu", rank=MAX_RANK).save(place.folder / "offline")
    expected = place.read("offline", is_3d_lora_weight=experts is WHOLE)
    got = place.slot(spec)
    assert_same(got, expected)
    assert all(tensor.any() for name, tensor in got.items() if "experts" in name)


def test_a_slot_holds_the_delta_of_every_expert(apart: Place) -> None:
    """The form of transformers, of which vLLM has the modules apart: gate first, then up, then down."""
    source = adapter(WHOLE, 1)
    apart.capture("a", source)
    slot = apart.slot("cat(a)")
    for holder in HOLDERS:
        a = [slot[f"{holder} w13_lora_a {i}"] for i in range(2)] + [slot[f"{holder} w2_lora_a 0"]]
        b = [slot[f"{holder} w13_lora_b {i}"] for i in range(2)] + [slot[f"{holder} w2_lora_b 0"]]
        for expert in range(EXPERTS):
            gate, up, down = (y[expert].double() @ x[expert].double() for x, y in zip(a, b, strict=True))
            both = source.modules[f"{holder}.gate_up_proj[{expert}]"].delta()
            expected = (
                *torch.split_with_sizes(both, [INNER, INNER]),
                source.modules[f"{holder}.down_proj[{expert}]"].delta(),
            )
            for got, wanted in zip((gate, up, down), expected, strict=True):
                assert torch.allclose(got, wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["apart", "whole"])
def test_a_factor_that_all_experts_share_is_merged_for_each(
    request: pytest.FixtureRequest, kind: str
) -> None:
    place: Place = request.getfixturevalue(kind)
    own = adapter(WHOLE, 1).modules
    shared = {
        name: replace(f, a=own[f"{name.partition('[')[0]}[0]"].a) if "gate_up" in name else f
        for name, f in own.items()
    }
    place.capture("a", Adapter(shared))
    slot = place.slot("cat(a)")
    a = slot[f"{HOLDERS[0]} w13_lora_a 0"]
    assert all(torch.equal(a[expert], a[0]) for expert in range(EXPERTS))
    assert a.any()


# What vLLM would end with an error for


@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        ("apart", {name: s for name, s in APART.items() if ".experts.2." in name}),
        ("apart", {name: s for name, s in APART.items() if "up_proj" in name}),
        ("apart", {name: s for name, s in WHOLE.items() if "down_proj" in name}),
        ("whole", {name: s for name, s in WHOLE.items() if "down_proj" in name}),
        ("whole", {name: s for name, s in WHOLE.items() if "gate_up_proj" in name and "layers.0" in name}),
    ],
)
def test_experts_that_no_source_has_are_zero(
    request: pytest.FixtureRequest, kind: str, modules: dict[str, tuple[int, int]]
) -> None:
    place: Place = request.getfixturevalue(kind)
    place.capture("a", adapter(modules, 1))
    slot = place.slot("sum(a)")
    zeros = {
        name: Factors(torch.zeros(4, width).bfloat16(), torch.zeros(out, 4).bfloat16())
        for name, (out, width) in (APART if next(iter(modules)) in APART else WHOLE).items()
        if any(
            name.startswith(holder) and module.startswith(holder) for holder in HOLDERS for module in modules
        )
    }
    place.capture("b", Adapter({**zeros, **adapter(modules, 1).modules}))
    assert_same(slot, place.slot("sum(b)"))
    assert any(tensor.any() for tensor in slot.values())


def test_experts_of_different_ranks_are_filled_up_with_zeros(apart: Place) -> None:
    ranks = {name: 2 + i % 5 for i, name in enumerate(APART)}
    source = replace(random_adapter(APART, ranks, torch.bfloat16), calibration=None)
    apart.capture("a", source)
    slot = apart.slot("cat(a)")
    for expert in range(EXPERTS):
        down = source.modules[f"{HOLDERS[1]}.{expert}.down_proj"]
        a, b = (slot[f"{HOLDERS[1]} w2_lora_{side} 0"][expert] for side in "ab")
        assert torch.equal(b @ a, b[:, : down.rank] @ a[: down.rank])
        assert torch.allclose((b @ a).double(), down.delta(), rtol=0, atol=1e-5)


def test_a_larger_rank_than_the_servers_is_refused_before_a_slot_is_filled(apart: Place) -> None:
    large = adapter(APART, 1, MAX_RANK + 1)
    with pytest.raises(Exception, match=r"rank 17 .*, the limit is 16 \(--max-lora-rank\)"):
        model_hooks.host_model(apart.manager, 7, large)


@pytest.mark.parametrize(("kind", "experts"), [("apart", APART), ("whole", WHOLE)])
def test_experts_of_another_shape_are_refused_before_a_slot_is_filled(
    request: pytest.FixtureRequest, kind: str, experts: dict[str, tuple[int, int]]
) -> None:
    place: Place = request.getfixturevalue(kind)
    wide = {name: (out * 2, width) for name, (out, width) in experts.items()}
    place.capture("a", adapter(wide, 1))
    reply, _ = place.prepare("sum(a)")
    assert (reply["ok"], reply["kind"]) == (False, "user")
    assert "in the model, another one in the adapters" in reply["error"]


# What the model does not have


@pytest.mark.parametrize(
    ("kind", "modules", "words"),
    [
        ("whole", APART, f"no module {HOLDERS[0]}.0.gate_proj"),
        (
            "apart",
            {f"{HOLDERS[0]}.down_proj[{EXPERTS}]": (HIDDEN, INNER)},
            f"no module {HOLDERS[0]}.down_proj ",
        ),
        ("apart", {f"{HOLDERS[0]}.w_proj[0]": (HIDDEN, INNER)}, f"no module {HOLDERS[0]}.w_proj "),
        (
            "whole",
            {"model.layers.0.experts.down_proj[0]": (HIDDEN, INNER)},
            "no module model.layers.0.experts.",
        ),
        ("apart", {f"{HOLDERS[0]}.9.up_proj": (INNER, HIDDEN)}, f"no module {HOLDERS[0]}.9.up_proj"),
    ],
)
def test_experts_that_the_model_does_not_have_are_refused_by_name(
    request: pytest.FixtureRequest, kind: str, modules: dict[str, tuple[int, int]], words: str
) -> None:
    place: Place = request.getfixturevalue(kind)
    with pytest.raises(Exception, match=words.replace("[", r"\[").replace(".", r"\.")):
        place.adapters.fit(adapter(modules, 1))


def test_sources_with_experts_in_one_piece_and_apart_are_refused(apart: Place) -> None:
    apart.capture("a", adapter(WHOLE, 1))
    apart.capture("b", adapter(APART, 2))
    reply, _ = apart.prepare("sum(a, b)")
    assert (reply["ok"], reply["kind"]) == (False, "user")
    assert "in one source" in reply["error"]


def test_a_backend_on_a_device_refuses_experts_and_merges_the_rest(apart: Place) -> None:
    apart.worker = MergeWorker(MAX_RANK, 1 << 30, apart.adapters, maker(apart.manager, CopyingBackend()))
    for name, modules in (("a", WHOLE), ("b", APART), ("c", ATTENTION)):
        apart.capture(name, adapter(modules, 1))
    for name in "ab":
        reply, _ = apart.prepare(f"sum({name})")
        assert (reply["ok"], reply["kind"]) == (False, "user")
        assert "start the server with --merged-lora-backend cpu" in reply["error"]
    assert any(tensor.any() for tensor in apart.slot("sum(c)").values())


# Served by itself


@pytest.mark.parametrize(
    ("kind", "experts"), [("apart", APART), ("whole", WHOLE), ("mixed", WHOLE), ("mixed", APART)]
)
def test_an_adapter_of_experts_is_served_from_memory_as_vllm_reads_it(
    request: pytest.FixtureRequest, kind: str, experts: dict[str, tuple[int, int]]
) -> None:
    place: Place = request.getfixturevalue(kind)
    options = {"is_3d_lora_weight": experts is WHOLE}
    reply = place.capture("a", adapter({**experts, **ATTENTION}, 1), options)
    assert (reply["ok"], reply["refusal"]) == (True, "")
    lora = place.worker.load_plain(str(place.folder / "a"), 3)
    assert lora is not None
    assert_same(place.held(lora), place.read("a", **options))


def test_vllm_refuses_experts_in_one_piece_while_a_step_activates_a_merge(
    apart: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its check looks at the layers that it has then, and an activation takes some of them away."""
    all_layers, replies = dict(apart.layers.modules), []

    def reset_lora(index: int) -> None:
        assert apart.layers.modules.keys() < all_layers.keys()
        replies.append(apart.capture("whole", adapter(WHOLE, 2), {}))

    monkeypatch.setattr(all_layers[HOLDERS[0]], "reset_lora", reset_lora)
    apart.capture("a", adapter(ATTENTION, 1))
    apart.slot("sum(a)")
    (reply,) = replies
    assert not reply["ok"]
    assert "contains fused 3D MoE weights" in reply["error"]


def test_what_the_largest_merge_takes_counts_all_experts(apart: Place, whole: Place) -> None:
    for place in (apart, whole):
        modules, nbytes = model_hooks.largest_adapter(place.layers)
        experts = sum(out + width for out, width in (APART if place is apart else WHOLE).values())
        without = [name for name in place.layers.modules if "experts" not in name]
        place.layers.modules = {name: place.layers.modules[name] for name in without}
        delattr(place.layers, ATTRIBUTE)
        fewer, less = model_hooks.largest_adapter(place.layers)
        assert nbytes - less == 4 * MAX_RANK * experts
        assert modules - fewer == len(APART if place is apart else WHOLE)
