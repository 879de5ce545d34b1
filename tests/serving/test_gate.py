"""The gate and the worker behind it, without a server: identities, preparation, limits."""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import load_file, save_file

import tiny
from gates import FolderAdapters, captured, gate_with, prepared, register, worker
from merged_lora.errors import MergeError, SpecError, UnknownAdapterError
from merged_lora.spec import parse
from merged_lora.vllm_plugin.api_server.gate import BusyError, Lease, MergeGate
from merged_lora.vllm_plugin.identity import FIRST_ID, MergeIdentity
from merged_lora.vllm_plugin.rpc import Reply, agreed

CONTENTS = ("0" * 32, "1" * 32)
ME = Lease()
"""A request that lasts as long as the tests run."""


def test_name_path_and_id_hold_the_digest_and_no_text_of_the_client() -> None:
    merge = MergeIdentity(parse("ties(a, b)"), CONTENTS)
    assert merge.name == f"merged-lora:{merge.digest}"
    assert merge.digest in merge.path
    assert FIRST_ID <= merge.number < 2 * FIRST_ID


def test_other_rule_weight_or_content_is_another_identity() -> None:
    merges = [
        MergeIdentity(parse("ties(a, b)"), CONTENTS),
        MergeIdentity(parse("ties(a, b, density=0.4)"), CONTENTS),
        MergeIdentity(parse("ties(a, 0.5*b)"), CONTENTS),
        MergeIdentity(parse("ties(a, b)"), CONTENTS[::-1]),
    ]
    assert len({m.name for m in merges}) == len({m.number for m in merges}) == len(merges)


def test_a_path_round_trips_whatever_the_names_hold() -> None:
    spec = parse(r'sum(0.1*"a&b=c?#, ü%20 +", -1e-7*"merged-lora:x")')
    merge = MergeIdentity(spec, CONTENTS)
    assert MergeIdentity.from_path(merge.path) == merge


@pytest.mark.parametrize("change", [("ties", "linear"), ("0" * 32, "2" * 32), ("merged-lora:", "merged:")])
def test_a_forged_path_is_refused(change: tuple[str, str]) -> None:
    path = MergeIdentity(parse("ties(a, b)"), CONTENTS).path
    with pytest.raises(SpecError):
        MergeIdentity.from_path(path.replace(*change))


async def two_sources(gate: MergeGate, folder: Path) -> None:
    """Register ``a`` and ``b``."""
    await register(gate, "a", folder, 1)
    await register(gate, "b", folder, 2)


def test_the_worker_answers_instead_of_raising(tmp_path: Path) -> None:
    merges = worker()
    lost = captured(merges, "one", [], str(tmp_path / "nowhere"))
    assert (lost["ok"], lost["kind"]) == (False, "user")
    unknown = prepared(merges, MergeIdentity(parse("ties(a, b)"), CONTENTS).path)
    assert (unknown["ok"], unknown["kind"]) == (False, "unknown")
    assert prepared(merges, "nonsense")["ok"] is False
    assert merges.release("one", None)["ok"] is False  # type: ignore[arg-type]


def test_a_fault_of_ours_is_answered_too() -> None:
    class Broken(FolderAdapters):
        def find(self, path: str) -> Path:
            raise ZeroDivisionError("ours")

    reply = captured(worker(adapters=Broken()), "one", [], "x")
    assert (reply["ok"], reply["kind"]) == (False, "internal")
    assert "ZeroDivisionError" in reply["error"]


def test_ranks_that_disagree_fail_the_request() -> None:
    good, other = Reply(ok=True, key="0", held=1), Reply(ok=True, key="1", held=1)
    bad = Reply(ok=False, kind="user", error="rank 1 says no")
    assert agreed([good, good])["held"] == 2
    assert agreed([good, bad]) == bad
    assert not agreed([good, other])["ok"]
    ranks = [good | {"facts": {"seconds": 1.0, "nbytes": 5}}, good | {"facts": {"seconds": 2.0, "nbytes": 3}}]
    assert agreed(ranks)["facts"] == {"seconds": 2.0, "nbytes": 5}


def test_a_component_reloaded_with_other_content_is_a_new_identity(tmp_path: Path) -> None:
    async def run() -> None:
        merges = worker()
        gate = gate_with(merges)
        await two_sources(gate, tmp_path)
        before = (await gate.ready(parse("ties(a, b)"), ME)).identity
        old = merges.load_merge(before.path)
        await register(gate, "a", tmp_path, 3)
        after = (await gate.ready(parse("ties(a, b)"), ME)).identity
        assert after.name != before.name
        assert merges.load_merge(after.path).digest != old.digest
        assert (
            merges.load_merge(before.path).digest == old.digest
        )  # a request in flight keeps what it began with

    asyncio.run(run())


