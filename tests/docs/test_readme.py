"""What the documentation says about the code is what the code says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import quality
from merged_lora import catalog

ROOT = Path(__file__).parents[2]


def test_the_readme_shows_the_strategy_table_as_the_code_renders_it() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- strategies:.*?-->\n(.*)<!-- end of strategies -->", text, re.DOTALL)
    assert shown is not None
    assert shown[1] == catalog.as_markdown()


def test_the_table_and_the_plot_of_quality_are_those_of_the_measured_rows() -> None:
    (measured,) = (ROOT / "bench/results").glob("quality-*.json")
    rows = json.loads(measured.read_text(encoding="utf-8"))["rows"]
    assert quality.markdown(rows) in (ROOT / "docs/quality.md").read_text(encoding="utf-8")
    assert quality.plot(rows) == (ROOT / "docs/quality.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{f.name}" for f in (ROOT / "docs").glob("*.md"))])
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    file = ROOT / page
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (file.parent / target).exists()]
