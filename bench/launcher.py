"""Start a real ``vllm serve`` on loopback, wait until it answers, and stop it by its own process id."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

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


def vllm_command() -> list[str]:
    """The program ``vllm`` beside this Python, or the module where vLLM merely lies on the path."""
    script = Path(sys.executable).with_name("vllm")
    # Without -P, the folder triton_kernels of a checkout would be taken for another package.
    return [str(script)] if script.exists() else [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main"]


class Server:
    """A running server; use it in a ``with`` statement.

    log: the file that holds its output.  waiting: called every half second until it answers.
    environment: variables for it over this process's own and ENVIRONMENT.  api_key: the key it asks for.
    start_seconds: until no answer is an error.  ready_after: the seconds it took.
    """

    def __init__(
        self,
        model: Path,
        *arguments: str,
        log: Path,
        waiting: Callable[[], None] = lambda: None,
        environment: Mapping[str, str] | None = None,
        api_key: str | None = None,
        start_seconds: float = START_SECONDS,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.ready_after = math.nan
        self._start_seconds = start_seconds
        self._waiting = waiting
        self._environment = os.environ | ENVIRONMENT | dict(environment or {})
        self._command = [
            *(*vllm_command(), "serve", str(model), "--served-model-name", "base"),
            *("--host", "127.0.0.1", "--port", str(self.port), *arguments),
        ]
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._command += ["--api-key", api_key]
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
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
        """Of the server's first process, which leads the session of all of them."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether its first process is."""
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

    def get(self, route: str) -> tuple[int, Any]:
        """Status and JSON body of a GET."""
        return self._ask("GET", route)

    def post(self, route: str, body: dict[str, Any] | bytes) -> tuple[int, Any]:
        """Status and JSON body of a POST."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._ask("POST", route, data)

    def stream(self, route: str, body: dict[str, Any], seconds: float) -> HTTPResponse:
        """The reply to a POST, to be read as it comes; raises OSError after so many seconds of silence."""
        request = urllib.request.Request(self.url + route, json.dumps(body).encode(), self._headers)
        reply: HTTPResponse = urllib.request.urlopen(request, timeout=seconds)
        return reply

    def delete(self, route: str) -> tuple[int, Any]:
        """Status and JSON body of a DELETE."""
        return self._ask("DELETE", route)

    def metrics(self) -> dict[str, float]:
        """What Prometheus would read: each series with its labels, and its value."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as reply:
            lines = reply.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {series: float(value) for series, value in pairs}

    def _ask(self, method: str, route: str, data: bytes | None = None) -> tuple[int, Any]:
        request = urllib.request.Request(self.url + route, data, self._headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:
                text = reply.read()
                return reply.status, json.loads(text) if text.startswith((b"{", b"[")) else text.decode()
        except urllib.error.HTTPError as error:
            text = error.read()
            return error.code, json.loads(text) if text else None

    def logprobs(self, model: str, prompt: str = "The quick brown fox", **more: Any) -> list[float]:
        """Log-probabilities of eight greedy tokens."""
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": 8,
            "temperature": 0,
            "logprobs": 1,
            "ignore_eos": True,
        }
        status, reply = self.post("/v1/completions", body | more)
        assert status == 200, reply
        values: list[float] = reply["choices"][0]["logprobs"]["token_logprobs"]
        return values


class ServerDiedError(RuntimeError):
    """The server ended before it answered; the message holds the end of its output."""
