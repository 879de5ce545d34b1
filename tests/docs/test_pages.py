"""What the pages say about the code is what the code says."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import prose
import quality
import render_pages
from merged_lora import cli, errors
from merged_lora.calibration import CALIBRATION_NAME
from merged_lora.vllm_plugin import rpc
from merged_lora.vllm_plugin.api_server import exchange, gate, routes
from merged_lora.vllm_plugin.settings import FLAGS, Flag, Settings, option

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "bench/README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
HOUSE = (ROOT, *(ROOT / name for name in prose.CODE))


def read(page: str) -> str:
    """The text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page: str) -> set[str]:
    """The anchors of the headings of a page, as Markdown renderers make them."""
    headings = re.findall(r"^#+ (.+)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)#?([^)\s]*)\)", read(page)):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(str(file.resolve().relative_to(ROOT))), f"{target}#{anchor}"


def test_the_readme_is_as_long_as_a_newcomer_reads() -> None:
    assert 9_000 <= len(read("README.md").encode()) <= 11_000


@pytest.mark.parametrize("page", PAGES)
def test_rendered_parts_are_what_the_code_renders_now(page: str) -> None:
    text = read(page)
    assert render_pages.rendered(text) == text, "run python tools/render_pages.py"


def test_every_part_that_can_be_rendered_is_on_a_page() -> None:
    shown = {match[2] for page in PAGES for match in render_pages.BLOCK.finditer(read(page))}
    assert shown == set(render_pages.PARTS)


def test_the_table_and_the_plot_of_quality_are_those_of_the_measured_rows() -> None:
    (measured,) = (ROOT / "bench/results").glob("quality-*.json")
    rows = json.loads(measured.read_text(encoding="utf-8"))["rows"]
    assert quality.markdown(rows) in read("docs/quality.md")
    assert quality.plot(rows) == read("docs/quality.svg")


def drawn(svg: Path) -> tuple[list[str], list[bytes]]:
    """The words of a plot and the pixels of its maps, which are the same in every release of matplotlib."""
    from PIL import Image

    text = svg.read_text(encoding="utf-8")
    images = re.findall(r'data:image/png;base64,([^"]*)"', text)
    pixels = [Image.open(io.BytesIO(base64.b64decode(image))).tobytes() for image in images]
    return re.findall(r"<text [^>]*>([^<]*)</text>", text), pixels


@pytest.mark.slow
def test_the_plot_of_an_inspection_is_what_its_command_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    (command,) = re.findall(
        r"^merged-lora (inspect .*(?:\\\n.*)?--plot docs/inspect\.svg)$", read("docs/inspect.md"), re.M
    )
    (tmp_path / "docs").mkdir()
    without = shutil.ignore_patterns(CALIBRATION_NAME)  # which `make demo` makes
    shutil.copytree(ROOT / "examples/adapters", tmp_path / "examples/adapters", ignore=without)
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(command.replace("\\\n", " "))) == 0
    made = drawn(tmp_path / "docs/inspect.svg")
    assert len(made[1]) > 3
    assert made == drawn(ROOT / "docs/inspect.svg")


def flag_rows() -> dict[str, str]:
    """The default of each of the plugin's flags, as the table of the page about serving has it."""
    rows = re.findall(r"^\| `(--[a-z-]+)[^`]*` \| ([^|]*) \|", read("docs/serving.md"), re.MULTILINE)
    return {flag: default.strip("` ") for flag, default in rows}


def test_the_page_about_serving_has_every_flag_and_no_other() -> None:
    assert set(flag_rows()) == {"--enable-merged-lora", option("modules"), *(flag.option for flag in FLAGS)}


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.key)
def test_the_default_of_a_flag_on_the_page_is_that_of_the_settings(flag: Flag) -> None:
    default = getattr(Settings(), flag.key)
    shown = flag_rows()[flag.option]
    if default in (None, ()):
        assert shown in ("none", "sized by the model")
    elif isinstance(default, bool):
        assert shown == ("on" if default else "off")
    elif isinstance(default, str):
        assert shown == default
    else:
        assert float(shown) == default


def kinds() -> set[str]:
    """The names of all kinds of errors that a user can meet."""
    modules = (errors, cli, exchange, gate, rpc)
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, errors.MergeError)
    }


def test_every_kind_of_error_has_a_section_that_says_what_to_do() -> None:
    sections = re.split(r"^## ", read("docs/errors.md"), flags=re.MULTILINE)[1:]
    found = {section.split("\n", 1)[0]: section for section in sections}
    assert set(found) == kinds() - {"MergeError"}
    assert not [name for name, section in found.items() if "**What to do.**" not in section]


def test_an_error_has_the_status_that_the_page_says() -> None:
    rows = dict(re.findall(r"^\| \[(\w+)\]\(#\w+\) \| *(\d*) *\|", read("docs/errors.md"), re.MULTILINE))
    assert set(rows) == kinds() - {"MergeError"}
    raised = [
        errors.SpecError(),
        errors.UnknownStrategyError(),
        errors.UnknownAdapterError(),
        errors.AdapterError(),
        errors.FetchError(),
        errors.NotFoundError(),
        errors.ForbiddenError(),
        errors.CalibrationError(),
        errors.PlanError(),
        exchange.KeyMissingError(),
        gate.BusyError("", 1),
        rpc.CacheFullError("", 1),
    ]
    assert {name for name, status in rows.items() if status} == {type(error).__name__ for error in raised}
    for error in raised:
        assert routes.status_of(error)[0] == int(rows[type(error).__name__])


def rooms() -> list[list[str]]:
    """The modules and folders in the picture of the house, floor by floor: the core's floors come first."""
    labels = re.findall(r'font-size="1[12]" font-weight="bold">([^<]+)<', read("docs/house.svg"))
    return [re.findall(r"\w+", label) for label in labels]


def test_the_picture_of_the_house_names_what_exists() -> None:
    folders = {path.name for folder in HOUSE for path in folder.iterdir() if path.is_dir()}
    modules = {path.stem for folder in HOUSE for path in folder.glob("*.py")}
    assert {name for floor in rooms() for name in floor} <= folders | modules


def test_the_floors_of_the_core_hold_all_of_it_and_imports_go_down() -> None:
    here = ROOT / "merged_lora"
    core = {path.stem: [path] for path in here.glob("*.py") if not path.stem.startswith("__")}
    folders = [path.parent for path in here.glob("*/__init__.py") if not path.parent.is_symlink()]
    core |= {folder.name: list(folder.rglob("*.py")) for folder in folders}
    floors = rooms()[: next(i for i, floor in enumerate(rooms()) if "errors" in floor) + 1]
    height = {name: -i for i, floor in enumerate(floors) for name in floor}
    assert height.keys() == core.keys()
    for name, paths in core.items():
        prefix = r"\." if paths[0].parent == here else r"merged_lora\."
        pattern = rf"^ *from {prefix}(\w*)[.\w]* import "
        imported = {m for path in paths for m in re.findall(pattern, path.read_text("utf-8"), re.MULTILINE)}
        assert not [other for other in imported - {"", name} if height[other] >= height[name]], name
