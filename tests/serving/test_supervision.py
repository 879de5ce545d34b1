"""An API server that dies does not take the others down; see test_scale.py for one with an engine."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from merged_lora.vllm_plugin.hooks import supervision
from merged_lora.vllm_plugin.hooks.current import current
from merged_lora.vllm_plugin.settings import Settings


@pytest.mark.parametrize("others", [1, 0])
def test_a_server_that_just_ended_is_lost_even_without_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    monkeypatch.setattr(current, "settings", Settings(enable=True))
    pipes = [os.pipe() for _ in range(1 + others)]
    os.close(pipes[0][1])  # as when a process has ended and is not reaped yet
    manager = SimpleNamespace(processes=[SimpleNamespace(sentinel=read) for read, _ in pipes])
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
