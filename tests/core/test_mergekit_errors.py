"""``merged-lora merge --mergekit FILE``: what is read, what is refused, and by which words."""

from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Any

import pytest

from making import SMALL, random_adapter
from merged_lora import mergekit
from merged_lora.adapters import Adapter
from merged_lora.engine import merge
from merged_lora.errors import SpecError
from running import Run, within_a_second

AB = """models:
- {model: org/base+a, parameters: {weight: 0.5}}
- {model: org/base+b, parameters: {weight: 0.5}}
"""
MODELS = "models: [{model: org/base+a}, {model: org/base+b}]\n"
BASE = "base_model: org/base\n"


def method(name: str, shared: str = "", models: str = AB, base: str = BASE) -> str:
    """A file with a merge method, parameters of the whole merge in YAML's short form, and models."""
    return f"merge_method: {name}\n{base}parameters: {{{shared}}}\n{models}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: adapters ``a`` and ``b``, ``less``, a module short, and a file ``ties.yaml``."""
    monkeypatch.chdir(tmp_path)
    random_adapter(SMALL, seed=1).save("a")
    random_adapter(SMALL, seed=2).save("b")
    less = {name: shape for name, shape in SMALL.items() if name != list(SMALL)[-1]}
    random_adapter(less, seed=3).save("less")
    Path("ties.yaml").write_text(method("ties", "density: 0.4"), encoding="utf-8")
    return tmp_path


def test_a_file_is_merged_as_the_spec_that_it_means(run: Run, folder: Path) -> None:
    code, out, err = run("merge", "--mergekit", "ties.yaml", "--output", "out", "--rank", 9)
    assert (code, err) == (0, "")
    assert out.startswith("out: ties_svd(a, b, density=0.4, rank=9), rank 9, 4 modules, ")
    assert " of the squared norm kept (" in out
    assert (
        Adapter.load("out").digest
        == merge("ties_svd(a, b, density=0.4, rank=9)", {"a": "a", "b": "b"}).digest
    )


def test_sums_are_exact_and_a_rank_limits_them(run: Run, folder: Path) -> None:
    Path("sum.yaml").write_text(method("task_arithmetic", "lambda: 2"), encoding="utf-8")
    assert "sum(0.5*a, 0.5*b, scale=2), rank 8" in run("merge", "--mergekit", "sum.yaml", "--output", "x")[1]
    assert "rank 5" in run("merge", "--mergekit", "sum.yaml", "--output", "y", "--rank", 5)[1]


def test_a_rule_that_sees_a_missing_module_otherwise_needs_all_of_them(run: Run, folder: Path) -> None:
    text = method("nuslerp").replace("+b", "+less")
    Path("nuslerp.yaml").write_text(text, encoding="utf-8")
    code, _, err = run("merge", "--mergekit", "nuslerp.yaml", "--output", "out")
    assert code == 2
    assert f"{list(SMALL)[-1]} is not in less: mergekit takes a delta of zeros there" in err
    only = ("--only", "layers.0")
    assert run("merge", "--mergekit", "nuslerp.yaml", "--output", "out", *only)[0] == 0


def test_a_place_is_a_folder_or_else_a_repository(folder: Path) -> None:
    random_adapter(SMALL).save("org/here")
    names = ("org/here", "else/where", "else/where2@v1", "./a", "other/where")
    models = "".join(f"- model: org/base+{name}\n" for name in names)
    read = mergekit.read(method("ties", "weight: 1", f"models:\n{models}"))
    assert read.places == {
        "here": Path("org/here"),
        "where": "hf:else/where",
        "where2": "hf:else/where2@v1",
        "a": Path("a"),
        "where_2": "hf:other/where",
    }
    with pytest.raises(SpecError, match="is a folder with a revision"):
        mergekit.read(method("ties", "weight: 1", "models: [{model: org/base+a@v1}]"))


def test_a_last_part_that_is_no_name_is_replaced(folder: Path) -> None:
    read = mergekit.read(method("ties", "weight: 1", 'models: [{model: "org/base+./ties(x)"}]'))
    assert list(read.places) == ["lora"]


def test_parameters_of_a_model_come_before_those_of_the_merge(folder: Path) -> None:
    models = "models: [{model: org/base+a, parameters: {density: 0.2}}, {model: org/base+b}]"
    read = mergekit.read(method("ties", "weight: 2, density: 4e-1", models))
    assert str(read.spec) == "ties_svd(a, b, density=[0.2, 0.4])"


def test_the_types_of_whole_weights_say_nothing_of_an_adapter(folder: Path) -> None:
    text = method("ties") + "dtype: bfloat16\nout_dtype: torch.float16\nchat_template: null\n"
    assert mergekit.read(text) == mergekit.read(method("ties"))


