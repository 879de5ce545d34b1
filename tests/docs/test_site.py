"""The documentation site builds, its links lead somewhere, and it loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from site_docstrings import as_markdown

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = r"""=["']?(?:https?:)?//"""
LOADED = re.compile(
    rf"<(?:script|img|iframe|source)\b[^>]*\bsrc{ELSEWHERE}|<link\b[^>]*\bhref{ELSEWHERE}[^>]*stylesheet"
)


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a checkout, or of what looks like one."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT, folder)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_and_picture_is_built(site: Path) -> None:
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert {page.stem for page in site.glob("*.html")} >= pages
    assert {picture.name for picture in (ROOT / "docs").glob("*.svg")} <= {p.name for p in site.iterdir()}


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert not [page.name for page in pages if LOADED.search(page.read_text(encoding="utf-8"))]
    assert LOADED.search('<script src="https://elsewhere/x.js"></script>')


def test_the_python_page_shows_signatures_and_parameters_of_the_public_api(site: Path) -> None:
    page = (site / "python.html").read_text(encoding="utf-8")
    for name in ("engine.merge", "adapters.Adapter.load", "spec.parse", "errors.PlanError"):
        assert f'id="merged_lora.{name}"' in page
    assert "<strong>backend</strong>:" in page


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A site of two pages with the settings and hooks of the real one, and files outside ``docs/``."""
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    before, _, rest = settings.partition("nav:\n")
    settings = before + "nav:\n  - Home: index.md\n" + rest[rest.index("\nmarkdown_extensions:") :]
    (tmp_path / "mkdocs.yml").write_text(settings, encoding="utf-8")
    for folder in ("tools", "merged_lora"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "docs").mkdir()
    (tmp_path / "data.json").write_text("{}", encoding="utf-8")
    (tmp_path / "CHANGELOG.md").write_text("# Changes\n\n[home](docs/index.md#here)\n", encoding="utf-8")
    return tmp_path


def test_links_to_files_outside_the_docs_lead_to_pages_and_copies(checkout: Path) -> None:
    links = "# Home\n\n## Here\n\n[c](../CHANGELOG.md#changes) [d](../data.json) [code](../tools/prose.py)\n"
    (checkout / "docs" / "index.md").write_text(links, encoding="utf-8")
    site = checkout / "site"
    built = build(checkout, site)
    assert built.returncode == 0, built.stderr
    page = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="CHANGELOG.html#changes"' in page
    assert 'href="data.json"' in page
    assert (site / "data.json").read_text(encoding="utf-8") == "{}"
    assert "prose.py" not in page
    assert 'href="index.html#here"' in (site / "CHANGELOG.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "link", ["nowhere.md", "#nowhere", "../nowhere.json", "../CHANGELOG.md#nowhere", "../CONTRIBUTING.md"]
)
def test_a_link_that_leads_nowhere_ends_the_build(checkout: Path, link: str) -> None:
    (checkout / "docs" / "index.md").write_text(f"# Home\n\n## Here\n\n[link]({link})\n", encoding="utf-8")
    built = build(checkout, checkout / "site")
    assert built.returncode != 0
    assert "nowhere" in built.stderr or "CONTRIBUTING" in built.stderr


def test_parameters_of_a_docstring_become_a_list() -> None:
    docstring = """What comes out.

    a, b: two things, of
      two lines.
    c:    a third,
    of two lines.

    other: this is prose.
    See :class:`merged_lora.Adapter`.
    """
    assert as_markdown(docstring, ("a", "b", "c", "d")) == (
        "What comes out.\n\n"
        "- **a**, **b**: two things, of\n  two lines.\n- **c**: a third,\n  of two lines.\n\n"
        "other: this is prose.\nSee `merged_lora.Adapter`."
    )
