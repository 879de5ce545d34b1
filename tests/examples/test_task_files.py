"""Files of the example tasks are what ``merged-lora eval`` reads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import task_files
from merged_lora.prompts import read_examples
from more_tasks import ALL_TASKS
from tasks import examples


def written(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["task_files.py", *arguments])
    task_files.main()


@pytest.mark.parametrize("split", ["test", "train"])
def test_examples_are_read_as_they_are_in_the_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    written(monkeypatch, str(tmp_path / "new"), *ALL_TASKS, "--count", "5", "--split", split)
    for name, task in ALL_TASKS.items():
        found = read_examples(tmp_path / "new" / f"{name}.jsonl")
        expected = examples(task, "test" if split == "test" else "train", 5)
        assert [each.answers for each in found] == [(each.answer,) for each in expected]
        prompts = [
            each.prompt if isinstance(each.prompt, str) else each.prompt[0]["content"] for each in found
        ]
        assert prompts == [each.prompt for each in expected]
        assert all(isinstance(each.prompt, list) == task.chat for each in found)


def test_the_three_tasks_are_written_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(monkeypatch, str(tmp_path))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["json.jsonl", "sql.jsonl", "tone.jsonl"]
    lines = (tmp_path / "sql.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 60
    assert set(json.loads(lines[0])) == {"messages", "answer"}


def test_examples_can_be_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, more in (("chosen", ["--count", "4"]), ("rest", ["--skip", "4", "--count", "3"])):
        written(monkeypatch, str(tmp_path / folder), "sql", *more)
    chosen, rest = (
        (tmp_path / folder / "sql.jsonl").read_text().splitlines() for folder in ("chosen", "rest")
    )
    assert [json.loads(line)["answer"] for line in (*chosen, *rest)] == [
        each.answer for each in examples(ALL_TASKS["sql"], "test", 7)
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--count", "0"],
        ["--count", "257"],
        ["--skip", "-1"],
        ["--skip", "200", "--count", "57"],
        ["nonsense"],
    ],
)
def test_wrong_arguments_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    with pytest.raises(SystemExit):
        written(monkeypatch, str(tmp_path), *arguments)
    assert not list(tmp_path.iterdir())
