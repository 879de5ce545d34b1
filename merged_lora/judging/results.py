"""A file of measured rows, one JSON object a line, that an interrupted run goes on from.

Each row is on disk before it counts.  Knows nothing of what the rows mean.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

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
        self._written: FileIO | None = None
        self._size = self._whole = 0  # bytes of the file, and of the whole lines in it
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
        """Let rows be added, by this run alone."""
        if self._file is None:
            yield self
            return
        with ExitStack() as opened:
            try:
                # Without a buffer: what a full disk did not take is not tried again when the file is closed.
                written = opened.enter_context(self._file.open("ab", buffering=0))
                fcntl.flock(written, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(written.fileno()).st_size != self._size:
                    raise EvaluationError(f"{self._file}: another run has written to it; start again")
                if self._whole != self._size:
                    os.ftruncate(written.fileno(), self._whole)
            except BlockingIOError:
                raise EvaluationError(f"{self._file}: another run writes to it; name another") from None
            except OSError as error:
                raise self._unwritten(error) from None
            self._written = written
            opened.callback(setattr, self, "_written", None)
            if not self._whole:
                self._write({"about": self._about})
            yield self

    def add(self, key: str, row: Row) -> None:
        """Add a row, which is then on disk; raises EvaluationError."""
        if self._written is not None:
            self._write({"key": key, **row})
        self._rows[key] = row

    def _write(self, value: Row) -> None:
        assert self._written is not None
        data = memoryview(json.dumps(value).encode() + b"\n")
        try:
            while data:
                data = data[self._written.write(data) :]
            os.fsync(self._written.fileno())
        except OSError as error:
            raise self._unwritten(error) from None

    def _unwritten(self, error: OSError) -> EvaluationError:
        return EvaluationError(
            f"cannot write {self._file}: {error.strerror or error}; what was measured before stays there"
        )

    def _read(self, file: Path) -> None:
        """The rows of a file; the last line may be one that was never finished, and does not count."""
        try:
            data = file.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            lines = [json.loads(line) for line in whole.splitlines()]
            if not lines and not data:
                return
            about = dict(lines[0]["about"])
            self._rows = {line.pop("key"): line for line in lines[1:]}
            self._size, self._whole = len(data), len(whole)
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
