"""Adapters of a mixture's experts in vLLM's own slots for experts, without its kernels.

vLLM's CPU build constructs these layers and fills their slots, but cannot run them.  For a server see
``test_served_experts.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
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
from merged_lora.engine import merge
from merged_lora.factors import Factors
from merged_lora.spec import parse
from merged_lora.vllm_plugin.hooks import models as model_hooks
from merged_lora.vllm_plugin.hooks.worker import VllmPlainAdapters
from merged_lora.vllm_plugin.hooks.wrapping import ATTRIBUTE
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.worker.makers import HostMaker, Maker
from merged_lora.vllm_plugin.worker.merge_worker import MergeWorker
from slots import CopyingBackend, activate, assert_same, maker
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
SPECS = [
    "ties(a, b, density=0.5)",
    "sum(0.5*a, b)",
    "cat(a, -1*b)",
    "svd(a, b, rank=3)",
    "dare_ties(a, b, seed=3)",
]

pytestmark = pytest.mark.usefixtures("activation_hook")


def adapter(modules: Mapping[str, tuple[int, int]], seed: int, rank: int = 4) -> Adapter:
    return replace(random_adapter(modules, rank, torch.bfloat16, seed), calibration=None)


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


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
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


@pytest.fixture
def apart(vllm_config: VllmConfig, model_folder: Path, tmp_path: Path) -> Place:
    """A model of which vLLM takes the experts' modules apart."""
    return Place(make_manager(model_folder, False), tmp_path)


@pytest.fixture
def whole(vllm_config: VllmConfig, model_folder: Path, tmp_path: Path) -> Place:
    """A model of which vLLM takes the experts' parameters."""
    return Place(make_manager(model_folder, True), tmp_path)


@pytest.fixture
def mixed(vllm_config: VllmConfig, model_folder: Path, tmp_path: Path) -> Place:
    """The same with --enable-mixed-moe-lora-format."""
    return Place(make_manager(model_folder, True, enable_mixed_moe_lora_format=True), tmp_path)


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


def test_experts_are_refused_where_factors_are_shared(
    vllm_config: VllmConfig, model_folder: Path, tmp_path: Path
) -> None:
    place = Place(make_manager(model_folder, False, enable_moe_shared_loras=True), tmp_path)
    for modules in (APART, WHOLE):
        with pytest.raises(Exception, match="the model has no module"):
            place.adapters.fit(adapter(modules, 1))
    assert place.capture("attention", adapter(ATTENTION, 1))["ok"]
    assert any(tensor.any() for tensor in place.slot("sum(attention)").values())


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
