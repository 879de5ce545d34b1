"""The plot of an inspection: what it shows, and that it is written completely or refused on one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from making import SMALL, random_adapter
from merged_lora.adapters import Adapter
from merged_lora.errors import MergeError
from merged_lora.judging.figures import heat_map, save
from merged_lora.judging.inspecting import inspect
from running import Run, program

pytest.importorskip("matplotlib")
LARGE = {f"model.layers.{i}.{kind}": (6, 5) for i in range(80) for kind in ("q_proj", "v_proj")} | {
    "lm_head": (9, 5)
}


def sources(count: int, calibrated: bool = True, modules: dict[str, tuple[int, int]] = SMALL) -> Any:
    made = {f"s{i}": random_adapter(modules, rank=2, seed=i) for i in range(count)}
    return made if calibrated else {name: Adapter(each.modules) for name, each in made.items()}


def maps(figure: Any) -> dict[str, Any]:
    """The maps of a figure, by title."""
    return {axis.get_title(): axis for axis in figure.axes if axis.images}


def test_a_cell_of_a_map_is_the_cosine_of_that_layer_and_kind() -> None:
    found = inspect(sources(2, calibrated=False))
    (axis,) = maps(heat_map(found)).values()
    values = axis.images[0].get_array()
    module = "model.layers.1.self_attn.q_proj"
    inner = found.compared.inner[found.compared.modules.index(module)]
    assert values[1, 0] == pytest.approx(float(inner[0, 1] / (inner[0, 0] * inner[1, 1]).sqrt()))
    assert values.mask[1].tolist() == [False, True, True]  # layer 1 has no k_proj and no down_proj


def test_disturbances_are_a_second_kind_of_maps_if_there_are_calibrations() -> None:
    assert list(maps(heat_map(inspect(sources(2))))) == ["s0, s1", "s1 on s0", "s0 on s1"]
    some = sources(2) | {"s1": Adapter(sources(2)["s1"].modules)}
    assert list(maps(heat_map(inspect(some)))) == ["s0, s1", "s1 on s0"]


def test_experts_of_a_layer_are_one_cell() -> None:
    modules = {f"model.layers.0.mlp.experts.{i}.down_proj": (6, 5) for i in range(3)}
    found = inspect(sources(2, calibrated=False, modules=modules))
    (axis,) = maps(heat_map(found)).values()
    assert axis.images[0].get_array().tolist() == [[pytest.approx(float(found.cosines()[0, 1]))]]


def test_of_many_pairs_those_with_the_largest_values_are_drawn_and_the_title_says_so() -> None:
    found = inspect(sources(7, calibrated=False))
    figure = heat_map(found)
    assert len(maps(figure)) == 15
    (part,) = figure.subfigs
    assert "the 15 of 21 pairs with the largest" in part.get_suptitle()


def test_a_plot_of_80_layers_fits_on_a_page_and_names_what_is_in_no_layer() -> None:
    figure = heat_map(inspect(sources(2, modules=LARGE)))
    width, height = figure.get_size_inches()
    assert max(width, height) < 15
    axis = maps(figure)["s0, s1"]
    assert [label.get_text() for label in axis.get_yticklabels()][-1] == "none"


@pytest.mark.parametrize("ending", [".svg", ".png", ".pdf"])
def test_the_same_inspection_makes_the_same_file(tmp_path: Path, ending: str) -> None:
    files = [tmp_path / f"{name}{ending}" for name in "ab"]
    for file in files:
        save(heat_map(inspect(sources(2))), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == files


def test_a_plot_that_cannot_be_finished_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = heat_map(inspect(sources(2)))
    (tmp_path / "x.svg").write_text("old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(figure), "savefig", full)
    with pytest.raises(MergeError, match=r"cannot write .*x\.svg: No space left on device"):
        save(figure, tmp_path / "x.svg")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("x.svg", "old")]


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    for name, adapter in sources(2).items():
        adapter.save(tmp_path / name)
    return [f"{name}={tmp_path / name}" for name in ("s0", "s1")]


def test_the_command_writes_the_plot(run: Run, two: list[str], tmp_path: Path) -> None:
    assert run("inspect", *two, "--plot", tmp_path / "x.svg")[0] == 0
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_one_source_has_no_plot(run: Run, two: list[str], tmp_path: Path) -> None:
    code, out, err = run("inspect", two[0], "--plot", tmp_path / "x.svg")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--plot compares sources, and there is one" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable_is_refused_early(run: Run, two: list[str], tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    code, out, _ = run("inspect", *two, "--plot", tmp_path / "locked" / "x.svg")
    assert (code, out) == (2, "")


@pytest.mark.slow
def test_without_matplotlib_a_plot_is_refused_before_any_work(two: list[str], tmp_path: Path) -> None:
    code = "import sys\nsys.modules['matplotlib'] = None\nfrom merged_lora.cli import main\nsys.exit(main())"
    process = program(code, "inspect", *two, "--plot", str(tmp_path / "x.svg"))
    out, err = process.communicate()
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert "pip install 'vllm-merged-lora[plot]'" in err