REFUSED: dict[str, tuple[str, str]] = {
    "slices": ("merge_method: linear\nslices: []", "slices is not read: it builds a model from layers"),
    "modules": (
        "merge_method: linear\nmodules: {}",
        "modules is not read: merges of some modules are those of --only",
    ),
    "a tokenizer": (
        method("ties") + "tokenizer_source: union",
        "tokenizer_source is not read: an adapter has no",
    ),
    "a template": (
        method("ties") + "chat_template: auto",
        "chat_template is not read: an adapter has no chat template",
    ),
    "an unknown key": (
        method("ties") + "name: x",
        "unknown key 'name'; known: merge_method, base_model, models",
    ),
    "an unknown dtype": (method("ties") + "dtype: int4", "dtype: 'int4' is none of float16"),
    "no method": (MODELS, "merge_method: 'None' is none of linear, task_arithmetic, ties"),
    "a list for a method": ("merge_method: [ties]\n" + MODELS, "is none of linear"),
    "an unknown method": (method("magic"), "merge_method: 'magic' is none of linear, task_arithmetic"),
    **{
        name: (method(name), f"merge_method: {name} is not read: ")
        for name in ("slerp", "karcher", "arcee_fusion", "nearswap", "passthrough", "ram", "ramplus_tl")
    },
    "no models": ("merge_method: linear", "models is a list of BASE+LORA"),
    "no LoRA": (method("linear", models="models: [{model: org/base}]"), "no model has a LoRA"),
    "a whole model": (
        method("linear", models=AB + "- {model: org/other}"),
        "the model 'org/other' is not read: it is a whole model, and adapters alone are merged",
    ),
    "another base model": (
        method("ties", models=AB + "- {model: org/other+c}"),
        "a LoRA of 'org/other' is not read: others are over 'org/base'",
    ),
    "a base model with a LoRA": (
        method("ties", base="base_model: org/base+a\n"),
        "base_model is not read: it holds a LoRA",
    ),
    "two LoRAs on one model": (
        method("ties", models="models: [{model: org/base+a+b}]"),
        "'org/base+a+b' is not of the form BASE+LORA",
    ),
    "a model twice": (method("ties", models=AB + "- {model: org/base+a}"), "'org/base+a' is given twice"),
    "a model in parts": (
        method("ties", models="models: [{model: {model: {path: x}}}]"),
        "models[0].model is the text BASE or BASE+LORA",
    ),
    "an unknown key of a model": (
        method("ties", models="models: [{model: org/base+a, weight: 1}]"),
        "models[0]: unknown key 'weight'; known: model, parameters",
    ),
    "no base model": (
        method("ties", base=""),
        "ties without base_model is not read: mergekit then merges whole models",
    ),
    "no weight": (method("ties", models=MODELS), "'org/base+a' has no weight, which ties needs"),
    "no weight of the base model": (
        method("linear"),
        "linear counts base_model as one of its models; give it a weight",
    ),
    "weights that differ": (
        method("ties", models=AB.replace("0.5", "1", 1)),
        "ties with these weights is not read: mergekit divides the sum of those that agree by",
    ),
    "negative weights": (
        method("ties", models=AB.replace("0.5", "-1")),
        "with equal weights over 0 both are the same",
    ),
    "sums that are not divided": (
        method("breadcrumbs_ties"),
        "breadcrumbs_ties without normalize is not read: mergekit does not divide the sum of those that",
    ),
    "DARE": (
        method("dare_ties", "density: 0.5, normalize: true"),
        "dare_ties with a density below 1 is not read: entries are dropped at random by other random "
        "numbers, and mergekit multiplies all of them by one factor that brings the L1 norm back, while each "
        "kept entry is divided by its probability here; close to it is dare_ties_svd",
    ),
    "DARE without rescaling": (
        method("dare_linear", "density: 0.5, rescale: false"),
        "mergekit multiplies none of them",
    ),
    "DELLA": (
        method("della", "density: 0.5"),
        "divided by its own probability here; close to it is della_svd",
    ),
    "a rescaled trim": (method("ties", "density: 0.5, rescale: true"), "ties with rescale is not read"),
    "a base model that would be multiplied": (
        method("linear", "normalize: false", AB.replace("0.5", "0.7"), base=""),
        "linear without normalize is not read: the weights add up to 1.4",
    ),
    "weights that cancel": (
        method("linear", models=AB.replace("0.5", "-0.5", 1), base=""),
        "linear divides by the sum of the weights, which is 0",
    ),
    "weights that cancel in a sum": (
        method("task_arithmetic", "normalize: true", AB.replace("0.5", "-0.5", 1)),
        "the weights add up to 0, by which mergekit does not divide",
    ),
    "weights that cancel on a circle": (
        method("nuslerp", models=AB.replace("0.5", "-0.5", 1)),
        "nuslerp with weights that add up to 0 is not read",
    ),
    "interpolation by rows": (
        method("nuslerp", "nuslerp_flatten: false"),
        "nuslerp_flatten: false is not read",
    ),
    "angles by rows": (method("model_stock", "filter_wise: true", MODELS), "filter_wise: true is not read"),
    "weights that are not divided": (
        method("multislerp", "normalize_weights: false", AB.replace("0.5", "1")),
        "multislerp without normalize_weights is not read: the weights add up to 2",
    ),
    "another small number": (method("multislerp", "eps: 1e-3"), "eps is not read"),
    "weights of a method without": (
        method("sce"),
        "'org/base+a': sce has no parameter 'weight' there; it has: none",
    ),
    "an unknown parameter": (
        method("ties", "decay: 1"),
        "parameters: ties has no parameter 'decay' there; it has: int8_mask",
    ),
    "a parameter in the wrong place": (
        method("ties", models="models: [{model: org/base+a, parameters: {normalize: true}}]"),
        "normalize is a parameter of the whole merge; move it there",
    ),
    "a gradient": (
        method("ties", "density: [0.2, 0.8]"),
        "density is not read: a list is a gradient over the layers",
    ),
    "a filter": (
        method("ties", "density: [{filter: mlp, value: 0.5}]"),
        "density is not read: it has a filter",
    ),
    "a condition": (method("ties", "density: {value: 0.5}"), "density is not read: it has a filter"),
    "a word for a number": (method("ties", "density: half"), "density is a number, got 'half'"),
    "true for a number": (method("ties", "density: true"), "density is a number, got 'True'"),
    "infinity": (method("ties", "density: .inf"), "density is a number, got 'inf'"),
    "a number for true": (method("ties", "normalize: 1"), "parameters.normalize is true or false, got '1'"),
    "a density over 1": (method("ties", "density: 1.5"), "density must be over 0 and at most 1"),
    "a density of 0": (method("ties", "density: 0"), "density must be over 0 and at most 1"),
    "parameters in a list": ("merge_method: ties\nparameters: [1]\n" + AB, "parameters is a mapping"),
    "a key that is a number": (method("ties", "1: 2"), "parameters is a mapping with names as keys"),
    "a list at the top": ("- 1", "mergekit's YAML is a mapping"),
    "nothing": ("", "mergekit's YAML is a mapping"),
    "a key twice": (method("ties") + "base_model: x", "line 1 of the YAML: 'base_model' is given twice"),
    "a parameter twice": (
        method("ties", "density: 1, density: 0.5"),
        "line 3 of the YAML: 'density' is given twice",
    ),
    "an alias": (
        "merge_method: &x ties\nbase_model: *x",
        "line 2 of the YAML: an alias (*); write values out",
    ),
    "deep nesting": ("[" * 5000, "line 1 of the YAML: too much nesting; write values out"),
    "a tag": ("merge_method: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "broken YAML": ("merge_method: ties\nmodels: [", "line 2 of the YAML"),
    "two documents": ("merge_method: ties\n---\nx: 1", "of the YAML: but found another document"),
    "a character that YAML has not": (
        "merge_method: \x00",
        "the YAML cannot be read: unacceptable character",
    ),
    "a number of many digits": (method("ties", f"density: {'9' * 5000}"), "the YAML cannot be read"),
    "a large file": ("#" * 70_000, "the YAML is longer than 65536 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_means_something_else_is_refused_with_the_reason(run: Run, folder: Path, name: str) -> None:
    text, reason = REFUSED[name]
    Path("file.yaml").write_text(text, encoding="utf-8")
    code, out, err = run("merge", "--mergekit", "file.yaml", "--output", "out")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"merged-lora: error: file\.yaml: [^\n]+\n", err)
    assert reason in err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["a", "--mergekit", "ties.yaml"], "leave out a SPEC, --adapter, --strategy and options"),
        (
            ["--mergekit", "ties.yaml", "--strategy", "ties"],
            "leave out a SPEC, --adapter, --strategy and options",
        ),
        (
            ["--mergekit", "ties.yaml", "--density", "1"],
            "leave out a SPEC, --adapter, --strategy and options",
        ),
        (
            ["--mergekit", "ties.yaml", "--adapter", "a=a"],
            "leave out a SPEC, --adapter, --strategy and options",
        ),
        (["--mergekit", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        (["--mergekit", "a"], "a: Is a directory"),
        (["--mergekit", "a/adapter_model.safetensors"], "a/adapter_model.safetensors is no text in UTF-8"),
    ],
)
def test_a_file_that_cannot_be_asked_for_is_refused(
    run: Run, folder: Path, arguments: list[str], reason: str
) -> None:
    code, out, err = run("merge", *arguments, "--output", "out")
    assert (code, out) == (2, "")
    assert reason in err


def test_the_largest_file_is_refused_or_read_soon() -> None:
    entries = "".join(f"- {{model: org/base+x/lora{i}, parameters: {{weight: 1}}}}\n" for i in range(1000))
    with within_a_second("1000 models"), pytest.raises(SpecError, match="at most 256 sources"):
        mergekit.read(method("ties", models=f"models:\n{entries}"[:20_000].rpartition("\n")[0]))


def test_without_pyyaml_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without_yaml(name: str, *rest: Any) -> Any:
        if name == "yaml":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_yaml)
    with pytest.raises(SpecError, match=r"needs PyYAML, .* pip install 'vllm-merged-lora\[mergekit\]'"):
        mergekit.read(method("ties"))
