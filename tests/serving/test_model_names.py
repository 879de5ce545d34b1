"""Which module of the model an adapter's names mean on a server, and what becomes of those that mean none."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.config import VllmConfig
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.models.utils import PPMissingLayer, WeightsMapper

from gates import captured, prepared
from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.calibration import CALIBRATION_NAME, Calibration, write_calibration
from merged_lora.engine import merge
from merged_lora.errors import MergeError
from merged_lora.factors import Factors
from merged_lora.spec import parse
from merged_lora.vllm_plugin.hooks import models as model_hooks
from merged_lora.vllm_plugin.hooks.names import ModelNames
from merged_lora.vllm_plugin.hooks.worker import VllmPlainAdapters
from merged_lora.vllm_plugin.hooks.wrapping import ATTRIBUTE
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.worker.merge_worker import MergeWorker
from slots import CopyingBackend, activate, assert_same, contents, maker, worker_manager
from tiny import HIDDEN, KV_HEADS, MAX_RANK, MODULES

pytestmark = pytest.mark.usefixtures("activation_hook")

QUERY = "model.layers.0.self_attn.q_proj"
ROWS = {"q_proj": HIDDEN, "k_proj": KV_HEADS * HIDDEN // 2, "v_proj": KV_HEADS * HIDDEN // 2}


class Place:
    """A worker with vLLM's own layers, and the adapters that it captured."""

    def __init__(self, config: VllmConfig, folder: Path) -> None:
        self.manager: Any = LRUCacheWorkerLoRAManager.__new__(LRUCacheWorkerLoRAManager)
        vars(self.manager).update(vars(worker_manager(config)))
        self.layers = self.manager._adapter_manager
        adapters = VllmPlainAdapters(self.manager)
        self.worker = MergeWorker(MAX_RANK, 1 << 30, adapters, maker(self.manager, CopyingBackend()))
        self.keys: dict[str, str] = {}
        self._folder = folder

    def capture(self, name: str, adapter: Adapter, served: bool = False) -> Any:
        """The reply about an adapter, which is also to be served if ``served``."""
        path = str(self._folder / name)
        adapter.save(path)
        assert isinstance(adapter.calibration, Calibration | None)
        if adapter.calibration is not None:
            write_calibration(Path(path, CALIBRATION_NAME), adapter.calibration)
        reply = captured(self.worker, "one", None, path, *([{}] if served else []))
        self.keys[name] = reply.get("key", "")
        return reply

    def slot(self, spec: str) -> dict[str, torch.Tensor]:
        """What the layers hold of a merge of captured adapters."""
        parsed = parse(spec)
        identity = MergeIdentity(parsed, tuple(self.keys[name] for name in parsed.names))
        assert prepared(self.worker, identity.path)["ok"]
        return contents(self.manager, activate(self.manager, self.worker.load_merge(identity.path)))


@pytest.fixture
def place(vllm_config: VllmConfig, tmp_path: Path) -> Place:
    return Place(vllm_config, tmp_path)


def respelled(adapter: Adapter, old: str, new: str) -> Adapter:
    """The same adapter, as it would have been trained with another class of the same model."""
    names = {name: name.replace(old, new, 1) for name in adapter.modules}
    modules = {names[name]: factors for name, factors in adapter.modules.items()}
    twin = adapter.renamed(modules, {name: [new] for name, new in names.items()})
    assert isinstance(twin.calibration, Calibration)
    made_there = replace(twin.calibration, adapter=Adapter(modules).digest)
    return replace(twin, calibration=made_there)


def assert_refused(reply: Mapping[str, Any], *words: str) -> None:
    assert (reply["ok"], reply["kind"]) == (False, "user"), reply
    assert [word for word in words if word not in reply["error"]] == []


# One module under two names


@pytest.mark.parametrize("spec", ["sum(a, b)", "ties(a, b)", "regmean(a, b)"])
def test_sources_that_spell_a_module_differently_merge_as_if_they_spelled_it_alike(
    place: Place, spec: str
) -> None:
    a, b = (random_adapter(MODULES, 4, torch.bfloat16, seed) for seed in (1, 2))
    for name, adapter in {"a": a, "b": b, "c": respelled(b, "model.", "text.")}.items():
        assert place.capture(name, adapter)["ok"]
    expected = place.slot(spec)
    assert any(tensor.any() for tensor in expected.values())
    assert_same(place.slot(spec.replace("b)", "c)")), expected)


