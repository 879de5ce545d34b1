"""Replays of merges behind the gate, without a server: whose answers survive, and who hears of it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import shutil
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

import tiny
from gates import LONGEST, PATIENCE, captured, gate_with, register, worker
from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.calibration import CALIBRATION_NAME, Exchange
from merged_lora.errors import CalibrationError, MergeError, SpecError, UnknownAdapterError
from merged_lora.files.layout import WEIGHTS_NAME
from merged_lora.files.parts import TOKEN_HEADS
from merged_lora.replay import Replayed, Survival
from merged_lora.spec import parse
from merged_lora.vllm_plugin.api_server.gate import BusyError, Lease, MergeGate
from merged_lora.vllm_plugin.api_server.replaying import AT_ONCE, NotReplayed, Tokens
from merged_lora.vllm_plugin.api_server.routes import make_router, report
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.rpc import raise_failure

A = [Exchange((1, 2, i), (5, 6), fitted=False) for i in range(8)]
B = [Exchange((3, i), (7,), fitted=False) for i in range(8)]


async def none_of_b(merge: MergeIdentity, prompt: Tokens, answer: Tokens) -> Replayed:
    """An engine whose merges keep all answers of ``a`` and one of ``b``."""
    await asyncio.sleep(0)
    return Replayed(answer == (5, 6) or prompt == (3, 0), -0.5 * len(answer), len(answer))


async def calibrated(
    gate: MergeGate, folder: Path, a: list[Exchange] = A, b: list[Exchange] = B
) -> MergeGate:
    """The gate with the sources ``a`` and ``b``; one without exchanges is not calibrated."""
    for seed, (name, exchanges) in enumerate({"a": a, "b": b}.items()):
        tiny.make_adapter(seed).save(folder / name)
        if exchanges:
            tiny.calibrate(folder / name, *exchanges)
        async with gate.sources.changes:
            await gate.sources.serve(name, await gate.sources.copy(str(folder / name), {}))
    return gate


def counts(registry: CollectorRegistry) -> dict[str, float]:
    """The counter of sources by result."""
    found = {
        result: registry.get_sample_value("merged_lora_checks_total", {"result": result})
        for result in ("kept", "lost", "failed")
    }
    return {result: value for result, value in found.items() if value is not None}


# What a check finds


def test_a_check_counts_the_answers_that_survive_and_warns_of_a_lost_source(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        registry = CollectorRegistry()
        gate = await calibrated(gate_with(worker(), registry=registry, rate=none_of_b), tmp_path)
        live = await gate.check(parse("ties(a, b)"))
        assert live.replay == (Survival("a", 8, 8, 0.5), Survival("b", 1, 8, 0.5))
        assert counts(registry) == {"kept": 1, "lost": 1}

    asyncio.run(run())
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert line == "alias mix: b: 1 of 8 of its answers survive"


def test_the_exchanges_of_each_source_are_run_with_the_merge(tmp_path: Path) -> None:
    async def run() -> None:
        asked: list[tuple[str, Tokens, Tokens]] = []

        async def rate(merge: MergeIdentity, prompt: Tokens, answer: Tokens) -> Replayed:
            asked.append((str(merge.spec), prompt, answer))
            return Replayed(True, -1.0, len(answer))

        gate = await calibrated(gate_with(worker(), rate=rate), tmp_path)
        await gate.check(parse("ties(a, b, density=0.3)"))
        expected = [("ties(a, b, density=0.3)", e.prompt, e.answer) for e in (*A, *B)]
        assert sorted(asked) == sorted(expected)

    asyncio.run(run())


def test_a_merge_is_replayed_once_however_many_ask(tmp_path: Path) -> None:
    async def run() -> None:
        registry, under_way, most, asked = CollectorRegistry(), 0, 0, 0

        async def rate(merge: MergeIdentity, prompt: Tokens, answer: Tokens) -> Replayed:
            nonlocal under_way, most, asked
            under_way, asked = under_way + 1, asked + 1
            most = max(most, under_way)
            await asyncio.sleep(0.001)
            under_way -= 1
            return Replayed(True, -1.0, 1)

        gate = await calibrated(gate_with(worker(), registry=registry, rate=rate), tmp_path)
        await asyncio.gather(*(gate.check(parse("ties(a, b)")) for _ in range(20)))
        await gate.check(parse("ties(b, a)"))
        assert asked == len(A) + len(B)
        await asyncio.gather(*(gate.check(parse(f"sum({i}*a)")) for i in (1, 2, 3)))
        assert most == AT_ONCE
        assert counts(registry) == {"kept": 5}

    asyncio.run(run())


def test_an_alias_is_checked_by_its_name(tmp_path: Path) -> None:
    async def run() -> None:
        gate = await calibrated(gate_with(worker(), max_ad_hoc=0), tmp_path)
        assert (await gate.check(parse("mix"))).identity.spec == parse("ties(a, b)")
        assert (await gate.check(parse("ties(b, a)"))).replay is not None
        with pytest.raises(SpecError, match="but its aliases: mix"):
            await gate.check(parse("sum(a)"))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("sum(a, b, c, d)", "4 sources; this server merges at most 3"),
        ("sum(2*mix)", "'mix' is itself a merge"),
        ("sum(nobody)", "unknown adapter 'nobody'"),
        ("2000000*a", "multiplies a source by 2000000"),
    ],
)
def test_a_check_has_the_limits_of_a_request(tmp_path: Path, spec: str, words: str) -> None:
    async def run() -> None:
        gate = await calibrated(gate_with(worker(), max_sources=3), tmp_path)
        with pytest.raises(MergeError, match=words):
            await gate.check(parse(spec))

    asyncio.run(run())


# What cannot be replayed


def test_a_source_without_calibration_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    async def run() -> None:
        registry = CollectorRegistry()
        gate = await calibrated(gate_with(worker(), registry=registry), tmp_path, b=[])
        for _ in range(2):  # the second time from memory
            with pytest.raises(CalibrationError, match="b has none; make one with: merged-lora calibrate"):
                await gate.check(parse("ties(a, b)"))
        assert counts(registry) == {"kept": 1, "failed": 1}

    asyncio.run(run())


def test_a_calibration_of_prompts_that_are_too_long_is_named_with_the_limit(tmp_path: Path) -> None:
    async def run() -> None:
        fits, long = (Exchange((1,) * n, (2,) * 2, fitted=False) for n in (LONGEST - 2, LONGEST - 1))
        gate = await calibrated(gate_with(worker()), tmp_path, [fits], [fits, long])
        assert (await gate.check(parse("sum(a)"))).replay == (Survival("a", 1, 1, 0.5),)
        with pytest.raises(
            CalibrationError, match=r"b: a prompt of .* 33 tokens, more than the 32 .*max-model"
        ):
            await gate.check(parse("sum(b)"))

    asyncio.run(run())


def test_a_fault_of_the_engine_fails_one_check_and_the_next_starts_anew(tmp_path: Path) -> None:
    async def run() -> None:
        registry, broken = CollectorRegistry(), True

        async def rate(merge: MergeIdentity, prompt: Tokens, answer: Tokens) -> Replayed:
            if broken:
                raise ZeroDivisionError("ours")
            return Replayed(True, -1.0, 1)

        gate = await calibrated(gate_with(worker(), registry=registry, rate=rate), tmp_path)
        with pytest.raises(ZeroDivisionError):
            await gate.check(parse("sum(a)"))
        assert counts(registry) == {"failed": 1}
        broken = False
        assert (await gate.check(parse("sum(a)"))).replay == (Survival("a", 8, 8, 1.0),)

    asyncio.run(run())


@pytest.mark.parametrize("fault", [True, False])
def test_a_check_that_fails_keeps_no_lease(tmp_path: Path, fault: bool) -> None:
    async def run() -> None:
        async def rate(merge: MergeIdentity, prompt: Tokens, answer: Tokens) -> Replayed:
            if fault:
                raise ZeroDivisionError("ours")
            return Replayed(True, -1.0, 1)

        gate = await calibrated(gate_with(worker(), rate=rate), tmp_path, b=[])
        for _ in range(2):  # the second time from memory
            with contextlib.suppress(ZeroDivisionError, CalibrationError):
                await gate.check(parse("ties(a, b)"))
            await asyncio.sleep(0.01)
            assert not gate.sources._leases
            assert not gate._ready._leases

    gc.collect()
    gc.disable()  # an object ends with its last reference
    try:
        asyncio.run(run())
    finally:
        gc.enable()


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_no_prompt_outlives_the_replay_that_it_belongs_to(tmp_path: Path, end: str) -> None:
    async def run() -> None:
        under_way, begun = 0, asyncio.Event()

        async def rate(merge: MergeIdentity, prompt: Tokens, answer: Tokens) -> Replayed:
            nonlocal under_way
            under_way += 1
            begun.set()
            try:
                if end == "failed" and under_way == AT_ONCE:
                    raise MergeError("not this one")
                await asyncio.sleep(PATIENCE)
                raise AssertionError("it outlived the replay")
            except asyncio.CancelledError:
                await asyncio.sleep(0.01)  # as an engine that takes it in
                raise
            finally:
                under_way -= 1

        gate = await calibrated(gate_with(worker(), rate=rate), tmp_path)
        live = await gate.ready(parse("sum(a)"), request := Lease())
        replay = asyncio.create_task(gate._replays.of(live.identity))
        await begun.wait()
        if end == "cancelled":
            replay.cancel()
            await asyncio.sleep(0)
            replay.cancel()  # whoever is impatient changes nothing
        with pytest.raises(MergeError if end == "failed" else asyncio.CancelledError):
            await replay
        assert under_way == 0
        del request

    asyncio.run(run())


def test_the_worker_answers_instead_of_raising(tmp_path: Path) -> None:
    merges = worker()
    with pytest.raises(UnknownAdapterError, match="no snapshot of 'a'"):
        raise_failure(merges.replay("0" * 32, "a", "ties"))
    tiny.make_adapter(1).save(tmp_path / "a")
    key = captured(merges, "one", [], str(tmp_path / "a"))["key"]
    with pytest.raises(CalibrationError, match="a has none"):
        raise_failure(merges.replay(key, "a", "ties"))
    assert merges.replay(None, "a", "ties")["ok"] is False  # type: ignore[arg-type]


@pytest.mark.parametrize("head", TOKEN_HEADS)
def test_an_output_head_is_not_replayed_on_a_server(tmp_path: Path, head: str) -> None:
    random_adapter({head: (32, 16), "model.layers.0.mlp.up_proj": (16, 16)}).save(tmp_path / "a")
    tiny.calibrate(tmp_path / "a", *A)
    merges = worker()
    key = captured(merges, "one", [], str(tmp_path / "a"))["key"]
    with pytest.raises(CalibrationError, match=r"a has an output head, .* merged-lora check"):
        raise_failure(merges.replay(key, "a", "ties"))


# Many clients


def test_a_client_that_leaves_does_not_take_the_check_or_its_copies_with_it(tmp_path: Path) -> None:
    async def run() -> None:
        going, go = asyncio.Event(), asyncio.Event()

        async def rate(merge: MergeIdentity, prompt: Tokens, answer: Tokens) -> Replayed:
            going.set()
            await go.wait()
            assert merges.load_merge(merge.path) is not None  # the engine may load it at any time
            return Replayed(True, -1.0, 1)

        merges = worker()
        gate = await calibrated(gate_with(merges, rate=rate), tmp_path)
        client = asyncio.create_task(gate.check(parse("ties(a, b)")))
        await going.wait()
        client.cancel()
        await asyncio.gather(client, return_exceptions=True)
        del client  # its exception knows its frames, and those its lease
        async with gate.sources.changes:
            await gate.sources.forget("a")
            await gate.sources.forget("b")
        assert gate.sources.held > 0
        (live,) = gate.merges
        go.set()
        assert [each.source for each in await gate.replay(live)] == ["a", "b"]
        async with gate.sources.changes:
            await gate.sources.trim()
        assert gate.sources.held == 0

    asyncio.run(run())


def test_a_merge_whose_copies_are_gone_is_not_sent_to_the_engine(tmp_path: Path) -> None:
    async def run() -> None:
        asked: list[Tokens] = []

        async def rate(merge: MergeIdentity, prompt: Tokens, answer: Tokens) -> Replayed:
            asked.append(prompt)
            return Replayed(True, -1.0, 1)

        gate = await calibrated(gate_with(worker(), rate=rate), tmp_path)
        live = await gate.ready(parse("ties(a, b)"), Lease())
        async with gate.sources.changes:
            await gate.sources.forget("b")
        with pytest.raises(UnknownAdapterError, match="no snapshot of 'b'"):
            await gate.replay(live)
        assert not asked

    asyncio.run(run())


def test_one_check_too_many_is_told_when_to_come_back(tmp_path: Path) -> None:
    async def run() -> None:
        gate = await calibrated(gate_with(worker(), max_waiting=2, rate=none_of_b), tmp_path)
        for i in range(5):
            await gate.ready(parse(f"sum({1 + i}*a)"), Lease())
        asked = (gate.check(parse(f"sum({1 + i}*a)")) for i in range(5))
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        busy = [outcome for outcome in outcomes if isinstance(outcome, BusyError)]
        assert [str(error).startswith("2 checks of merges are waiting; ask again in ") for error in busy] == [
            True,
            True,
        ]

    asyncio.run(run())


# Aliases, with --merged-lora-check


def test_an_alias_is_replayed_when_it_is_defined(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        store = str(tmp_path / "aliases.json")
        gate = gate_with(worker(), alias_store=store, check=True, rate=none_of_b)
        await calibrated(gate, tmp_path)
        live, new = await gate.define("team", parse("sum(a, b)"), ["base"])
        assert new
        assert live.replay == (Survival("a", 8, 8, 0.5), Survival("b", 1, 8, 0.5))
        shown = {m["spec"]: m["replay"] for m in report(gate)["merges"]}
        assert shown["sum(a, b)"] == [
            {"name": "a", "kept": 8, "total": 8, "nll": 0.5, "lost": False},
            {"name": "b", "kept": 1, "total": 8, "nll": 0.5, "lost": True},
        ]

    asyncio.run(run())
    assert "alias team: b: 1 of 8 of its answers survive" in caplog.messages


@pytest.mark.parametrize("stale", [False, True])
def test_an_alias_of_a_source_that_cannot_be_replayed_is_defined_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stale: bool
) -> None:
    async def run() -> None:
        store = str(tmp_path / "aliases.json")
        gate = await calibrated(gate_with(worker(), alias_store=store, check=True), tmp_path, b=[])
        if stale:
            tiny.calibrate(tmp_path / "b", *B)
            tiny.make_adapter(9).save(tmp_path / "other")
            shutil.copy(tmp_path / "other" / WEIGHTS_NAME, tmp_path / "b")
            async with gate.sources.changes:
                await gate.sources.serve("b", await gate.sources.copy(str(tmp_path / "b"), {}))
        live, _ = await gate.define("team", parse("sum(a, b)"), ["base"])
        assert live.replay is not None
        a, b = live.replay
        assert isinstance(a, Survival)
        assert isinstance(b, NotReplayed)
        words = "other weights" if stale else "merged-lora calibrate"
        assert words in report(gate)["merges"][0]["replay"][1]["refusal"]
        for _ in range(3):
            await gate.ready(parse("sum(a, b)"), Lease())

    asyncio.run(run())
    assert len([line for line in caplog.messages if line.startswith("alias team: b is not checked: ")]) == 1


def test_a_fault_of_a_check_does_not_fail_the_definition(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async def rate(merge: MergeIdentity, prompt: Tokens, answer: Tokens) -> Replayed:
            raise ZeroDivisionError("ours")

        store = str(tmp_path / "aliases.json")
        gate = await calibrated(gate_with(worker(), alias_store=store, check=True, rate=rate), tmp_path)
        live, _ = await gate.define("team", parse("sum(a, b)"), ["base"])
        assert live.replay is None
        assert "team" in gate.aliases

    asyncio.run(run())
    assert "alias team: checking failed" in caplog.messages
    assert "ZeroDivisionError: ours" in caplog.text


def test_without_the_flag_nothing_is_replayed_unasked(tmp_path: Path) -> None:
    async def run() -> None:
        registry = CollectorRegistry()
        store = str(tmp_path / "aliases.json")
        gate = await calibrated(gate_with(worker(), registry=registry, alias_store=store), tmp_path)
        gate.check_aliases_later()
        live, _ = await gate.define("team", parse("sum(a, b)"), ["base"])
        await settled(gate)
        assert live.replay is None
        assert counts(registry) == {}

    asyncio.run(run())


async def settled(gate: MergeGate) -> None:
    """Returns when no check goes on in the background."""
    while gate._background:
        await asyncio.wait(gate._background)


def test_aliases_given_at_the_start_are_made_and_replayed_in_the_background(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        aliases = {"none": parse("linear(a, wide)"), "mix": parse("sum(a)")}
        gate = gate_with(worker(), aliases=aliases, check=True)
        await calibrated(gate, tmp_path)
        await register(gate, "wide", tmp_path, 3, rank=16)
        gate.check_aliases_later()
        assert not gate.merges
        await settled(gate)
        (live,) = gate.merges
        assert live.identity.spec == parse("sum(a)")
        assert live.replay == (Survival("a", 8, 8, 0.5),)

    asyncio.run(run())
    (line,) = [line for line in caplog.messages if line.startswith("alias none: not checked, because")]
    assert "equal ranks" in line


def test_an_alias_whose_source_has_changed_is_replayed_again(tmp_path: Path) -> None:
    async def run() -> None:
        registry = CollectorRegistry()
        gate = await calibrated(gate_with(worker(), registry=registry, check=True), tmp_path)
        for kept in (2, 4):
            await gate.ready(parse("ties(a, b)"), Lease())
            await gate.ready(parse("sum(a)"), Lease())  # no alias
            await settled(gate)
            assert counts(registry) == {"kept": kept}
            tiny.calibrate(tmp_path / "a", *A, seed=kept)
            async with gate.sources.changes:
                await gate.sources.serve("a", await gate.sources.copy(str(tmp_path / "a"), {}))

    asyncio.run(run())


def test_no_alias_takes_the_place_of_the_route() -> None:
    with pytest.raises(
        MergeError, match=r"alias 'check': POST /v1/merged_lora/check is a route; take another"
    ):
        asyncio.run(gate_with(worker()).define("check", parse("sum(a)"), []))


# The route


@pytest.mark.parametrize("changes", [False, True])
def test_the_route_is_there_whether_or_not_aliases_may_change(tmp_path: Path, changes: bool) -> None:
    async def gate() -> MergeGate:
        return await calibrated(gate_with(worker(), rate=none_of_b), tmp_path)

    made = asyncio.run(gate())
    app = FastAPI()
    app.include_router(make_router(lambda request: (made, []), changes))
    with TestClient(app) as client:
        reply = client.post("/v1/merged_lora/check", json={"spec": "ties(a, b)"})
        assert reply.status_code == 200
        assert reply.json() == {
            "spec": "ties(a, b)",
            "digest": made.merges[0].identity.digest,
            "sources": [
                {"name": "a", "kept": 8, "total": 8, "nll": 0.5, "lost": False},
                {"name": "b", "kept": 1, "total": 8, "nll": 0.5, "lost": True},
            ],
            "lost": ["b"],
        }
        assert client.post("/v1/merged_lora/check", json={"ids": ["a"]}).json()["lost"] == []
        refused = client.post("/v1/merged_lora/check", json={"spec": "sum(nobody)"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (404, "NotFoundError")


def test_aliases_are_not_changed_without_the_flag(tmp_path: Path) -> None:
    app = FastAPI()
    app.include_router(make_router(lambda request: (gate_with(worker()), []), False))
    with TestClient(app) as client:
        for reply in (client.post("/v1/merged_lora/team", json={}), client.delete("/v1/merged_lora/team")):
            assert reply.status_code == 403
            assert "--merged-lora-runtime-aliases" in reply.json()["error"]["message"]


def test_a_likelihood_that_is_no_number_is_null(tmp_path: Path) -> None:
    async def run() -> None:
        async def rate(merge: MergeIdentity, prompt: Tokens, answer: Tokens) -> Replayed:
            return Replayed(False, float("nan"), 1)

        gate = await calibrated(gate_with(worker(), rate=rate), tmp_path)
        await gate.check(parse("sum(a)"))
        assert report(gate)["merges"][0]["replay"] == [
            {"name": "a", "kept": 0, "total": 8, "nll": None, "lost": True}
        ]

    asyncio.run(run())


# A calibration beside a source


def test_a_calibration_counts_within_the_memory_for_copies(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        tiny.make_adapter(seed).save(tmp_path / name)
        plain = (tmp_path / name / WEIGHTS_NAME).stat().st_size
        tiny.calibrate(tmp_path / name, *A)
    adapters = [Adapter.load(tmp_path / name) for name in "ab"]
    assert all(adapter.nbytes > tiny.make_adapter(0).nbytes + 1000 for adapter in adapters)
    sizes = [adapter.nbytes for adapter in adapters]
    merges = worker(limit=sum(sizes) - 1)
    first = captured(merges, "one", [], str(tmp_path / "a"))
    assert first["nbytes"] == first["held"] == sizes[0]
    assert captured(merges, "one", [first["key"]], str(tmp_path / "b"))["kind"] == "full"
    (tmp_path / "b" / CALIBRATION_NAME).unlink()
    assert captured(merges, "one", [first["key"]], str(tmp_path / "b"))["ok"]
    unread = captured(worker(limit=plain + 100), "one", [], str(tmp_path / "a"))
    assert "the adapter takes" in unread["error"]
