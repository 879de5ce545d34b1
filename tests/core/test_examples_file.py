"""Examples with answers are read from JSON lines, or refused with the line and the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from merged_lora.errors import EvaluationError
from merged_lora.prompts import Example, read_examples

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
REPLY = {"role": "assistant", "content": "hello"}


def written(folder: Path, *lines: object) -> Path:
    file = folder / "task.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("value", "prompt", "answers"),
    [
        ({"prompt": "2 + 2 =", "answer": "4"}, "2 + 2 =", ("4",)),
        ({"prompt": "2 + 2 =", "answer": ["4", "four"]}, "2 + 2 =", ("4", "four")),
        ({"messages": CHAT, "answer": "hello"}, CHAT, ("hello",)),
        ({"messages": [*CHAT, REPLY]}, CHAT, ("hello",)),
        ({"messages": [*CHAT, REPLY], "answer": "hey"}, CHAT, ("hey",)),
        ({"messages": [*CHAT, REPLY, REPLY], "more": 1}, CHAT, ("hellohello",)),
    ],
)
def test_an_example_is_a_prompt_and_its_answers(
    tmp_path: Path, value: object, prompt: object, answers: tuple[str, ...]
) -> None:
    assert read_examples(written(tmp_path, value, value)) == [
        Example(1, prompt, answers),  # type: ignore[arg-type]
        Example(2, prompt, answers),  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("text", "it has no answer"),
        ({"prompt": "x"}, "it has no answer"),
        ({"prompt": "x", "answer": ""}, "it has no answer"),
        ({"prompt": "x", "answer": []}, "it has no answer"),
        ({"prompt": "x", "answer": ["y", 3]}, "it has no answer"),
        ({"prompt": "x", "answer": 3}, "it has no answer"),
        ({"messages": CHAT}, "it has no answer"),
        ({"messages": [REPLY], "answer": "x"}, "no message is left"),
        ({"answer": "x"}, "a prompt is a line of the form"),
        ({"prompt": "\ud800", "answer": "x"}, "not a line of JSON"),
    ],
)
def test_what_is_no_example_is_refused_by_its_line(tmp_path: Path, value: object, reason: str) -> None:
    with pytest.raises(EvaluationError, match=rf"task\.jsonl, line 2: {reason}"):
        read_examples(written(tmp_path, {"prompt": "x", "answer": "y"}, value))


def test_a_file_without_examples_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="empty: holds no example"):
        read_examples(tmp_path / "empty")
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_examples(tmp_path / "gone")
