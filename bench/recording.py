"""Results that survive whatever ends the program that finds them.  It knows nothing of what is measured."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from merged_lora.commands.running import terminated_cleanly

FAILED, WRONG = "FAILED", "WRONG"


def write(file: Path, data: Mapping[str, Any]) -> None:
    """Replace a JSON file atomically: a reader finds the old one or the new one, whole."""
    beside = file.with_name(f".{file.name}.new")
    with beside.open("w", encoding="utf-8") as out:
        json.dump(data, out, indent=1)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    beside.replace(file)


def write_report(file: Path | None, **data: Any) -> None:
    """Write a finished report with today's date, if there is a file for it."""
    if file is not None:
        write(file, {"date": date.today().isoformat(), **data})
        print(f"\nwritten: {file}")


class Record:
    """Everything found so far, in a JSON file that is rewritten after every change.

    data: what the file holds; ``state`` is ``running``, ``finished`` or ``interrupted``.
    """

    def __init__(self, file: Path, **data: Any) -> None:
        self.file = file
        self.data: dict[str, Any] = {"state": "running", **data}
        self._lock = threading.Lock()

    def set(self, name: str, value: object) -> None:
        """Store a value."""
        with self._lock:
            self.data[name] = value
            write(self.file, self.data)

    def add(self, name: str, *values: object) -> None:
        """Append values to a list."""
        with self._lock:
            self.data[name].extend(values)
            write(self.file, self.data)

    def run(self, work: Callable[[], None], failed: Callable[[], bool], show: Callable[[], None]) -> int:
        """Do the work, print what came of it and return the exit code: 1 if anything failed.

        SIGTERM ends the work as Ctrl-C does, so that everything it started ends too.
        """

        try:
            with terminated_cleanly():
                work()
        except (KeyboardInterrupt, SystemExit):
            self.set("state", "interrupted")
        else:
            self.set("state", "finished")
        show()
        print(f"written: {self.file}", flush=True)
        if self.data["state"] == "interrupted":
            print("INTERRUPTED: the file holds what was finished", file=sys.stderr)
            return 1
        return 1 if failed() else 0