def test_requests_at_a_time_prepare_a_merge_once(tmp_path: Path) -> None:
    async def run() -> None:
        calls: list[str] = []
        gate = gate_with(worker(), calls)
        await two_sources(gate, tmp_path)
        await asyncio.gather(*(gate.ready(parse("ties(a, b)"), ME) for _ in range(20)))
        assert len(calls) == 1

    asyncio.run(run())


def test_all_who_wait_for_a_merge_get_its_one_failure(tmp_path: Path) -> None:
    async def run() -> None:
        calls: list[str] = []
        gate = gate_with(worker(), calls)
        await register(gate, "a", tmp_path, 1, rank=4)
        await register(gate, "b", tmp_path, 1, rank=8)
        waiting = (gate.ready(parse("ties(a, b)"), ME) for _ in range(20))
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(outcome, MergeError) for outcome in outcomes)
        assert len(calls) == 1

    asyncio.run(run())


def test_a_client_that_leaves_does_not_take_the_merge_with_it(tmp_path: Path) -> None:
    async def run() -> None:
        gate = gate_with(worker())
        await register(gate, "a", tmp_path, 1)
        first = asyncio.create_task(gate.ready(parse("sum(a)"), ME))
        await asyncio.sleep(0)
        second = asyncio.create_task(gate.ready(parse("sum(a)"), ME))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).identity.spec == parse("sum(a)")

    asyncio.run(run())


def test_two_merges_never_share_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MergeIdentity, "number", FIRST_ID)

    async def run() -> None:
        merges = worker()
        gate, other = gate_with(merges), gate_with(merges)
        for server in (gate, other):
            await register(server, "a", tmp_path, 1)
        first, second = parse("sum(a)"), parse("sum(0.5*a)")
        outcomes = await asyncio.gather(gate.ready(first, ME), gate.ready(second, ME), return_exceptions=True)
        assert isinstance(outcomes[1], MergeError)
        with pytest.raises(MergeError, match="taken by another"):
            await gate.ready(second, ME)
        with pytest.raises(MergeError, match="taken by another"):
            await other.ready(second, ME)  # the worker knows what the other server asked for

    asyncio.run(run())


def test_a_merge_that_another_api_server_asked_for_is_not_made_again(tmp_path: Path) -> None:
    async def run() -> None:
        merges = worker()
        for server in (gate_with(merges), gate_with(merges)):
            await register(server, "a", tmp_path, 1)
            live = await server.ready(parse("sum(a)"), ME)
        assert prepared(merges, live.identity.path, [live.identity.digest])["made"] is False

    asyncio.run(run())


def test_an_adapter_that_cannot_be_merged_is_served_and_says_why(tmp_path: Path) -> None:
    async def run() -> None:
        merges = worker()
        gate = gate_with(merges)
        tiny.make_adapter(1).save(tmp_path / "a")
        weights = tmp_path / "a" / "adapter_model.safetensors"
        save_file(load_file(weights) | {"base_model.model.score.weight": torch.ones(2, 2)}, weights)
        async with gate.sources.changes:
            await gate.sources.serve("a", await gate.sources.copy(str(tmp_path / "a"), {}))
        with pytest.raises(MergeError, match=r"'a' is served, but cannot be merged.*score.weight"):
            await gate.ready(parse("sum(a)"), ME)
        assert merges.load_plain(str(tmp_path / "a"), 5) is not None

    asyncio.run(run())


def test_an_alias_must_be_new_and_its_sources_known() -> None:
    async def run() -> None:
        gate = gate_with(worker())
        with pytest.raises(MergeError, match=r"mix.*unknown adapter 'a'"):
            await gate.check_aliases([])
        with pytest.raises(MergeError, match="mix: 'mix' is already served, as a base model; choose"):
            await gate.check_aliases(["mix"])

    asyncio.run(run())


def test_a_forgotten_adapter_is_unknown_and_its_copy_is_dropped(tmp_path: Path) -> None:
    async def run() -> None:
        gate = gate_with(worker())
        await register(gate, "a", tmp_path, 1)
        assert gate.sources.held == tiny.make_adapter(1).nbytes
        async with gate.sources.changes:
            await gate.sources.forget("a")
        assert gate.sources.held == 0
        with pytest.raises(UnknownAdapterError):
            gate.identify(parse("sum(a)"))

    asyncio.run(run())


