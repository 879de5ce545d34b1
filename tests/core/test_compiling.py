"""Loops that are compiled are announced once, those in numba's cache are not, and none need a cache."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merged_lora.cli import COMMANDS, SLOW, main
from merged_lora.cpu_kernels.compiling import Notice

LOOP = """
from numba import njit

@njit(cache=True)
def twice(x):
    return x + x
"""


@contextmanager
def announced(message: str) -> Iterator[None]:
    """Log this when a function of a module ``loops`` is compiled."""
    from numba.core import event

    notice = Notice("loops", message)
    event.register("numba:compile", notice)
    try:
        yield
    finally:
        event.unregister("numba:compile", notice)


def imported(folder: Path, name: str) -> Callable[[Any], Any]:
    """The function of a module that is imported anew."""
    spec = importlib.util.spec_from_file_location(name, folder / "loops.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    twice: Callable[[Any], Any] = module.twice
    return twice


@pytest.mark.slow
def test_what_is_compiled_is_announced_once_and_what_is_kept_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, SLOW.name)
    (tmp_path / "loops.py").write_text(LOOP)
    with announced("first"):
        imported(tmp_path, "others")(1)
        assert not caplog.messages
        twice = imported(tmp_path, "loops")
        assert twice(np.float32(1)) == twice(np.int32(1)) == 2
    with announced("second"):
        assert imported(tmp_path, "loops")(np.float32(1)) == 2
    assert caplog.messages == ["first"]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_wait_is_announced_on_a_terminal_alone(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)

    def command(_: object) -> int:
        SLOW.info("compiling")
        return 0

    monkeypatch.setattr(COMMANDS["strategies"], "run", command)
    assert main(["strategies"]) == 0
    assert capsys.readouterr().err == ("merged-lora: compiling\n" if terminal else "")
    assert SLOW.level == logging.NOTSET


LOAD = """
import numpy as np
from merged_lora.cpu_kernels import kernels

data, bits = np.array([1.0, -2.0], np.float32), np.zeros(2, np.uint32)
kernels.load(data.ctypes.data, 2, kernels.FP32, bits)
print(bits.view(np.float32))
"""


@pytest.mark.slow
def test_without_a_folder_for_a_cache_the_loops_work_and_the_variable_is_named() -> None:
    # As if neither the installation nor the user's folder could be written.
    nowhere = {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"} | nowhere
    command = [sys.executable, "-c", LOAD]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert made.stdout == "[ 1. -2.]\n"
    (line,) = made.stderr.splitlines()
    assert line.startswith("the loops of the CPU backend are compiled anew in each process")
    assert "set NUMBA_CACHE_DIR to a folder" in line
