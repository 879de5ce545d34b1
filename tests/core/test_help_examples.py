"""The examples in the help of each command run as they are written."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import pytest

import tiny
from merged_lora import cli
from running import Run


def examples() -> list[str]:
    """Every command line in the examples of a command's help; a backslash continues a line."""
    (added,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    found = []
    for name, parser in added.choices.items():
        text = (parser.epilog or "").replace("\\\n", " ")
        lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
        assert all(line.startswith(f"merged-lora {name} ") for line in lines), name
        found += lines
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the examples: two small adapters and a base model that they fit."""
    tiny.make_model(tmp_path / "models" / "base")
    for seed, name in enumerate(("sql", "chat"), 1):
        tiny.make_adapter(seed=seed).save(tmp_path / "adapters" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_examples() -> None:
    assert any(line.startswith("merged-lora inspect ") for line in examples())


@pytest.mark.slow
@pytest.mark.parametrize("line", examples())
def test_an_example_of_the_help_runs(line: str, place: Path, run: Run) -> None:
    words = shlex.split(line)
    code, out, err = run(*words[1:])
    assert code == 0, err
    assert out
    for word in words:
        if word.endswith((".png", ".svg")):
            assert (place / word).stat().st_size
