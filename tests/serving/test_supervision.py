"""An API server that dies does not take the others down; see test_scale.py for one with an engine."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from merged_lora.vllm_plugin.hooks import supervision
from merged_lora.vllm_plugin.hooks.current import current
from merged_lora.vllm_plugin.settings import Settings


@pytest.mark.parametrize("others", [1, 0])
def test_a_server_that_just_ended_is_lost_even_without_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, others: int
) -> None:
    monkeypatch.setattr(current, "settings", Settings(enable=True))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    pipes = [os.pipe() for _ in range(1 + others)]
    os.close(pipes[0][1])  # as when a process has ended and is not reaped yet
    manager = SimpleNamespace(processes=[SimpleNamespace(sentinel=read, pid=read) for read, _ in pipes])
    calls: list[int] = []

    def original(manager: Any) -> None:
        calls.append(len(manager.processes))
        if len(calls) == 1:
            raise RuntimeError("died with exit code None")

    if others:
        supervision.wrap_wait_for_completion_or_failure(original)(manager)
        assert calls == [2, 1]
    else:
        with pytest.raises(RuntimeError):
            supervision.wrap_wait_for_completion_or_failure(original)(manager)
    for read, write in pipes[1:]:
        os.close(read)
        os.close(write)
    os.close(pipes[0][0])


def test_the_queue_of_a_server_that_died_does_not_count_any_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(current, "settings", Settings(enable=True))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    module = "merged_lora.vllm_plugin.api_server.metrics"
    code = f"import sys, {module} as m; m.metrics().queue.set(3); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code]

    def queue() -> float | None:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return registry.get_sample_value("merged_lora_queue")

    with ExitStack() as stack:
        servers = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            for _ in range(2)
        ]
        for server in servers:
            assert server.stdout is not None
            server.stdout.readline()
        sentinels = [os.fdopen(os.pidfd_open(server.pid)) for server in servers]
        processes = [
            SimpleNamespace(pid=server.pid, sentinel=stack.enter_context(sentinel).fileno())
            for server, sentinel in zip(servers, sentinels, strict=True)
        ]
        assert queue() == 6
        servers[0].kill()
        wait([processes[0].sentinel])
        manager, calls = SimpleNamespace(processes=processes), iter([True, False])

        def original(_: object) -> None:
            if next(calls):
                raise RuntimeError("died with exit code -9")

        supervision.wrap_wait_for_completion_or_failure(original)(manager)
        assert queue() == 3
