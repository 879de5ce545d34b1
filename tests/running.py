"""Runs the command ``merged-lora`` or other code: in a process of its own, or within a second."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Run = Callable[..., tuple[int, str, str]]
"""The command in this process: the fixture ``run``."""
ROOT = Path(__file__).resolve().parents[1]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "merged_lora", *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def started(code: str, *arguments: str) -> subprocess.Popen[str]:
    """The command in a process of its own, after ``code`` has changed something about it."""
    return program(f"{code}\nfrom merged_lora.cli import main\nsys.exit(main())", *arguments)


def program(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Python code in a process of its own, which an interrupt ends."""
    # A test run in a shell's background has SIGINT ignored, and would hand that on.
    script = f"import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=pipe, stderr=pipe, text=True, env=environment()
    )


@contextmanager
def within_a_second(what: object) -> Iterator[None]:
    """Fail if the work takes a second of a core: other processes and garbage of other tests do not count."""
    gc.disable()
    begin = time.process_time()
    try:
        yield
        spent = time.process_time() - begin
    finally:
        gc.enable()
    assert spent < 1.0, what