def test_a_sum_over_two_spellings_is_the_sum_of_both_deltas(place: Place) -> None:
    a, b = (random_adapter({QUERY: (HIDDEN, HIDDEN)}, 4, seed=seed) for seed in (1, 2))
    place.capture("a", a)
    place.capture("b", respelled(b, "model.", "text."))
    slot = place.slot("sum(0.5*a, 0.5*b)")
    delta = (
        slot["text.layers.0.self_attn.qkv_proj b 0"][0].double()
        @ slot["text.layers.0.self_attn.qkv_proj a 0"][0].double()
    )
    expected = 0.5 * a.modules[QUERY].delta() + 0.5 * b.modules[QUERY].delta()
    assert torch.allclose(delta, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_respelled_source_draws_the_entries_that_it_draws_offline(place: Place) -> None:
    source = respelled(random_adapter(MODULES, 4, torch.bfloat16), "model.", "text.")
    place.capture("a", source)
    spec = "dare_linear(a, density=0.5)"
    place.capture("twin", merge(spec, {"a": place._folder / "a"}), served=True)
    twin = place.worker.load_plain(str(place._folder / "twin"), 3)
    expected = contents(place.manager, activate(place.manager, twin))
    assert any(tensor.any() for tensor in expected.values())
    assert_same(place.slot(spec), expected)


def test_an_adapter_with_the_usual_names_stays_as_it_is(place: Place) -> None:
    adapter = random_adapter(MODULES, 4)
    assert model_hooks.fitted_adapter(place.layers, adapter) is adapter
    assert place.capture("a", adapter)["key"] == adapter.identity


def test_an_adapter_that_has_a_module_twice_is_refused(place: Place) -> None:
    twice = random_adapter({QUERY: (HIDDEN, HIDDEN), QUERY.replace("model.", "text."): (HIDDEN, HIDDEN)})
    assert_refused(place.capture("a", twice), QUERY, "one module of the model")


@pytest.mark.parametrize("old", ["model.", "text."])
def test_a_plain_adapter_is_served_as_vllm_reads_it_however_it_is_spelled(place: Place, old: str) -> None:
    adapter = random_adapter(MODULES, 4, torch.bfloat16, scaling=dict.fromkeys(MODULES, 2.0) | {QUERY: 3.0})
    reply = place.capture("a", respelled(adapter, "model.", old), served=True)
    assert (reply["ok"], reply["refusal"]) == (True, "")
    ours = place.worker.load_plain(str(place._folder / "a"), 3)
    assert ours is not None
    theirs = VllmPlainAdapters(place.manager).read(str(place._folder / "a"), {})
    theirs.id = 4
    expected = contents(place.manager, activate(place.manager, theirs))
    assert_same(contents(place.manager, activate(place.manager, ours)), expected)


# Models of vLLM

LANGUAGE = "language_model.model.layers.0.self_attn.q_proj"
NEW, OLD, TEXT = (
    f"{prefix}layers.0.self_attn.q_proj" for prefix in ("model.language_model.", LANGUAGE[:21], "model.")
)


def mapper_of(model: str) -> WeightsMapper:
    """The mapper of one of vLLM's models, given as ``FILE:CLASS``, read from its source.

    Models with images cannot be imported without torchvision.
    """
    file, name = model.split(":")
    source = (Path(vllm.__file__).parent / "model_executor/models" / f"{file}.py").read_text("utf-8")
    (found,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
    (mapper,) = (
        ast.unparse(n.value)
        for n in found.body
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "hf_to_vllm_mapper"
    )
    made = eval(mapper, {"WeightsMapper": WeightsMapper})
    assert isinstance(made, WeightsMapper)
    return made


def names_of_model(mapper: WeightsMapper, *parts: str) -> ModelNames:
    """The names of a multimodal model with a mapper and these modules, of which none is built."""
    layers = SimpleNamespace(
        model=SimpleNamespace(hf_to_vllm_mapper=mapper, named_modules=lambda: []),
        modules=dict.fromkeys(parts),
        packed_modules={},
        lora_config=SimpleNamespace(target_modules=None),
        is_pooling_model=False,
        supports_mm=True,
        mm_mapping=SimpleNamespace(language_model=["language_model."]),
    )
    for name in ("_get_lora_layer_weights", "_get_text_lora_name", "_get_text_lora_names"):
        method = vars(LoRAModelManager).get(name)
        if method is not None:
            setattr(layers, name, method.__get__(layers))
    return ModelNames(layers)


@pytest.mark.parametrize(
    ("model", "part", "spellings"),
    [
        ("qwen2_vl:Qwen2VLForConditionalGeneration", LANGUAGE, [NEW, LANGUAGE, TEXT]),
        ("mistral3:Mistral3ForConditionalGeneration", LANGUAGE, [NEW, LANGUAGE, TEXT]),
        ("gemma3_mm:Gemma3ForConditionalGeneration", LANGUAGE, [NEW, LANGUAGE]),
        ("qwen3_vl:Qwen3VLForConditionalGeneration", LANGUAGE, [NEW, LANGUAGE]),
        (
            "gemma3_mm:Gemma3ForConditionalGeneration",
            "language_model.lm_head",
            ["lm_head", "language_model.lm_head"],
        ),
        (
            "qwen3_vl:Qwen3VLForConditionalGeneration",
            "visual.blocks.0.attn.proj",
            ["model.visual.blocks.0.attn.proj"],
        ),
        ("gpt_oss:GptOssForCausalLM", "model.layers.0.attn.q_proj", [TEXT, "model.layers.0.attn.q_proj"]),
    ],
)
def test_every_spelling_that_a_model_of_vllm_takes_becomes_one_that_it_reads_back(
    model: str, part: str, spellings: list[str]
) -> None:
    names = names_of_model(mapper_of(model), part)
    assert [names.parts(spelling) for spelling in spellings] == [[part]] * len(spellings)
    (one,) = {names.spelling(part, spelling) for spelling in spellings}
    assert names.parts(one) == [part]


def test_a_name_that_vllm_would_map_twice_stays_as_the_adapter_has_it() -> None:
    names = names_of_model(WeightsMapper(orig_to_new_substr={".fc1": ".mlp.fc1"}), "layers.0.mlp.fc1")
    assert names.parts("layers.0.mlp.fc1") == []  # vLLM makes layers.0.mlp.mlp.fc1 of it
    assert names.spelling("layers.0.mlp.fc1", "layers.0.fc1") == "layers.0.fc1"


def test_what_is_known_of_names_is_bounded_whatever_adapters_call_their_modules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("merged_lora.vllm_plugin.hooks.names.KNOWN", 8)
    names = names_of_model(WeightsMapper(orig_to_new_prefix={"model.": "text."}), "text.q_proj")
    for i in range(100):
        assert names.theirs(f"model.{i}.q_proj") == f"text.{i}.q_proj"
        assert names.spelling("text.q_proj", f"{i}.q_proj") == "model.q_proj"
    assert names._theirs.cache_info().currsize == 8
    assert len(names._spellings) == 1


def test_a_pooling_models_modules_go_by_names_without_a_prefix_too(place: Place) -> None:
    place.layers.is_pooling_model = True
    place.layers.model.hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"layers.": "text.layers."})
    names = ModelNames(place.layers)
    assert names.parts("layers.0.self_attn.q_proj") == ["text.layers.0.self_attn.q_proj"]


