"""A program that starts a server takes it along, whatever ends the program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STARTS_A_SERVER = """
import sys
from pathlib import Path
from merged_lora.bench import launcher
from merged_lora.commands import terminated_cleanly

launcher.vllm_command = lambda: [sys.executable, "-c", "import time; time.sleep(120)"]
waiting = lambda: print(server.pid, flush=True)
server = launcher.VllmServer(Path("model"), log=Path(sys.argv[1]), waiting=waiting)
with terminated_cleanly(), server:
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_a_server_ends_with_the_program_that_started_it(number: signal.Signals, tmp_path: Path) -> None:
    program = [sys.executable, "-c", STARTS_A_SERVER, str(tmp_path / "log")]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
        assert running.stdout is not None
        server = int(running.stdout.readline())
        os.kill(server, 0)
        running.send_signal(number)
        running.communicate(timeout=60)
    wait_until_gone(server)


def wait_until_gone(pid: int, seconds: float = 10.0) -> None:
    """Wait until the process has ended; fails if it does not."""
    end = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, f"process {pid} is still running"
        time.sleep(0.05)
