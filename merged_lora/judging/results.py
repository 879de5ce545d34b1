"""A file of measured rows, one JSON object a line, that an interrupted run goes on from.

Each row is on disk before the next one is begun.  Knows nothing of what the rows mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from merged_lora.errors import EvaluationError

Row = Mapping[str, Any]


class Results:
    """Rows by key, and the file that they are in.

    file:  where rows go; None to keep them in memory alone.
    about: what must be the same for rows to count, such as the settings; a file about something else is
           refused.

    Raises EvaluationError.
    """

    def __init__(self, file: Path | None, about: Mapping[str, Any]) -> None:
        self._file = file
        self._about = json.loads(json.dumps(about))
        self._rows: dict[str, Row] = {}
        self._written: TextIO | None = None
        if file is not None and file.exists():
            if not file.is_file():
                raise EvaluationError(f"{file}: is no file")  # a device may be read without an end
            self._read(file)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> Row:
        return self._rows[key]

    def get(self, key: str) -> Row | None:
        """The row of a key, None if it was not measured."""
        return self._rows.get(key)

    def __len__(self) -> int:
        return len(self._rows)

    @contextmanager
    def open(self) -> Iterator[Results]:
        """Let rows be added."""
        if self._file is None:
            yield self
            return
        begun = self._file.exists() and self._file.stat().st_size > 0
        try:
            with self._file.open("a", encoding="utf-8") as self._written:
                if not begun:
                    self._write({"about": self._about})
                yield self
        except OSError as error:
            raise self._unwritten(error) from None
        finally:
            self._written = None

    def add(self, key: str, row: Row) -> None:
        """Add a row, which is then on disk; raises EvaluationError."""
        if self._written is not None:
            self._write({"key": key, **row})
        self._rows[key] = row

    def _write(self, value: Row) -> None:
        assert self._written is not None
        try:
            self._written.write(json.dumps(value) + "\n")
            self._written.flush()
            os.fsync(self._written.fileno())
        except OSError as error:
            raise self._unwritten(error) from None

    def _unwritten(self, error: OSError) -> EvaluationError:
        return EvaluationError(
            f"cannot write {self._file}: {error.strerror or error}; what was measured before stays there"
        )

    def _read(self, file: Path) -> None:
        """The rows of a file; the last line may be one that was never finished, which is dropped."""
        try:
            text = file.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            lines = [json.loads(line) for line in whole.splitlines()]
            if not lines and not text:
                return
            about = lines[0]["about"]
            self._rows = {line.pop("key"): line for line in lines[1:]}
            if whole != text:
                os.truncate(file, len(whole.encode()))
        except OSError as error:
            raise EvaluationError(f"{file}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise EvaluationError(
                f"{file}: no results of merged-lora; name another file, or remove this one"
            ) from None
        different = sorted(
            name for name in {*about, *self._about} if about.get(name) != self._about.get(name)
        )
        if different:
            raise EvaluationError(
                f"{file}: holds results with another {', '.join(different)}; name another file, or give the "
                "same options to go on with it"
            )