def test_an_error_of_vllm_names_the_folder_that_it_is_about(place: Place) -> None:
    with pytest.raises(MergeError, match=r"^Loading lora nothing failed: No adapter found for .*/nothing$"):
        VllmPlainAdapters(place.manager).read(str(place._folder / "nothing"), {})


# Modules that the model does not have


@pytest.mark.parametrize(
    "stranger",
    [
        "model.layers.99.self_attn.q_proj",
        "transformer.layers.0.self_attn.q_proj",
        "vision_tower.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.w_proj",
    ],
)
def test_a_source_with_a_module_that_the_model_lacks_is_refused_by_its_name(
    place: Place, stranger: str
) -> None:
    adapter = random_adapter({**MODULES, stranger: (HIDDEN, HIDDEN)})
    assert_refused(place.capture("a", adapter), f"the model has no module {stranger} that", "--without")


def test_an_adapter_with_a_module_that_the_model_lacks_is_served_as_vllm_does_and_never_merged(
    place: Place,
) -> None:
    stranger = "model.layers.99.self_attn.q_proj"
    adapter = random_adapter({**MODULES, stranger: (HIDDEN, HIDDEN)}, 4, torch.bfloat16)
    reply = place.capture("a", adapter, served=True)
    assert reply["ok"]
    assert f"the model has no module {stranger}" in reply["refusal"]
    lora = place.worker.load_plain(str(place._folder / "a"), 3)
    assert lora is not None
    assert contents(place.manager, activate(place.manager, lora))["text.layers.0.self_attn.o_proj b 0"].any()


