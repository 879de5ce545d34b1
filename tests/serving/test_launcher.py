"""A program that starts a server takes it along, whatever ends the program."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from running import program

STARTS_A_SERVER = """
from pathlib import Path
from merged_lora.bench import launcher
from merged_lora.commands.running import terminated_cleanly

launcher.vllm_command = lambda: [sys.executable, "-c", "import time; time.sleep(120)"]
waiting = lambda: print(server.pid, flush=True)
server = launcher.VllmServer(Path("model"), log=Path(sys.argv[1]), waiting=waiting)
with terminated_cleanly(), server:
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_a_server_ends_with_the_program_that_started_it(number: signal.Signals, tmp_path: Path) -> None:
    with program(STARTS_A_SERVER, str(tmp_path / "log")) as running:
        assert running.stdout is not None
        server = int(running.stdout.readline())
        os.kill(server, 0)
        running.send_signal(number)
        running.communicate(timeout=60)
    assert not Path(f"/proc/{server}").exists()
