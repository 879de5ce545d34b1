"""Start a real ``vllm serve`` on loopback, wait until it answers, and stop it by its own process id.

The tests and the demonstration start their servers with it too.  It knows nothing of what is requested.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from merged_lora.errors import MergeError

START_SECONDS = 240.0
STOP_SECONDS = 30.0

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}
"""What vLLM needs to run on a CPU without a network."""


class ServerDiedError(MergeError):
    """The server ended before it answered; the message holds the end of its output."""


def vllm_command() -> list[str]:
    """The program ``vllm`` beside this Python, or vLLM's module if it is only on the path."""
    script = Path(sys.executable).with_name("vllm")
    # Without -P, the folder triton_kernels of a checkout would be taken for another package.
    return [str(script)] if script.exists() else [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main"]


def print_dot() -> None:
    """Print a dot, as a sign of life while a server starts."""
    print(".", end="", flush=True)


class VllmServer:
    """A running server; use it in a ``with`` statement.

    arguments: the flags of ``vllm serve``; the base model is served as ``base``.
    log: the file that gets the server's output.
    waiting: called every half second until the server answers.
    environment: variables on top of this process's own and ENVIRONMENT.
    start_seconds: how long the server may take to answer.
    ready_after: seconds until the server answered.

    Entering raises ServerDiedError if the server ends, and TimeoutError if it does not answer in time.
    """

    def __init__(
        self,
        model: Path,
        *arguments: str,
        log: Path,
        waiting: Callable[[], None] = lambda: None,
        environment: Mapping[str, str] | None = None,
        start_seconds: float = START_SECONDS,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.ready_after = math.nan
        self._start_seconds = start_seconds
        self._waiting = waiting
        self._environment = os.environ | ENVIRONMENT | dict(environment or {})
        self._command = [
            *(*vllm_command(), "serve", str(model), "--served-model-name", "base"),
            *("--host", "127.0.0.1", "--port", str(port), *arguments),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                self._command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait(self) -> None:
        assert self._process is not None
        begin = time.monotonic()
        while time.monotonic() < begin + self._start_seconds:
            if self._process.poll() is not None:
                raise ServerDiedError(f"the server ended with {self._process.returncode}:\n{self.tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    self.ready_after = time.monotonic() - begin
                    return
            except OSError:
                self._waiting()
                time.sleep(0.5)
        raise TimeoutError(f"no answer after {self._start_seconds:.0f} s:\n{self.tail()}")

    @property
    def pid(self) -> int:
        """Id of the server's first process, which leads the session of all of them."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the server's first process is running."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End the server and its workers, which share its process group."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # the usual case: all of them have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_SECONDS)

    def tail(self, lines: int = 40) -> str:
        """The end of the server's output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