def test_a_module_in_another_stage_of_the_pipeline_is_none_of_this_workers_business(
    place: Place,
) -> None:
    place.layers.model.text.layers.append(PPMissingLayer())
    adapter = random_adapter({**MODULES, "model.layers.2.self_attn.q_proj": (HIDDEN, HIDDEN)})
    assert place.capture("a", adapter)["ok"]


def test_a_module_that_the_operator_leaves_out_is_no_reason_to_refuse_an_adapter(place: Place) -> None:
    output = "text.layers.0.self_attn.o_proj"
    del place.layers.modules[output]
    adapter = random_adapter(MODULES)
    assert_refused(place.capture("a", adapter), "layers.0.self_attn.o_proj")
    delattr(place.layers, ATTRIBUTE)  # what was found out when the worker started
    place.layers.lora_config.target_modules = ["qkv_proj", "gate_up_proj", "down_proj"]
    assert place.capture("b", adapter)["ok"]


def test_a_module_that_the_model_skips_is_no_reason_to_refuse_an_adapter(place: Place) -> None:
    place.layers.model.lora_skip_prefixes = ["mtp."]
    adapter = random_adapter({**MODULES, "mtp.layers.0.q_proj": (HIDDEN, HIDDEN)})
    assert place.capture("a", adapter)["ok"]


# Fused modules


def fused(adapter: Adapter, layer: int) -> Adapter:
    """The same deltas with the three projections of a layer in one piece, of three times the rank."""
    prefix = f"model.layers.{layer}.self_attn."
    parts = [adapter.modules[f"{prefix}{name}"] for name in ROWS]
    a, b = torch.cat([f.a for f in parts]), torch.block_diag(*[f.b for f in parts])  # type: ignore[no-untyped-call]
    others = {name: f for name, f in adapter.modules.items() if name.removeprefix(prefix) not in ROWS}
    return Adapter({**others, f"{prefix}qkv_proj": Factors(a, b, parts[0].scaling)}, adapter.header)


def test_a_module_in_one_piece_becomes_the_parts_that_vllm_packs(place: Place) -> None:
    adapter = random_adapter(MODULES, 4)
    whole = model_hooks.fitted_adapter(place.layers, fused(adapter, 0))
    assert whole.modules.keys() == adapter.modules.keys()
    for name, factors in adapter.modules.items():
        expected = factors.delta()
        assert torch.allclose(whole.modules[name].delta(), expected, rtol=0, atol=1e-12)


def test_a_source_in_one_piece_merges_with_one_in_parts(place: Place) -> None:
    one = random_adapter({"model.layers.0.self_attn.qkv_proj": (sum(ROWS.values()), HIDDEN)}, 4, seed=1)
    two = random_adapter({QUERY: (HIDDEN, HIDDEN)}, 4, seed=2)
    place.capture("one", one)
    place.capture("two", two)
    slot = place.slot("sum(one, two)")
    whole = one.modules["model.layers.0.self_attn.qkv_proj"].delta()
    rows = torch.split_with_sizes(whole, list(ROWS.values()))
    for i, expected in enumerate((rows[0] + two.modules[QUERY].delta(), *rows[1:])):
        a, b = (slot[f"text.layers.0.self_attn.qkv_proj {side} {i}"][0].double() for side in "ab")
        assert torch.allclose(b @ a, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_calibration_of_a_module_in_one_piece_is_that_of_each_part(place: Place) -> None:
    name = "model.layers.0.self_attn.qkv_proj"
    adapter = random_adapter({name: (sum(ROWS.values()), HIDDEN)})
    split = model_hooks.fitted_adapter(place.layers, adapter)
    assert isinstance(adapter.calibration, Calibration)
    assert isinstance(split.calibration, Calibration)
    split.calibration.check(split.modules, split.digest, split.header.base_model)
    assert set(map(id, split.calibration.inputs.values())) == {id(adapter.calibration.inputs[name])}


def test_a_module_in_one_piece_with_other_rows_is_refused(place: Place) -> None:
    adapter = random_adapter({"model.layers.0.self_attn.qkv_proj": (96, HIDDEN)})
    assert_refused(place.capture("a", adapter), "qkv_proj has 96 rows", "v_proj")


def test_parts_of_a_module_that_the_model_has_in_one_piece_are_refused(place: Place) -> None:
    adapter = random_adapter({"model.layers.0.mlp.fused_proj.q": (48, HIDDEN)})
    assert_refused(place.capture("a", adapter), "no module model.layers.0.mlp.fused_proj.q")
