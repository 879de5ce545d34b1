"""New merges: who waits for what, for how long, and what the client and the operator hear of it."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

import tiny
from gates import (
    SMALL,
    SteeredMaker,
    ask,
    budget,
    gate_with,
    leave,
    results,
    small_worker,
    two_small_sources,
    until,
    worker,
)
from merged_lora.spec import parse
from merged_lora.vllm_plugin.api_server.gate import BusyError, Lease
from merged_lora.vllm_plugin.api_server.routes import report
from merged_lora.vllm_plugin.rpc import Reply
from merged_lora.vllm_plugin.settings import GIB

GATE = "merged_lora.vllm_plugin.api_server.gate"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """New merges wait for room for a moment only."""
    monkeypatch.setattr(f"{GATE}.ROOM_SECONDS", 0.02)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the plugin writes to the log."""
    logger = logging.getLogger("vllm.merged_lora")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)  # whether or not vLLM has set up its log
    return caplog


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("servers", [1, 2])
def test_all_who_wait_for_a_merge_that_gets_no_room_are_refused_with_the_reason(
    tmp_path: Path, log: pytest.LogCaptureFixture, servers: int
) -> None:
    async def run() -> None:
        registry, share = CollectorRegistry(), budget(1)
        gate = gate_with(small_worker(), registry=registry, servers=servers, ready_gib=share * servers)
        await two_small_sources(gate, tmp_path)
        await ask(gate, "sum(a)", request := Lease())
        clients = [ask(gate, spec) for spec in ("sum(b)", "sum(b)", "sum(2*b)")]
        refused = await asyncio.gather(*clients, return_exceptions=True)
        assert [type(error) for error in refused] == [BusyError] * 3
        each = gate.ready_bytes / GIB
        budget_shared = f"{share * servers:g}" + (", shared by 2 API servers" if servers == 2 else "")
        assert str(refused[0]) == (
            f"a new merge may take {each:.3g} GiB, and there was no room for 0.02 s: those that requests use "
            f"or wait for take {each:.3g} of {share:.3g} GiB (--merged-lora-ready-gib {budget_shared}); ask "
            "again in 1 s"
        )
        assert results(registry) == {"made": 1, "busy": 2}
        assert gate.making == []
        assert gate._ready.needed == gate.ready_bytes
        del request
        await ask(gate, "sum(b)")

    asyncio.run(run())
    (warning,) = [record.getMessage() for record in log.records if record.levelno == logging.WARNING]
    assert re.match(
        r"a new merge may take .* GiB, and there was no room .* \(--merged-lora-ready-gib", warning
    )


