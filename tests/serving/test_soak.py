"""The random load of ``make soak`` tells a server that fails from one that does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from merged_lora.bench import soak


def sessions_below(parent: int) -> list[int]:
    """Ids of the processes of the sessions that children of a process lead."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if (folder / "stat").read_text().rpartition(")")[2].split()[3] in children
    ]


def engine_below(parent: int) -> int:
    """Id of the one engine process."""
    (engine,) = (
        pid for pid in sessions_below(parent) if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text()
    )
    return engine


def test_the_memory_of_a_session_is_that_of_its_processes() -> None:
    own = soak.resident_bytes(os.getsid(0))
    assert own > 50 << 20  # torch alone takes more
    assert soak.resident_bytes(1 << 30) == 0


@pytest.mark.soak
@pytest.mark.engine
@pytest.mark.timeout(900)
def test_an_engine_that_dies_under_load_is_an_error() -> None:
    command = [sys.executable, "-u", "-m", "merged_lora.bench", "soak", "--minutes", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        starting, loading = process.stdout.readline(), ""
        if "ready" in starting:
            os.kill(engine_below(process.pid), signal.SIGKILL)
        loading = process.stdout.read()
    assert "ready" in starting, starting
    assert process.returncode == 1, loading
    assert "UNEXPECTED" in loading
