"""What offline inference asks the workers for: which merges stay, and that nothing goes on for nobody."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from gates import SteeredMaker, replies, worker
from merged_lora.adapters import Adapter
from merged_lora.vllm_plugin.offline import merged_lora_request
from merged_lora.vllm_plugin.rpc import CANCEL, Reply
from merged_lora.vllm_plugin.settings import GIB
from merged_lora.vllm_plugin.worker.background import CancelledError, Job
from merged_lora.vllm_plugin.worker.merge_worker import MergeWorker


class OfflineLLM:
    """A vLLM in this process with our worker; ``calls`` has the method of every call."""

    def __init__(self, merges: MergeWorker[Adapter], ready_gib: float) -> None:
        settings = {"merged_lora": {"enable": True, "ready_gib": ready_gib}}
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=settings))
        self.merges = merges
        self.calls: list[str] = []

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Reply]:
        self.calls.append(method)
        return replies([self.merges], method, args)


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, str]:
    """The folders of three adapters of one size."""
    for seed, name in enumerate("abc"):
        tiny.make_adapter(seed).save(tmp_path / name)
    return {name: str(tmp_path / name) for name in "abc"}


def test_the_merge_that_was_used_last_stays_longest(adapters: dict[str, str]) -> None:
    maker = SteeredMaker()
    maker.let.set()
    each = Adapter.load(adapters["a"]).nbytes
    llm = OfflineLLM(worker(maker=maker, largest=each), 2.5 * each / GIB)
    for spec in ("sum(a)", "sum(b)", "sum(a)", "sum(c)", "sum(a)"):
        merged_lora_request(llm, spec, adapters)
    assert maker.made == ["sum(a)", "sum(b)", "sum(c)"]
    merged_lora_request(llm, "sum(b)", adapters)
    assert maker.made[3:] == ["sum(b)"]


@pytest.mark.parametrize("answer", ["never", "error"])
def test_an_interrupt_ends_the_call_even_if_it_ended_the_engine(
    adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr("merged_lora.vllm_plugin.offline.PATIENCE", 0.1)
    asked, end = list[str](), threading.Event()

    class Interrupted(OfflineLLM):
        def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Reply]:
            asked.append(method)
            if method != CANCEL:
                raise KeyboardInterrupt
            if answer == "error":
                raise RuntimeError("the engine is dead")
            end.wait()
            return []

    with pytest.raises(KeyboardInterrupt):
        merged_lora_request(Interrupted(worker(), 1.0), "sum(a)", adapters)
    end.set()
    assert asked[-1] == CANCEL


def test_an_interrupt_ends_the_merge_that_nobody_waits_for(
    adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = SteeredMaker()
    merges = worker(maker=maker)
    llm = OfflineLLM(merges, 1.0)
    sleep, jobs = time.sleep, list[Job[Any]]()

    def interrupted(seconds: float) -> None:
        sleep(seconds)
        if maker.begun and threading.current_thread() is threading.main_thread():
            jobs.extend(work.job for work in merges._making.values())
            raise KeyboardInterrupt

    monkeypatch.setattr("merged_lora.vllm_plugin.offline.time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merged_lora_request(llm, "sum(a)", adapters)
    monkeypatch.undo()
    assert llm.calls[-1] == CANCEL
    assert (merges._work, merges._making) == ({}, {})
    with pytest.raises(CancelledError):
        jobs[0].result()
    maker.let.set()
    merged_lora_request(llm, "sum(b)", adapters)
    assert maker.made == ["sum(b)"]
