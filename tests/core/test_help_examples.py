"""The examples in the help of each command run as they are written."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny
from merged_lora import calibrate, cli
from merged_lora.commands.checking import SKILL_LOST
from openai_server import OpenAIServer
from running import Run

ENDLESS = ("playground",)
"""Commands that run until somebody ends them; tests/playground runs their examples."""
URL = "http://localhost:8000/v1"
YAML = """\
merge_method: ties
base_model: base
models:
  - {model: base+adapters/sql, parameters: {weight: 1.0, density: 0.5}}
  - {model: base+adapters/chat, parameters: {weight: 1.0, density: 0.5}}
"""


def examples() -> list[str]:
    """Every command line in the examples of a command's help; a backslash continues a line."""
    (added,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    found = []
    for name, parser in added.choices.items():
        text = (parser.epilog or "").replace("\\\n", " ").partition("\n\n")[0]
        lines = [line.strip() for line in text.splitlines()[1:] if not line.strip().startswith("#")]
        assert all(line.split()[:2] == ["merged-lora", name] for line in lines), name
        found += lines
    return found


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    """A server on which each model but the base model is always right."""
    made = OpenAIServer(
        answers=lambda model, prompt: "wrong" if model == "base" else prompt.upper(), likely={"base": 0.1}
    )
    yield made
    made.close()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the examples: two small adapters, a base model that they fit, and files."""
    tiny.make_model(tmp_path / "models" / "base")
    for seed, name in enumerate(("sql", "chat"), 1):
        tiny.make_adapter(seed=seed).save(tmp_path / "adapters" / name)
        prompts = [f"{name} {number}" for number in range(8)]
        lines = [json.dumps({"prompt": prompt, "answer": prompt.upper()}) for prompt in prompts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "ties.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_command_has_examples(command: str) -> None:
    assert any(line.split()[1] == command for line in examples())


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in examples() if line.split()[1] not in ENDLESS])
def test_an_example_of_the_help_runs(line: str, place: Path, server: OpenAIServer, run: Run) -> None:
    words = shlex.split(line)
    if words[1] == "check":
        for name in ("sql", "chat"):
            calibrate("models/base", f"adapters/{name}", f"{name}.jsonl", count=8)
    code, out, err = run(*(server.url if word == URL else word for word in words[1:]))
    assert code == 0 or (words[1] == "check" and code == SKILL_LOST), err
    assert out
    for word in words:
        if word.endswith((".png", ".svg")):
            assert (place / word).stat().st_size