def test_the_copies_of_a_merge_under_way_stay_until_its_request_ends(tmp_path: Path) -> None:
    async def run() -> None:
        merges = worker()
        gate = gate_with(merges)
        await two_sources(gate, tmp_path)
        request = Lease()
        path = (await gate.ready(parse("ties(a, b)"), request)).identity.path
        expected = merges.load_merge(path).digest
        async with gate.sources.changes:
            await gate.sources.forget("a")
        assert merges.load_merge(path).digest == expected  # made again
        del request
        async with gate.sources.changes:
            await gate.sources.forget("b")
        assert gate.sources.held == 0

    asyncio.run(run())


def test_an_adapter_under_way_is_served_from_memory_after_it_was_unloaded(tmp_path: Path) -> None:
    async def run() -> None:
        merges = worker()
        gate = gate_with(merges)
        await register(gate, "a", tmp_path, 1)
        request = Lease()
        gate.sources.hold("a", request)
        async with gate.sources.changes:
            await gate.sources.forget("a")
        shutil.rmtree(tmp_path / "a")
        assert merges.load_plain(str(tmp_path / "a"), 5) is not None
        del request
        await register(gate, "b", tmp_path, 2)
        assert merges.load_plain(str(tmp_path / "a"), 5) is None

    asyncio.run(run())


def test_two_names_of_one_content_share_one_copy(tmp_path: Path) -> None:
    async def run() -> None:
        gate = gate_with(worker())
        await register(gate, "a", tmp_path, 1)
        await register(gate, "b", tmp_path, 1)
        assert gate.sources.held == tiny.make_adapter(1).nbytes

    asyncio.run(run())


# Limits


