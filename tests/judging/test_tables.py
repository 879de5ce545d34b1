"""Reports as text, on a terminal and in a notebook: aligned, and free of what a terminal would obey."""

from __future__ import annotations

from typing import Any

import pytest

from making import SMALL, random_adapter
from merged_lora import inspect
from merged_lora.commands.running import show
from merged_lora.judging.tables import Report, Section, Table

EVIL = "\x1b[31mred\x1b[0m\nnext"


class Made(Report):
    """A report of one table and two sections."""

    def tables(self) -> list[Table]:
        return [Table("things", ("name", "count"), (("a", "9"), (f"[b]{EVIL}", "1000")))]

    def sections(self) -> list[Section]:
        return [
            Section("verdict", [f"long {'word ' * 40}"]),
            Section("specs", [f"ties({EVIL})"], prose=False),
        ]


def test_numbers_are_aligned_at_their_end() -> None:
    lines = Table("t", ("name", "count"), (("ä", "9"), ("猫", "1000"))).text().splitlines()
    assert lines == ["t", "  name  count", "  ä         9", "  猫     1000"]


def test_what_a_terminal_would_obey_is_escaped(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    show(Made())
    plain = capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    show(Made())
    wide = capsys.readouterr().out
    for text in (plain, wide, Made()._repr_html_()):
        assert "\x1b[31m" not in text
        assert "\\x1b[31mred" in text
        assert "[b]" in text


def test_prose_is_wrapped_and_a_spec_is_not() -> None:
    text = str(Made())
    assert max(map(len, text.splitlines())) <= 118
    spec = "ties(" + ", ".join(f"source{i}" for i in range(40)) + ")"
    assert f"  {spec}" in Section("specs", [spec], prose=False).text().splitlines()


def test_a_notebook_escapes_and_shows_a_figure_by_itself() -> None:
    assert "<script>" not in Table("<script>", ("<script>",), (("<script>",),)).html()
    found = inspect({"a": random_adapter(SMALL, seed=1), "b": random_adapter(SMALL, seed=2)})
    figure: Any = found.plot()
    assert figure._repr_svg_().lstrip().startswith("<?xml")
