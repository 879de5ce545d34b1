"""What an inspection says of adapters: facts, reasons against a merge, advice; as text, JSON and tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from making import SMALL, random_adapter
from merged_lora.adapters import Adapter
from merged_lora.errors import AdapterError, PlanError, SpecError
from merged_lora.factors import Factors
from merged_lora.files.layout import Header
from merged_lora.judging.inspecting import inspect
from running import Run


def scaled(adapter: Adapter, factor: float) -> Adapter:
    modules = {name: replace(f, scaling=factor * f.scaling) for name, f in adapter.modules.items()}
    return Adapter(modules, adapter.header)


def plain(seed: int, rank: int = 4, dtype: torch.dtype = torch.float32) -> Adapter:
    """An adapter without a calibration."""
    return Adapter(random_adapter(SMALL, rank, dtype, seed=seed).modules, Header(base_model="org/base"))


def test_facts_are_those_of_the_adapter(tmp_path: Path) -> None:
    plain(1, 6, torch.bfloat16).save(tmp_path / "a")
    (fact,) = inspect({"a": tmp_path / "a"}).facts
    assert (fact.name, fact.place, fact.refused) == ("a", str(tmp_path / "a"), None)
    assert (fact.base_model, fact.modules, fact.ranks, fact.scalings) == ("org/base", 4, (6, 6), (2.0, 2.0))
    assert (fact.kinds, fact.dtypes) == (("down_proj", "k_proj", "q_proj"), ("bfloat16",))
    assert fact.vllm is not None
    assert (fact.vllm.max_lora_rank, fact.zero, fact.calibration) == (8, 0, False)
    squares = sum(float(f.delta().square().sum()) for f in plain(1, 6, torch.bfloat16).modules.values())
    assert fact.length == pytest.approx(squares**0.5)


def test_an_adapter_that_cannot_be_read_is_found_and_the_others_are_compared(tmp_path: Path) -> None:
    found = inspect({"a": plain(1), "gone": tmp_path / "gone", "b": plain(2)})
    assert found.facts[1].refused == f"{tmp_path / 'gone'}: no such adapter folder"
    assert found.compared.sources == ("a", "b")
    assert f"gone cannot be merged: {tmp_path / 'gone'}: no such adapter folder" in found.verdict()


@pytest.mark.parametrize("count", [1, 2])
def test_adapters_of_which_none_can_be_read_are_found_so(tmp_path: Path, count: int) -> None:
    found = inspect({f"a{i}": tmp_path / "gone" for i in range(count)})
    assert (found.fails, found.refused, len(found.verdict())) == (True, None, count)


def test_sources_of_different_shapes_are_refused_with_the_reason() -> None:
    other = random_adapter({name: (out + 2, width) for name, (out, width) in SMALL.items()}, seed=2)
    found = inspect({"a": plain(1), "b": other})
    assert found.refused is not None
    assert "shape" in found.refused
    assert (found.comparison, found.fits, found.specs) == (None, (), ())
    assert found.verdict() == [f"The sources do not go together: {found.refused}"]
    with pytest.raises(PlanError, match="nothing was compared"):
        found.cosines()


def test_merges_that_do_not_fit_have_their_reason_and_the_others_are_the_specs() -> None:
    found = inspect({"a": plain(1, 4), "b": plain(2, 6)})
    fits = {fit.spec.partition("(")[0]: fit for fit in found.fits}
    assert "needs a calibration of every source" in str(fits["regmean"].refused)
    assert "needs equal ranks" in str(fits["linear"].refused)
    assert (fits["sum"].refused, fits["sum"].rank) == (None, 10)
    assert found.specs == tuple(fit.spec for fit in found.fits if fit.refused is None)
    assert inspect({"a": random_adapter(SMALL, seed=1), "b": random_adapter(SMALL, seed=2)}).specs[0] == (
        "regmean(a, b)"
    )


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (scaled(plain(1), 1.5), "a and b are nearly the same (cosine 1.00)"),
        (scaled(plain(1), -1.0), "a and b are opposed (cosine -1.00)"),
        (scaled(plain(2), 3.0), "times as long as a and may drown it: give a a larger weight"),
        (scaled(plain(2), 0.0), "b changes nothing: its delta is zero."),
    ],
    ids=["same", "opposed", "longer", "zero"],
)
def test_the_verdict_names_what_will_hurt(second: Adapter, words: str) -> None:
    verdict = " ".join(inspect({"a": plain(1), "b": second}).verdict())
    assert words in verdict
    assert words not in " ".join(inspect({"a": plain(1), "b": plain(2)}).verdict())


def test_a_shared_beginning_is_named() -> None:
    first, second = plain(1), plain(2)
    shared = {name: Factors(first.modules[name].a, f.b, f.scaling) for name, f in second.modules.items()}
    found = inspect({"a": first, "b": Adapter(shared)})
    assert float(found.overlaps()[0][0, 1]) == pytest.approx(1.0)
    assert any("share 100% of the directions of their A" in line for line in found.verdict())


def test_the_most_disturbed_source_is_named_if_there_are_calibrations() -> None:
    weak = random_adapter(SMALL, seed=1, scaling=0.1)
    strong = random_adapter(SMALL, seed=2, scaling=5.0)
    found = inspect({"weak": weak, "strong": strong})
    disturbed = found.disturbances()
    assert float(disturbed[0, 1]) > 10 > 0.1 > float(disturbed[1, 0])
    assert any(
        line.startswith("weak is disturbed most: on its inputs, strong adds") for line in found.verdict()
    )
    assert all(each > 0 for each in found.disturbances("q_proj").flatten().tolist())


def test_numbers_of_a_kind_are_those_of_its_modules_alone() -> None:
    a, b = plain(1), plain(2)
    found = inspect({"a": a, "b": b})
    assert found.kinds == ("q_proj", "k_proj", "down_proj")
    inner, squares = 0.0, [0.0, 0.0]
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"):
        x, y = a.modules[name].delta(), b.modules[name].delta()
        inner += float((x * y).sum())
        squares = [squares[0] + float(x.square().sum()), squares[1] + float(y.square().sum())]
    assert float(found.cosines("q_proj")[0, 1]) == pytest.approx(inner / (squares[0] * squares[1]) ** 0.5)
    assert found.lengths("q_proj").tolist() == pytest.approx([x**0.5 for x in squares])
    energy = found.energy().tolist()
    assert energy == sorted(energy)
    assert energy[-1] == pytest.approx(1.0)


def test_json_holds_everything_and_no_nan(run: Run, tmp_path: Path) -> None:
    for seed, name in enumerate("ab", 1):
        plain(seed).save(tmp_path / name)
    code, out, err = run("inspect", f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}", "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert (code, err) == (0, "")
    assert found["all"]["cosine"][0][0] == pytest.approx(1.0)
    assert found["all"]["disturbance"][0] == [None, None]
    assert set(found["modules"]) == set(SMALL)
    for each in found["modules"].values():
        assert each["row_overlap"][0][0] == pytest.approx(1.0)
        assert 0.0 <= each["sign_conflicts"][0][1] <= 1.0
        assert each["outputs"][0] == [None, None]
    assert found["specs"][0] == "iso(a, b)"


def test_the_command_prints_tables_and_a_verdict(run: Run, tmp_path: Path) -> None:
    for seed, name in enumerate("ab", 1):
        plain(seed).save(tmp_path / name)
    code, out, _ = run("inspect", f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}")
    assert code == 0
    for heading in ("sources", "pairs, all modules together", "kinds of modules", "usual merges", "verdict"):
        assert f"{heading}\n  " in out
    assert out.endswith("specs that fit\n" + "".join(f"  {spec}\n" for spec in inspect_specs(tmp_path)))


def inspect_specs(folder: Path) -> tuple[str, ...]:
    return inspect({"a": folder / "a", "b": folder / "b"}).specs


def test_the_exit_code_says_that_something_cannot_be_merged(run: Run, tmp_path: Path) -> None:
    plain(1).save(tmp_path / "a")
    code, out, _ = run("inspect", f"a={tmp_path / 'a'}", f"gone={tmp_path / 'gone'}")
    assert code == 3
    assert "gone cannot be merged" in out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["a"], "'a' is not of the form NAME=PATH"),
        (["a=x", "a=y"], '"a" is given twice; give it once'),
        (["a=x", "--density", "0"], "the density must be a number above 0 and at most 1, got 0.0"),
        (["a=x", "--density", "nan"], "the density must be a number above 0"),
        (["a=x", "b=y", "--plot", "x.jpg"], "x.jpg: a plot is written as .png, .svg, .pdf"),
        (["a=x", "b=y", "--plot", "none/x.png"], "none is no folder"),
        (["ties(a)=x"], "ties(a)"),
    ],
)
def test_wrong_arguments_are_one_line(run: Run, arguments: list[str], reason: str) -> None:
    code, out, err = run("inspect", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert reason in err


@pytest.mark.parametrize("adapters", [{}, [], {"a b=": plain(1), "ties(a)": plain(2)}])
def test_wrong_adapters_are_refused_in_python(adapters: object) -> None:
    with pytest.raises((AdapterError, SpecError)):
        inspect(adapters)  # type: ignore[arg-type]


def test_a_notebook_shows_tables_and_nothing_that_a_name_smuggles_in() -> None:
    found = inspect({"<b>a": plain(1), "b": plain(2)})
    html = found._repr_html_()
    assert html.count("<table>") == len(found.tables())
    assert "<b>a" not in html
