"""Short merges pass long ones, and those that would take too long are refused."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path
from typing import Any

import pytest

import tiny
from gates import KnownPace, SteeredMaker, ask, captured, gate_with, leave, two_small_sources, until, worker
from merged_lora import weighing
from merged_lora.backends import no_progress
from merged_lora.engine import merge
from merged_lora.errors import MergeError
from merged_lora.planning import make_plan
from merged_lora.spec import parse
from merged_lora.vllm_plugin.api_server.gate import BusyError
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.worker.background import CancelledError
from merged_lora.vllm_plugin.worker.pace import Pace


def test_a_short_merge_passes_a_long_one(tmp_path: Path) -> None:
    async def run() -> None:
        maker = SteeredMaker()
        gate = gate_with(worker(maker=maker, pace=KnownPace()), max_strength=1e9)
        await two_small_sources(gate, tmp_path)
        clients = [ask(gate, "sum(1000*a)")]
        await until(lambda: len(maker.begun) == 1)
        for begun, spec in enumerate(("sum(500*a)", "sum(2*a)"), 2):  # each interrupts the one before
            clients.append(ask(gate, spec))
            await until(lambda begun=begun: len(maker.begun) == begun)  # type: ignore[misc]
        maker.let.set()
        await asyncio.gather(*clients)
        assert maker.made == ["sum(2*a)", "sum(500*a)", "sum(1000*a)"]

    asyncio.run(run())


def test_a_merge_that_would_take_too_long_is_refused_with_the_strategies_that_would_do(
    tmp_path: Path,
) -> None:
    class Slow(Pace):
        def seconds(self, plan: Any) -> float:
            return 40.0 if plan.recipe.space == "entries" else 0.25

    async def run() -> None:
        maker = SteeredMaker()
        maker.let.set()
        gate = gate_with(worker(maker=maker, pace=Slow(), seconds=10.0))
        await two_small_sources(gate, tmp_path)
        with pytest.raises(MergeError) as refusal:
            await ask(gate, "ties_svd(a, b)")
        words = str(refusal.value)
        assert "ties_svd of these sources takes about 40 s here" in words
        assert "at most 10 s (--merged-lora-max-seconds)" in words
        assert "these would do: ties (0.25 s), knots (0.25 s), core_ties (0.25 s)" in words
        assert maker.begun == []
        await ask(gate, "ties(a, b)")

    asyncio.run(run())


def test_a_merge_that_takes_longer_than_allowed_is_given_up_whatever_was_expected(tmp_path: Path) -> None:
    async def run() -> None:
        maker = SteeredMaker()
        gate = gate_with(worker(maker=maker, pace=KnownPace(), seconds=0.05))
        await two_small_sources(gate, tmp_path)
        with pytest.raises(MergeError) as refusal:
            await ask(gate, "sum(0.001*a)")
        assert re.fullmatch(
            r"sum of these sources was expected to take 0.001 s, and was given up after \d+\.\d s; "
            r"this server merges for at most 0.05 s \(--merged-lora-max-seconds\)",
            str(refusal.value),
        )
        assert maker.made == []

    asyncio.run(run())


def test_what_was_slow_in_a_busy_hour_is_made_again_after_a_few_refusals(tmp_path: Path) -> None:
    tiny.make_adapter(1).save(tmp_path / "a")
    pace = Pace()
    pace._measured["sum"] = 1e-9
    merges = worker(pace=pace, seconds=10.0)
    key = captured(merges, "one", None, str(tmp_path / "a"))["key"]
    identity = MergeIdentity(parse("sum(a)"), (key,))
    sources = merges._sources(identity)
    while pace.seconds(make_plan(identity.spec, sources)) <= 10.0:
        merges._task(identity, sources).took(12.0)
    refusals = 0
    while refusals < 10:
        try:
            merges._task(identity, sources)
            break
        except MergeError:
            refusals += 1
    assert 0 < refusals < 10


def test_weights_that_have_to_be_found_are_found_with_the_merge_and_not_while_it_is_sized_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.make_adapter(1).save(tmp_path / "a")
    tiny.make_adapter(2).save(tmp_path / "b")
    pace = Pace()
    pace._measured["sum"] = 1e-12
    merges = worker(pace=pace)
    keys = [captured(merges, "one", None, str(tmp_path / name))["key"] for name in "ab"]
    identity = MergeIdentity(parse("sum(a, b, weights=auto)"), tuple(keys))
    found: list[int] = []

    def auto_weights(sources: list[Any], *more: Any) -> Any:
        found.append(len(sources))
        return weighing.auto_weights(sources, *more)

    monkeypatch.setattr("merged_lora.planning.auto_weights", auto_weights)
    task = merges._task(identity, merges._sources(identity))
    assert found == []
    task.took(1e9)
    assert [kind[:2] for kind in pace._learned] == [("sum", True)]  # nothing of merges without such weights

    def cancel(_: int) -> None:
        raise CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(merges.maker, "make", None)  # before anything is merged
        with pytest.raises(CancelledError):
            task.run(cancel)
    made = task.run(no_progress)
    assert found == [2, 2]
    expected = merge("sum(a, b, weights=auto)", {name: tmp_path / name for name in "ab"}, rank=16)
    assert made.model.digest == expected.digest


def test_who_is_refused_is_told_how_long_those_before_take(tmp_path: Path) -> None:
    async def run() -> None:
        maker = SteeredMaker()
        gate = gate_with(worker(maker=maker, pace=KnownPace()), max_waiting=1, max_strength=1e9)
        await two_small_sources(gate, tmp_path)
        clients = [ask(gate, "sum(40*a)")]
        await until(lambda: len(maker.begun) == 1)
        clients.append(ask(gate, "sum(60*a)"))
        await until(lambda: len(gate.making) == 2)
        await until(lambda: all(making.state and making.state.announced for making in gate.making))
        with pytest.raises(BusyError) as busy:
            await ask(gate, "sum(b)")
        assert 95 <= busy.value.seconds <= 100
        await leave(*clients)

    asyncio.run(run())


def test_a_merge_that_takes_longer_than_announced_is_a_line_in_the_log_and_a_lesson(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm.merged_lora"), "handlers", [caplog.handler])
    monkeypatch.setattr("merged_lora.vllm_plugin.api_server.gate.LATE_SECONDS", 0.0)
    pace = Pace()
    pace._measured["sum"] = 1e-12

    async def run() -> None:
        gate = gate_with(worker(pace=pace))
        await two_small_sources(gate, tmp_path)
        await ask(gate, "sum(a)")

    asyncio.run(run())
    assert re.search(r"sum\(a\) took \d+\.\d s instead of the 0.0 s that were expected", caplog.text)
    assert list(pace._learned.values()) == [pytest.approx(1.75e-12)]