def test_a_copy_that_does_not_fit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    async def run() -> None:
        size = tiny.make_adapter(1).nbytes
        gate = gate_with(worker(limit=size + size // 2))
        await register(gate, "a", tmp_path, 1)
        with pytest.raises(MergeError, match="--merged-lora-cache-gib"):
            await register(gate, "b", tmp_path, 2)
        assert set(gate.sources.components) == {"a"}
        assert gate.sources.held == size

    asyncio.run(run())


def test_the_gate_remembers_a_bounded_number_of_merges(tmp_path: Path) -> None:
    async def run() -> None:
        calls: list[str] = []
        registry = CollectorRegistry()
        gate = gate_with(worker(), calls, registry, max_ad_hoc=7)
        await register(gate, "a", tmp_path, 1, only="layers.0.self_attn.k_proj")
        for i in range(9):  # one more than merges without an alias and aliases together
            await gate.ready(parse(f"sum({1 + i}*a)"), Lease())
        await gate.ready(parse("sum(9*a)"), Lease())
        await asyncio.sleep(0)
        assert len(calls) == 9
        assert len(gate.merges) == 8
        assert registry.get_sample_value("merged_lora_evictions_total", {"what": "merge"}) == 1
        await gate.ready(parse("sum(10*a)"), Lease())  # the worker hears that the oldest was forgotten
        await gate.ready(parse("sum(a)"), Lease())
        assert len(calls) == 11
        assert registry.get_sample_value("merged_lora_made_again_total") == 1

    asyncio.run(run())


def test_no_ad_hoc_merges_means_aliases_alone(tmp_path: Path) -> None:
    async def run() -> None:
        gate = gate_with(worker(), max_ad_hoc=0)
        await two_sources(gate, tmp_path)
        assert gate.asked_for("mix", None, lambda name: False) == parse("ties(a, b)")
        for model, body in (("sum(a)", None), ("base", {"ids": ["a"]})):
            with pytest.raises(SpecError, match="but its aliases: mix"):
                gate.asked_for(model, body, lambda name: name == "base")
        many = gate_with(worker(), max_ad_hoc=0, aliases={f"mix{i}": parse("ties(a, b)") for i in range(40)})
        with pytest.raises(SpecError, match=r"aliases: mix0, .* and 35 more$"):
            many.asked_for("sum(a)", None, lambda name: False)

    asyncio.run(run())


def test_a_merge_of_some_modules_holds_these_and_nothing_else(tmp_path: Path) -> None:
    async def run() -> None:
        merges = worker()
        gate = gate_with(merges)
        await two_sources(gate, tmp_path)
        whole = await gate.ready(parse("ties(a, b)"), ME)
        for model in ('ties(a, b, modules="*.self_attn.*")', "ties(a + b; modules self_attn)"):
            spec = gate.asked_for(model, None, lambda name: False)
            assert spec is not None
            live = await gate.ready(spec, ME)
            made = merges.load_merge(live.identity.path)
            assert made.modules.keys() == {name for name in tiny.MODULES if "self_attn" in name}
            assert live.facts.modules == len(made.modules)
            assert live.facts.nbytes == made.nbytes < whole.facts.nbytes
        with pytest.raises(MergeError, match=r"no module of the sources matches 'self_atn'; near: model\."):
            await gate.ready(parse("sum(a, modules=self_atn)"), ME)

    asyncio.run(run())


def test_what_a_user_should_know_of_a_merge_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        gate = gate_with(worker())
        await two_sources(gate, tmp_path)
        await register(gate, "idle", tmp_path, 3, scaling=0.0)
        for _ in range(3):
            await gate.ready(parse("sum(a, idle)"), ME)

    asyncio.run(run())
    words = "sum(a, idle): the delta of idle is zero, because its scaling is 0 (lora_alpha)"
    assert [record.getMessage() for record in caplog.records].count(words) == 1


def test_long_specs_and_many_sources_are_refused() -> None:
    gate = gate_with(worker(), max_spec_length=40, max_sources=3)
    for model, words in (
        ("sum(" + "a" * 40 + ")", "45 characters; at most 40"),
        ("sum(a, b, c, d)", "4 sources; this server merges at most 3"),
        ("sum" + " " * 50 + "(a)", "at most 40"),
    ):
        with pytest.raises(SpecError, match=words):
            gate.asked_for(model, None, lambda name: False)
    with pytest.raises(SpecError, match="4 sources"):
        gate.asked_for("base", {"ids": ["a", "b", "c", "d"]}, lambda name: True)
    with pytest.raises(SpecError, match="characters; at most 40"):
        gate.asked_for("base", {"ids": ["a" * 50]}, lambda name: True)


@pytest.mark.parametrize(
    ("spec", "factor"),
    [
        ("1e30*a", "1e+30"),
        ("a + b - 1000001*c", "1000001"),
        ("knots(2*a, b, scale=-500001)", "1000002"),
        ("dare_linear(a, b, density=[0.5, 0.0001])", f"{float(np.float32(65536 / 7)) ** 2:.7g}"),
        ("dare_linear_svd(2*a, b, density=0.000001, scale=20)", "2621440"),
        ("della_svd(a, b, density=0.0002, epsilon=0.00019, scale=100)", "6553600"),
        # Shares are whole 65536ths: 25304 - 25239 of them, and 11029 - 11028.
        ("della(a, b, density=0.386116, epsilon=0.3851094)", f"{(65536 / 65) ** 2:.7g}"),
        ("della(a, b, density=0.1682961, epsilon=0.1682667)", f"{65536**2:.7g}"),
        ("ties(a, -0.9999998*b, normalize=true)", "5000000"),
        ("karcher(a, -0.9999998*b)", "5000000"),
        ("linear(1001*a, compat=lorax)", "1002001"),
        ("linear(1e30*a, scale=9e-28, compat=lorax)", "9e+32"),
    ],
)
def test_what_a_client_may_amplify_has_a_bound(spec: str, factor: str) -> None:
    message = f"multiplies a source by {re.escape(factor)}; this server multiplies by at most 1000000"
    with pytest.raises(SpecError, match=message):
        gate_with(worker()).asked_for(spec, None, lambda name: False)
    assert gate_with(worker(), max_strength=1e33).asked_for(spec, None, lambda name: False) == parse(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "1e6*a",
        "sum(1e30*a, scale=1e-24)",
        "0*a + b",
        "ties(a, -b, density=0.0001)",
        "della(a, b, density=[1.0, 0.5], epsilon=0.4)",
    ],
)
def test_what_is_not_amplified_beyond_is_served(spec: str) -> None:
    assert gate_with(worker()).asked_for(spec, None, lambda name: False) == parse(spec)


def test_one_new_merge_too_many_is_told_when_to_come_back(tmp_path: Path) -> None:
    async def run() -> None:
        registry = CollectorRegistry()
        gate = gate_with(worker(), registry=registry, max_waiting=2)
        await register(gate, "a", tmp_path, 1)
        asked = (gate.ready(parse(f"sum({1 + i}*a)"), ME) for i in range(5))
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        busy = [outcome for outcome in outcomes if isinstance(outcome, BusyError)]
        assert len(busy) == 2  # one is made, two wait
        assert all(error.seconds >= 1 for error in busy)
        labels = {"strategy": "sum", "result": "busy"}
        assert registry.get_sample_value("merged_lora_merges_total", labels) == 2
        await gate.ready(parse("sum(5*a)"), ME)

    asyncio.run(run())
