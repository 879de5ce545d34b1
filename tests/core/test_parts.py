"""Whole tensors: taken over from one source, left out of others, compared if they are the base model's."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from making import peft_tensors, random_adapter, write_by_hand
from merged_lora import merge
from merged_lora.adapters import Adapter, load_sources
from merged_lora.errors import AdapterError, PlanError
from merged_lora.files.parts import KINDS

NAME = "model.layers.0.q_proj"
HEAD = "base_model.model.score.weight"
COPY = "base_model.model.lm_head.base_layer.weight"


def headed(folder: Path, value: float, name: str = HEAD, **config: object) -> Path:
    fields = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]} | config
    return write_by_hand(folder, peft_tensors(NAME) | {name: torch.full((3, 8), value)}, **fields)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """Two adapters with a head each."""
    return {"a": headed(tmp_path / "a", 1.0), "b": headed(tmp_path / "b", 2.0)}


@pytest.mark.parametrize("kind", ["heads", "modules_to_save"])
def test_a_head_is_taken_over_from_the_source_that_is_named(
    tmp_path: Path, sources: dict[str, Path], kind: str
) -> None:
    merge("sum(a, b)", load_sources(sources, take={kind: "b"})).save(tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    assert torch.equal(tensors[HEAD], torch.full((3, 8), 2.0))
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["task_type"]) == (["score"], "SEQ_CLS")


def test_a_head_of_several_layers_is_one_module(tmp_path: Path) -> None:
    names = [f"base_model.model.classifier.{layer}.weight" for layer in ("dense", "out_proj")]
    head = {name: torch.ones(2, 2) for name in names}
    folder = write_by_hand(tmp_path / "a", peft_tensors(NAME) | head, task_type="SEQ_CLS")
    Adapter.load(folder, take=["heads"]).save(tmp_path / "b")
    assert load_file(tmp_path / "b" / "adapter_model.safetensors").keys() == {*peft_tensors(NAME), *names}
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]


def test_without_a_head_no_task_is_written_for_which_peft_expects_one(sources: dict[str, Path]) -> None:
    assert merge("sum(a, b)", load_sources(sources, drop=["heads"])).header.task_type is None


MAPPING = {"base_model_class": "LlamaForX", "parent_library": "transformers.models.llama.modeling_llama"}


def test_the_class_of_the_base_model_is_written_if_the_sources_agree(tmp_path: Path) -> None:
    paths = {n: write_by_hand(tmp_path / n, peft_tensors(NAME), auto_mapping=MAPPING) for n in "ab"}
    paths["c"] = write_by_hand(tmp_path / "c", peft_tensors(NAME), auto_mapping={"base_model_class": "Other"})
    merge("sum(a, b)", paths).save(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "adapter_config.json").read_text())["auto_mapping"] == MAPPING
    assert merge("sum(a, b, c)", paths).header.auto_mapping is None


def test_without_a_head_no_class_is_written_that_has_one(tmp_path: Path) -> None:
    folder = headed(tmp_path / "a", 1.0, task_type=None, auto_mapping=MAPPING)
    assert Adapter.load(folder, ["heads"]).header.auto_mapping is None
    assert Adapter.load(folder, take=["heads"]).header.auto_mapping == MAPPING


def test_other_tasks_are_kept_without_a_head(tmp_path: Path) -> None:
    folder = headed(tmp_path / "a", 1.0, task_type="CAUSAL_LM")
    assert Adapter.load(folder, ["heads"]).header.task_type == "CAUSAL_LM"


def test_heads_of_two_sources_are_not_merged(sources: dict[str, Path]) -> None:
    both = {name: Adapter.load(path, take=["heads"]) for name, path in sources.items()}
    with pytest.raises(PlanError, match="two sources have score as a whole; take it from one of them"):
        merge("sum(a, b)", both)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"take": {"heads": "c"}}, "cannot take heads from 'c', which is no source"),
        ({"take": {"embeddings": "a"}, "drop": ["heads"]}, "cannot take embeddings from 'a': .* has none"),
        ({"take": {"biases": "a"}}, "cannot take 'biases' from a source; it can be one of heads"),
        ({"drop": ["heads", "nrom"]}, "a, b: no module that is called 'nrom'; parts are heads"),
        (
            {"drop": ["head"], "take": {"heads": "a"}},
            "a, b: no module that is called 'head'; did you mean heads?",
        ),
        ({"take": "heads=a"}, "take must be a mapping, not str"),
        ({"rename": ["a=b"]}, "rename must be a mapping, not list"),
        (
            {"drop": ["heads"], "rename": {"vision.": "model."}},
            "a, b: no module whose name begins with 'vision.'",
        ),
        ({"take": {"heads": "a"}, "drop": ["heads"]}, r"to be both taken \(heads\) and dropped \(heads\)"),
        ({"drop": ["haeds"]}, r"heads=NAME; it has nothing that is called 'haeds'$"),
        ({"take": {"heads": "a"}, "drop": ["score"]}, r"to be both taken \(heads\) and dropped \(score\)"),
        ({"drop": "heads"}, "drop must be a list of words, not str"),
        ({"drop": None}, "drop must be a list of words, not NoneType"),
        ({"drop": [["heads"]]}, r"drop must be a list of words, got \['heads'\] in it"),
        ({"rename": {"layers.": None}}, "rename must hold text alone, got None"),
    ],
)
def test_what_is_named_and_is_not_there_is_an_error(
    sources: dict[str, Path], options: dict[str, object], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        load_sources(sources, **options)  # type: ignore[arg-type]


def test_parts_to_leave_out_may_be_given_one_after_the_other(sources: dict[str, Path]) -> None:
    assert load_sources(sources, drop=iter(["heads", "biases"])).keys() == sources.keys()


def test_a_kind_that_one_source_alone_has_is_left_out_of_all(
    tmp_path: Path, sources: dict[str, Path]
) -> None:
    sources["b"] = write_by_hand(tmp_path / "c", peft_tensors(NAME))
    assert load_sources(sources, drop=["heads", "biases"]).keys() == {"a", "b"}
    assert set(KINDS) >= {"heads", "biases"}


def test_names_are_given_a_new_beginning_before_anything_else(tmp_path: Path) -> None:
    tensors = {f"thinker.{key}": tensor for key, tensor in peft_tensors(NAME).items()}
    folder = write_by_hand(tmp_path / "a", tensors)
    with pytest.raises(AdapterError, match="--rename"):
        Adapter.load(folder)
    renamed = Adapter.load(folder, rename={"thinker.base_model.model.": ""})
    assert list(renamed.modules) == [NAME]


def test_a_configuration_speaks_of_the_names_in_the_file(tmp_path: Path) -> None:
    names = [f"foo.layers.{i}.q_proj" for i in range(2)]
    tensors = peft_tensors(names[0]) | peft_tensors(names[1], rank=2)
    patterns = {"alpha_pattern": {names[0]: 400}, "rank_pattern": {f"^{names[1]}": 2}}
    folder = write_by_hand(tmp_path / "a", tensors, **patterns)
    modules = Adapter.load(folder, rename={"foo.": "model."}).modules
    assert {name: (f.rank, f.scaling) for name, f in modules.items()} == {
        "model.layers.0.q_proj": (4, 100.0),
        "model.layers.1.q_proj": (2, 4.0),
    }


def test_padding_of_renamed_modules_is_taken_away(tmp_path: Path) -> None:
    shapes = {"foo.layers.0.q_proj": (8, 8), "foo.layers.1.q_proj": (8, 8)}
    random_adapter(shapes, dict(zip(shapes, (4, 2), strict=True))).save(tmp_path / "a")
    modules = Adapter.load(tmp_path / "a", rename={"foo.": "model."}).modules
    assert [f.rank for f in modules.values()] == [4, 2]


def test_a_pattern_may_name_a_module_with_its_wrapper(tmp_path: Path) -> None:
    tensors = {
        key.replace("model.layers", "_orig_mod.model.layers"): t for key, t in peft_tensors(NAME).items()
    }
    pattern = {"_orig_mod.model.layers.0.q_proj": 400}
    (factors,) = Adapter.load(write_by_hand(tmp_path / "a", tensors, alpha_pattern=pattern)).modules.values()
    assert factors.scaling == 100.0


def test_factors_of_two_adapters_are_no_pair(tmp_path: Path) -> None:
    owners = {"lora_A": "lora_A.sql", "lora_B": "lora_B.chat"}
    tensors = peft_tensors(NAME)
    for side, owner in owners.items():
        tensors = {key.replace(side, owner): tensor for key, tensor in tensors.items()}
    with pytest.raises(AdapterError, match="holds the adapters chat, sql in one file; save each by itself"):
        Adapter.load(write_by_hand(tmp_path / "a", tensors))


@pytest.mark.parametrize("name", ["model.x[0]", "model.x[a]", "model." + "x" * 300])
def test_a_name_that_no_module_has_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match="cannot be the name of a module"):
        Adapter.load(write_by_hand(tmp_path / "a", peft_tensors(name)))


def test_factors_within_another_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"q_proj.base_layer was wrapped by another LoRA adapter"):
        Adapter.load(write_by_hand(tmp_path / "a", peft_tensors(f"{NAME}.base_layer")))


def test_a_head_that_is_taken_whole_has_no_factors_beside_it(tmp_path: Path) -> None:
    one = headed(tmp_path / "a", 1.0, "base_model.model.lm_head.weight")
    two = write_by_hand(tmp_path / "b", peft_tensors(NAME, "lm_head"))
    sources = load_sources({"a": one, "b": two}, take={"heads": "a"})
    with pytest.raises(PlanError, match=r"lm_head is taken whole .* \(--without lm_head\)"):
        merge("sum(a, b)", sources)
    merged = merge("sum(a, b, without=lm_head)", sources)
    assert (list(merged.modules), list(merged.whole)) == ([NAME], ["lm_head"])


def test_two_modules_that_would_get_one_name_are_refused(tmp_path: Path) -> None:
    folder = write_by_hand(tmp_path / "a", peft_tensors(NAME, "vision.layers.0.q_proj"))
    with pytest.raises(AdapterError, match=r"two modules would be called 'model.layers.0.q_proj'"):
        Adapter.load(folder, rename={"vision.": "model."})


def copied(folder: Path, tensor: torch.Tensor) -> Path:
    return write_by_hand(folder, peft_tensors(NAME, "lm_head") | {COPY: tensor})


def test_copies_of_the_base_model_that_differ_are_refused(tmp_path: Path) -> None:
    rows = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    paths = {"a": copied(tmp_path / "a", rows), "b": copied(tmp_path / "b", rows + 1)}
    with pytest.raises(PlanError, match=r"a and b hold different copies of lm_head.base_layer.weight, so"):
        merge("sum(a, b)", paths)
    merge("sum(a, b)", load_sources(paths, drop=["base_copies"]))
    merge("sum(a, b, without=lm_head)", paths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_that_agree_are_no_obstacle_whatever_their_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    paths = {"a": copied(tmp_path / "a", rows), "b": copied(tmp_path / "b", rows.to(dtype))}
    assert list(merge("sum(a, b)", paths).modules) == ["lm_head", NAME]


@pytest.mark.parametrize("name", [f"{NAME}.lora_velora_embed", f"{NAME}.lora_monteclora_sampler.std_prior"])
def test_buffers_of_training_alone_are_passed_over(tmp_path: Path, name: str) -> None:
    plain = write_by_hand(tmp_path / "a", peft_tensors(NAME))
    extra = {f"base_model.model.{name}": torch.ones(3)}
    with_buffer = write_by_hand(tmp_path / "b", peft_tensors(NAME) | extra)
    assert Adapter.load(with_buffer).digest == Adapter.load(plain).digest
