"""Reads prompts from a file of JSON lines. Knows nothing of models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from .errors import CalibrationError

MAX_LINE = 16 << 20
"""Bytes of a line."""
MAX_FILE = 256 << 20
"""Bytes that are read at most."""

FORMS = '{"messages": [{"role": ..., "content": ...}, ...]}, {"prompt": "..."} or "..."'


def read_prompts(file: Path) -> Iterator[tuple[int, str | list[Mapping[str, str]]]]:
    """Each prompt of a file with the number of its line: a text, or the messages of a chat.

    A line is one JSON value: an object with ``messages`` or with ``prompt``, or a text by itself.  Messages
    by an assistant at the end are left out, because the adapter is to answer.  The file is read only as far
    as prompts are asked for.

    Raises CalibrationError, which names the line.
    """
    read = number = 0
    try:
        with file.open("rb") as lines:
            while line := lines.readline(MAX_LINE + 1):
                number, read = number + 1, read + len(line)
                if len(line) > MAX_LINE:
                    raise CalibrationError(f"{file}, line {number}: longer than {MAX_LINE} bytes")
                if read > MAX_FILE:
                    raise CalibrationError(f"{file}: the first {MAX_FILE} bytes do not hold enough prompts")
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.strip():
                    try:
                        yield number, _prompt(text)
                    except CalibrationError as error:
                        raise CalibrationError(f"{file}, line {number}: {error}") from None
    except OSError as error:
        raise CalibrationError(f"{file}: cannot be read ({error.strerror})") from None


def _prompt(line: bytes) -> str | list[Mapping[str, str]]:
    """The prompt that a line holds; raises CalibrationError."""
    try:
        value = json.loads(line)
        # JSON can hold one half of a pair of surrogates, which no tokenizer takes: that raises here.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise CalibrationError("not a line of JSON") from None
    match value:
        case {"messages": list(messages)} if all(map(_is_message, messages)):
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            if not messages:
                raise CalibrationError("no message is left that an assistant would answer")
            return messages
        case {"prompt": str(text)} | str(text) if text:
            return text
    raise CalibrationError(f"a prompt is a line of the form {FORMS}")


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