@pytest.mark.usefixtures("impatient")
def test_missing_room_is_a_line_of_the_log_now_and_then(
    tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        gate = gate_with(small_worker(), ready_gib=budget(1))
        await two_small_sources(gate, tmp_path)
        await ask(gate, "sum(a)", request := Lease())
        for quiet, lines in ((60.0, 1), (60.0, 1), (0.0, 2)):
            monkeypatch.setattr(f"{GATE}.QUIET", quiet)
            with pytest.raises(BusyError):
                await ask(gate, "sum(b)")
            assert log.text.count("there was no room") == lines
        del request

    asyncio.run(run())


@pytest.mark.usefixtures("impatient")
def test_a_merge_that_was_ready_before_needs_no_more_room_than_it_took(tmp_path: Path) -> None:
    async def run() -> None:
        maker = SteeredMaker()
        maker.let.set()
        small = tiny.make_adapter(1, only=SMALL).nbytes
        gate = gate_with(worker(maker=maker, largest=2 * small), ready_gib=budget(2))
        await two_small_sources(gate, tmp_path)
        await ask(gate, "sum(a)")
        await ask(gate, "sum(b)", request := Lease())
        assert [str(live.identity.spec) for live in gate.merges] == ["sum(b)"]
        await ask(gate, "sum(a)")
        assert maker.made == ["sum(a)", "sum(b)", "sum(a)"]
        with pytest.raises(BusyError):
            await ask(gate, "sum(2*a)")
        del request

    asyncio.run(run())


def test_the_report_shows_which_merges_wait_for_memory(tmp_path: Path) -> None:
    async def run() -> None:
        gate = gate_with(small_worker(), ready_gib=budget(1))
        await two_small_sources(gate, tmp_path)
        await ask(gate, "sum(a)", request := Lease())
        client = ask(gate, "sum(b)")
        await until(lambda: bool(gate.making) and bool(gate._ready._waiting))
        assert [each["state"] for each in report(gate)["making"]] == ["waiting for memory"]
        del request
        gc.collect()
        await client
        await leave(client)

    asyncio.run(run())


def test_the_seconds_that_requests_waited_for_a_new_merge_are_counted(tmp_path: Path) -> None:
    async def run() -> None:
        maker, registry = SteeredMaker(), CollectorRegistry()
        gate = gate_with(worker(maker=maker), registry=registry)
        await two_small_sources(gate, tmp_path)
        before = time.perf_counter()
        clients = [ask(gate, "sum(a)") for _ in range(3)]
        await until(lambda: [making.waiting for making in gate.making] == [3])
        began = time.perf_counter()
        await until(lambda: bool(maker.begun))
        ended = time.perf_counter()
        await leave(clients[0])
        maker.let.set()
        await asyncio.gather(*clients[1:])
        await ask(gate, "sum(a)")  # which is ready
        after = time.perf_counter()
        assert registry.get_sample_value("merged_lora_wait_seconds_count") == 3
        waited = registry.get_sample_value("merged_lora_wait_seconds_sum")
        assert waited is not None
        assert 3 * (ended - began) <= waited <= 3 * (after - before)

    asyncio.run(run())


@pytest.mark.parametrize("late", [0, 1])
def test_a_merge_that_is_late_on_any_rank_is_a_line_of_the_log(
    tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    ranks = [worker(), worker()]
    original = ranks[late]._made

    def made(digest: str, made: bool) -> Reply:
        reply = original(digest, made)
        reply["facts"] |= {"seconds": 4.0, "announced": 1.0}
        return reply

    monkeypatch.setattr(ranks[late], "_made", made)

    async def run() -> None:
        gate = gate_with(ranks)
        await two_small_sources(gate, tmp_path)
        await ask(gate, "sum(a)")

    asyncio.run(run())
    assert "sum(a) took 4.0 s instead of the 1.0 s that were expected" in log.text


def test_a_merge_that_the_worker_still_has_is_not_made_again(tmp_path: Path) -> None:
    async def run() -> None:
        maker = SteeredMaker()
        maker.let.set()
        registry = CollectorRegistry()
        gate = gate_with(small_worker(maker=maker), registry=registry, aliases={}, max_ad_hoc=1)
        await two_small_sources(gate, tmp_path)
        for spec in ("sum(a)", "sum(b)", "sum(a)"):  # the API server forgets each for the next one
            await ask(gate, spec)
            assert [str(live.identity.spec) for live in gate.merges] == [spec]
        assert maker.made == ["sum(a)", "sum(b)"]
        assert results(registry) == {"made": 2, "shared": 1}
        assert not registry.get_sample_value("merged_lora_made_again_total")

    asyncio.run(run())


def test_a_merge_is_new_for_those_alone_who_waited_until_it_was_made(tmp_path: Path) -> None:
    async def run() -> None:
        maker = SteeredMaker()
        merges = worker(maker=maker)
        one, other, third = (gate_with(merges) for _ in range(3))
        for gate in (one, other, third):
            await two_small_sources(gate, tmp_path)
        waiting = [asyncio.create_task(gate.serve(parse("sum(a)"), Lease())) for gate in (one, one, other)]
        await until(lambda: all(gate.making and gate.making[0].state for gate in (one, other)))
        maker.let.set()
        assert [new for _, new in await asyncio.gather(*waiting)] == [True] * 3
        later = [await gate.serve(parse("sum(a)"), Lease()) for gate in (third, third, one)]
        assert [new for _, new in later] == [False] * 3
        assert maker.made == ["sum(a)"]

    asyncio.run(run())
