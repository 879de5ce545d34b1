"""The page about other projects: each of our lines is run, and its numbers are checked."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from fences import ROOT, blocks_of
from making import SMALL, random_adapter
from merged_lora import mergekit
from merged_lora.adapters import Adapter
from merged_lora.engine import merge
from merged_lora.errors import SpecError
from merged_lora.lorax import USED_BY
from merged_lora.planning import make_plan
from merged_lora.spec import from_json, parse

PAGE = "docs/coming-from.md"
SECTIONS = re.split(r"^## ", (ROOT / PAGE).read_text(encoding="utf-8"), flags=re.MULTILINE)
ROW = re.compile(r"^\| (?P<theirs>.*?) \| (?P<ours>.*?) \| (?P<differs>.*?) ?\|$", re.MULTILINE)


def rows(section: str) -> list[tuple[str, str, str]]:
    """The rows of the table of a section: theirs, ours, what differs or is refused."""
    (text,) = (part for part in SECTIONS if part.startswith(section))
    found = [(match["theirs"], match["ours"], match["differs"]) for match in ROW.finditer(text)]
    return [row for row in found if row[1] not in ("here", "---")]


ROWS = [(section, *row) for section in ("PEFT", "LoRAX", "mergekit", "Provenir") for row in rows(section)]


@cache
def examples() -> dict[str, Adapter]:
    return {name: Adapter.load(ROOT / "examples/adapters" / name) for name in ("sql", "tone")}


@cache
def small() -> dict[str, Adapter]:
    """Two adapters of one small model, by the names that the page gives its own."""
    return {name: random_adapter(SMALL, seed=seed) for seed, name in enumerate(("sql", "tone"))}


@pytest.mark.parametrize(("section", "theirs", "ours", "differs"), ROWS)
def test_each_of_our_lines_is_a_merge_that_is_made(
    section: str, theirs: str, ours: str, differs: str
) -> None:
    spec = parse(ours.strip("`"))
    assert ours == f"`{ours.strip('`')}`"
    assert set(spec.names) == {"sql", "tone"}
    assert make_plan(spec, examples()).modules
    merged = merge(spec, small(), backend="numpy")
    assert merged.modules.keys() == small()["sql"].modules.keys()
    assert all(torch.isfinite(factors.b @ factors.a).all() for factors in merged.modules.values())


def test_every_combination_type_of_peft_has_a_line() -> None:
    tuners = pytest.importorskip("peft.tuners.lora.model")
    hints = get_type_hints(tuners.LoraModel.add_weighted_adapter, vars(tuners))
    kinds = set(get_args(hints["combination_type"]))
    lines = {
        match[1]: parse(ours.strip("`"))
        for theirs, ours, _ in rows("PEFT")
        if (match := re.match(r'`"(\w+)"`', theirs))
    }
    assert lines.keys() == kinds
    assert all(spec.strategy == kind for kind, spec in lines.items())


def test_every_strategy_of_lorax_has_a_line_and_the_body_is_one_of_them() -> None:
    lines = {
        match[1] for theirs, *_ in rows("LoRAX") if (match := re.match(r'`merge_strategy="(\w+)"', theirs))
    }
    assert lines == set(USED_BY)
    (body,) = (block for block in blocks_of(PAGE) if block.kind == "json")
    spec = from_json(json.loads(body.text)["merged_adapters"])
    assert f"`{spec}`" in [ours for _, ours, _ in rows("LoRAX")]


@pytest.mark.parametrize("method", mergekit.READERS)
def test_every_method_of_mergekit_has_a_line_of_what_it_is_read_as(method: str) -> None:
    (row,) = (row for row in rows("mergekit") if re.match(rf"`{method}`", row[0]))
    ours = parse(row[1].strip("`"))
    text = f"""
merge_method: {method}
base_model: {"base" if method != "linear" else "null"}
parameters: {shared(method)}
models: [{model("sql", 0.7, method)}, {model("tone", 0.3, method)}]
"""
    if "any density" in row[2]:
        with pytest.raises(SpecError, match=f"close to it is {ours.strategy}"):
            mergekit.read(text)
    else:
        assert mergekit.read(text).spec.without("gamma") == ours


def shared(method: str) -> str:
    """The parameters with which the page names a method, in YAML's short form."""
    if method in ("ties", "dare_linear", "dare_ties", "della", "della_linear"):
        return "{density: 0.4}"
    return {
        "breadcrumbs": "{density: 0.9}",
        "breadcrumbs_ties": "{density: 0.9, normalize: true}",
        "sce": "{select_topk: 0.4}",
    }.get(method, "{}")


def model(name: str, weight: float, method: str) -> str:
    """A LoRA with its weight, if the method takes one; the same for all if it has to be."""
    if method in ("sce", "model_stock"):
        return f"{{model: base+./{name}}}"
    same = method in ("ties", "breadcrumbs_ties")
    return f"{{model: base+./{name}, parameters: {{weight: {1 if same else weight}}}}}"


def test_methods_of_mergekit_that_are_refused_by_name_are_on_the_page() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    for name in ("slerp", "karcher", "arcee_fusion", *mergekit.REFUSED):
        assert f"`{name}`" in text or name == "tokenizer"


def test_the_file_on_the_page_is_the_one_of_the_examples() -> None:
    shown = [block.text for block in blocks_of(PAGE) if block.kind == "text"]
    assert Path(ROOT / "examples/mergekit.yaml").read_text(encoding="utf-8") in shown


def test_the_line_of_loraxs_size_leaves_kept_entries_as_they_are() -> None:
    one = random_adapter(SMALL, scaling=1.0)
    for spec, factor in (
        ("dare_linear(0.49*a, density=0.4, scale=0.16)", 0.7),
        ("dare_linear(a, density=0.4)", 2.5),
    ):
        made = merge(spec, {"a": one})
        for name, source in one.modules.items():
            got, given = made.modules[name].a, source.a
            kept = got != 0
            assert 0.2 < float(kept.double().mean()) < 0.6
            # 0.4 is rounded to 65536ths, each number to float32
            assert torch.allclose(got[kept], factor * given[kept], rtol=1e-4)


def provenir_slerp(first: np.ndarray, second: np.ndarray, weights: tuple[float, float]) -> np.ndarray:
    """Provenir 0.8's interpolation between two tensors, from its formula."""
    begun = first * weights[0]
    theta = np.arccos(abs(np.clip((begun * second).sum(), -1, 1)))
    if theta < 1e-6:
        return begun + second * weights[1]
    t = weights[1]
    return np.asarray((np.sin((1 - t) * theta) * begun + np.sin(t * theta) * second) / np.sin(theta))


def test_provenirs_slerp_is_a_mean_of_long_factors_and_uneven_between_short_ones() -> None:
    x, y = np.eye(2)
    assert np.round(provenir_slerp(x, y, (0.5, 0.5)), 2).tolist() == [0.35, 0.71]
    long, other = np.array([3.0, 1.0]), np.array([1.0, 2.0])
    assert np.allclose(provenir_slerp(long, other, (0.7, 0.3)), 0.7 * long + 0.3 * other)


def test_provenirs_ties_keeps_more_of_the_stronger_adapter() -> None:
    rng = np.random.default_rng(0)
    stacked = np.stack([rng.normal(size=1000), 3 * rng.normal(size=1000)])
    kept = np.abs(stacked) >= np.quantile(np.abs(stacked), 0.8)
    assert kept.mean() == pytest.approx(0.2, abs=1e-3)
    assert kept[1].mean() > 5 * kept[0].mean()
