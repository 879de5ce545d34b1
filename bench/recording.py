"""Results that survive whatever ends the program that finds them. Knows nothing of what is measured."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

FAILED, WRONG = "FAILED", "WRONG"
LOST = 3
"""A worker's exit code where its device is of no more use."""


def write(file: Path, data: Mapping[str, Any]) -> None:
    """Replace a JSON file at once: whoever reads it finds the old one or the new one, whole."""
    beside = file.with_name(f".{file.name}.new")
    with beside.open("w", encoding="utf-8") as out:
        json.dump(data, out, indent=1)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    beside.replace(file)


def end_on_terminate() -> None:
    """Let SIGTERM end this program as Ctrl-C does, so that what it started is ended too."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def last_lines(text: str, lines: int = 12) -> str:
    """The end of a program's output."""
    return "\n".join(text.splitlines()[-lines:])


def interrupted() -> int:
    """The exit code of a program that was ended, after one line that says so."""
    print("INTERRUPTED: what was finished is in the file", file=sys.stderr)
    return 1
