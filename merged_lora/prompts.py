"""Reads prompts from a file of JSON lines, with or without answers. Knows nothing of models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .errors import CalibrationError, EvaluationError, MergeError

T = TypeVar("T")

MAX_LINE = 16 << 20
"""Bytes of a line."""
MAX_FILE = 256 << 20
"""Bytes that are read at most."""

FORMS = '{"messages": [{"role": ..., "content": ...}, ...]}, {"prompt": "..."} or "..."'
ANSWERED = '{"messages": [...], "answer": "..."} or {"prompt": "...", "answer": "..."}'


Prompt = str | list[Mapping[str, str]]
"""A text, or the messages of a chat."""


@dataclass(frozen=True)
class Example:
    """A prompt and the answers that are right.

    line:    number of its line.
    prompt:  a text, or the messages of a chat.
    answers: at least one.
    """

    line: int
    prompt: Prompt
    answers: tuple[str, ...]


Tasks = Mapping[str, Sequence[Example]]
"""The examples of each task, by its name."""


def read_prompts(file: Path) -> Iterator[tuple[int, Prompt]]:
    """Each prompt of a file with the number of its line.

    A line is one JSON value: an object with ``messages`` or with ``prompt``, or a text by itself.  Messages
    by an assistant at the end are left out, because the adapter is to answer.  The file is read only as far
    as prompts are asked for.

    Raises CalibrationError, which names the line.
    """
    return _read(file, _prompt, CalibrationError)


def prompts_in(text: str, limit: int) -> list[Prompt]:
    """The prompts in a text: each line is one, or what :func:`read_prompts` reads if it looks like JSON.

    limit: largest number of prompts.

    Raises EvaluationError, which names the line.
    """
    found: list[Prompt] = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.lstrip().startswith(("{", '"')):
                found.append(_prompt(_json(line.encode())))
            elif line.strip():
                found.append(line.strip())
        except ValueError as error:
            raise EvaluationError(f"line {number}: {error}") from None
    if not found:
        raise EvaluationError("there is no prompt; each is on a line of its own")
    if len(found) > limit:
        raise EvaluationError(
            f"there must be 1 to {limit} prompts, each on a line of its own, not {len(found)}"
        )
    return found


def read_examples(file: Path) -> list[Example]:
    """The examples of a task: lines as :func:`read_prompts` takes them, each with ``answer``.

    An answer is a text, or a list of those that are right.  The last messages by an assistant are the answer
    if no other is given.

    Raises EvaluationError, which names the line, and for a file without any example.
    """
    found = [
        Example(number, *example) for number, example in _read(file, _prompt_and_answers, EvaluationError)
    ]
    if not found:
        raise EvaluationError(f"{file}: holds no example; a line is {ANSWERED}")
    return found


def _read(
    file: Path, parsed: Callable[[object], T], error_class: type[MergeError]
) -> Iterator[tuple[int, T]]:
    read = number = 0
    try:
        with file.open("rb") as lines:
            while line := lines.readline(MAX_LINE + 1):
                number, read = number + 1, read + len(line)
                if len(line) > MAX_LINE:
                    raise error_class(f"{file}, line {number}: longer than {MAX_LINE} bytes")
                if read > MAX_FILE:
                    raise error_class(f"{file}: the first {MAX_FILE} bytes do not hold enough prompts")
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.strip():
                    try:
                        yield number, parsed(_json(text))
                    except ValueError as error:
                        raise error_class(f"{file}, line {number}: {error}") from None
    except OSError as error:
        raise error_class(f"{file}: cannot be read ({error.strerror})") from None


def _json(line: bytes) -> object:
    """The value that a line holds; raises ValueError."""
    try:
        value: object = json.loads(line)
        # JSON can hold one half of a pair of surrogates, which no tokenizer takes: that raises here.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise ValueError("not a line of JSON") from None
    return value


def _prompt(value: object) -> Prompt:
    """The prompt in a value; raises ValueError."""
    match value:
        case {"messages": list(messages)} if all(map(_is_message, messages)):
            asked = _asked(messages)
            if not asked:
                raise ValueError("no message is left that an assistant would answer")
            return asked
        case {"prompt": str(text)} | str(text) if text:
            return text
    raise ValueError(f"a prompt is a line of the form {FORMS}")


def _prompt_and_answers(value: object) -> tuple[Prompt, tuple[str, ...]]:
    """The prompt in a value, and its answers; raises ValueError."""
    prompt = _prompt(value)
    match value:
        case {"answer": str(text)} if text:
            return prompt, (text,)
        case {"answer": list(texts)} if texts and all(isinstance(text, str) and text for text in texts):
            return prompt, tuple(texts)
        case {"messages": list(messages), **rest} if "answer" not in rest:
            said = "".join(message["content"] for message in messages[len(_asked(messages)) :])
            if said:
                return prompt, (said,)
    raise ValueError(f"it has no answer; a line is {ANSWERED}")


def _asked(messages: list[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The messages up to the last one that is not by an assistant."""
    count = len(messages)
    while count and messages[count - 1]["role"] == "assistant":
        count -= 1
    return messages[:count]


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
