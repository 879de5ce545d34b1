"""What is called in a worker runs between two steps or in one: no call waits for a disk or for a merge."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tiny
from gates import PATIENCE, SMALL, FolderAdapters, captured, finished, prepared, worker
from merged_lora.adapters import Adapter
from merged_lora.calibration import Exchange
from merged_lora.spec import parse
from merged_lora.vllm_plugin import rpc
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.rpc import agreed_under
from merged_lora.vllm_plugin.worker import merge_worker
from merged_lora.vllm_plugin.worker.makers import HostMaker
from merged_lora.vllm_plugin.worker.merge_worker import MergeWorker

READING: dict[str, tuple[Any, str]] = {
    "the folder is found": (FolderAdapters, "find"),
    "vLLM reads it": (FolderAdapters, "read"),
    "its files are read": (Adapter, "load"),
    "it is fitted": (FolderAdapters, "fit"),
    "it is adopted": (HostMaker, "adopt"),
}
"""The parts of reading an adapter, each with the function that does it."""
MERGING: dict[str, tuple[Any, str]] = {
    "it is planned": (merge_worker, "make_plan"),
    "it is made": (HostMaker, "make"),
}
"""The parts of making a merge."""
LIMIT = 20.0
"""Seconds after which a call counts as one that waits; as long as none does, nothing takes so long."""


class Hold:
    """A place at which work is held up; ``reached`` is set when some has come to it."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()
        self._open.set()

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, behind this place."""

        def held(*arguments: Any, **named: Any) -> Any:
            self.reached.set()
            assert self._open.wait(PATIENCE)
            return function(*arguments, **named)

        return held

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Nothing passes as long as this lasts; the caller fails if it had to be let go."""
        waited = threading.Event()

        def let_go() -> None:
            waited.set()
            self._open.set()

        self.reached.clear()
        self._open.clear()
        watchdog = threading.Timer(LIMIT, let_go)
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()
            self._open.set()
            assert not waited.is_set(), "a call waited for what is done beside it"


def hold_before(function: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> Hold:
    """A place before a function, which is an attribute of a class or of a module."""
    hold, (owner, name) = Hold(), function
    held = hold.before(getattr(owner, name))
    bound = isinstance(vars(owner)[name], classmethod)
    monkeypatch.setattr(owner, name, staticmethod(held) if bound else held)
    return hold


@pytest.fixture
def merges(tmp_path: Path) -> Iterator[MergeWorker[Adapter]]:
    """A worker with a copy of the adapter ``a``, beside which lies ``b``."""
    for seed, name in enumerate("ab", 1):
        tiny.make_adapter(seed, only=SMALL).save(tmp_path / name)
    tiny.calibrate(tmp_path / "a", Exchange((1, 2), (3,), fitted=False))
    made = worker()
    assert captured(made, "one", None, str(tmp_path / "a"), {})["ok"]
    yield made
    made.stop()


@pytest.fixture
def ready(merges: MergeWorker[Adapter], tmp_path: Path) -> MergeIdentity:
    """A merge of ``a`` that was made."""
    identity = MergeIdentity(parse("sum(a)"), (Adapter.load(tmp_path / "a").identity,))
    assert prepared(merges, identity.path)["made"]
    return identity


def call_everything(merges: MergeWorker[Adapter], ready: MergeIdentity, folder: Path) -> None:
    """Call every method of a worker, and what a step calls.

    ready:  a merge of ``a`` that was made.
    folder: of the adapters.
    """
    (key,) = ready.contents
    new = MergeIdentity(parse("sum(0.3*a)"), ready.contents)
    replies = {
        rpc.CAPTURE: merges.capture("copy", "one", [key], str(folder / "b"), {}),
        rpc.PREPARE: merges.prepare("new", "one", [ready.digest], new.path, ()),
        rpc.POLL: merges.poll(["copy", "new"]),
        rpc.REPLAY: merges.replay(key, "a", "sum"),
        rpc.RELEASE: merges.release("one", [key]),
        rpc.CANCEL: merges.cancel(["copy", "new"]),
    }
    methods = {name for name in vars(rpc).values() if isinstance(name, str) and "merged_lora_" in name}
    assert set(replies) == methods
    assert all(reply["ok"] for reply in replies.values()), replies
    assert all("pending" in replies[method] for method in (rpc.CAPTURE, rpc.PREPARE))
    assert not merges.prepare("again", "one", [ready.digest], ready.path, ())["made"]
    assert merges.load_merge(ready.path) is not None
    assert merges.load_plain(str(folder / "a"), 1) is not None


@pytest.mark.parametrize("part", READING)
def test_nothing_waits_while_an_adapter_is_read(
    merges: MergeWorker[Adapter],
    ready: MergeIdentity,
    tmp_path: Path,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hold = hold_before(READING[part], monkeypatch)
    with hold.closed():
        first = merges.capture("held", "one", list(ready.contents), str(tmp_path / "b"), {})
        assert hold.reached.wait(PATIENCE)
        call_everything(merges, ready, tmp_path)
        assert "pending" in agreed_under("held", [merges.poll(["held"])])
    assert finished(merges, first, "held")["ok"]


@pytest.mark.parametrize("part", MERGING)
def test_nothing_waits_while_a_merge_is_made(
    merges: MergeWorker[Adapter],
    ready: MergeIdentity,
    tmp_path: Path,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hold = hold_before(MERGING[part], monkeypatch)
    new = MergeIdentity(parse("sum(0.2*a)"), ready.contents)
    with hold.closed():
        first = merges.prepare("held", "one", [ready.digest], new.path, ())
        assert hold.reached.wait(PATIENCE)
        call_everything(merges, ready, tmp_path)
        assert "pending" in agreed_under("held", [merges.poll(["held"])])
    assert finished(merges, first, "held")["made"]


def test_what_was_copied_is_not_read_again(
    merges: MergeWorker[Adapter], ready: MergeIdentity, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "a")
    assert prepared(merges, MergeIdentity(parse("sum(0.2*a)"), ready.contents).path)["made"]
    (key,) = ready.contents
    assert merges.replay(key, "a", "sum")["exchanges"]
    assert merges.load_plain(str(tmp_path / "a"), 1) is not None
