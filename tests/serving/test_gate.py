"""The name gate and the worker's side of it, without a server: identity, pre-flight, bounds."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import tiny
from merged_lora.adapters import Adapter
from merged_lora.backends import load_backend
from merged_lora.errors import MergeError, SpecError, UnknownAdapterError
from merged_lora.spec import parse
from merged_lora.vllm_plugin.identity import FIRST_ID, MergeIdentity
from merged_lora.vllm_plugin.makers import HostMaker
from merged_lora.vllm_plugin.server import KNOWN_MERGES, MergeGate
from merged_lora.vllm_plugin.settings import Settings, parse_alias, parse_gib
from merged_lora.vllm_plugin.worker import MergeWorker, Reply, agreed

CONTENTS = ("0" * 32, "1" * 32)


def worker() -> MergeWorker[Adapter]:
    """A worker that takes adapters for vLLM's models."""
    return MergeWorker(16, str, HostMaker(load_backend("auto"), lambda _, adapter: adapter))


def gate_with(merges: MergeWorker[Adapter], calls: list[str] | None = None) -> MergeGate:
    """A gate in front of one worker in this process."""

    async def capture(path: str) -> Reply:
        return agreed([merges.capture(path)])

    async def prepare(path: str) -> Reply:
        if calls is not None:
            calls.append(path)
        await asyncio.sleep(0)
        return agreed([merges.prepare(path, set())])

    return MergeGate({"mix": parse("ties(a, b)")}, capture, prepare)


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


def test_the_worker_answers_instead_of_raising(tmp_path: Path) -> None:
    merges = worker()
    lost = merges.capture(str(tmp_path / "nowhere"))
    assert (lost["ok"], lost["kind"]) == (False, "user")
    unknown = merges.prepare(MergeIdentity(parse("ties(a, b)"), CONTENTS).path, set())
    assert (unknown["ok"], unknown["kind"]) == (False, "unknown")
    assert merges.prepare("nonsense", set())["ok"] is False


def test_a_fault_of_ours_is_answered_too() -> None:
    def broken(path: str) -> str:
        raise ZeroDivisionError("ours")

    maker = HostMaker(load_backend("auto"), lambda _, adapter: adapter)
    merges = MergeWorker(16, broken, maker)
    reply = merges.capture("x")
    assert (reply["ok"], reply["kind"]) == (False, "internal")
    assert "ZeroDivisionError" in reply["error"]


def test_ranks_that_disagree_fail_the_request() -> None:
    good, other = Reply(ok=True, digest="0"), Reply(ok=True, digest="1")
    bad = Reply(ok=False, kind="user", error="rank 1 says no")
    assert agreed([good, good])["ok"]
    assert agreed([good, bad]) == bad
    assert not agreed([good, other])["ok"]


def test_a_component_reloaded_with_other_content_is_a_new_identity(tmp_path: Path) -> None:
    async def run() -> None:
        merges = worker()
        gate = gate_with(merges)
        for name, seed in (("a", 1), ("b", 2)):
            tiny.make_adapter(seed).save(tmp_path / name)
            await gate.register(name, str(tmp_path / name))
        before = await gate.ready(parse("ties(a, b)"))
        old = merges.take(before.path)
        tiny.make_adapter(3).save(tmp_path / "a", overwrite=True)
        await gate.register("a", str(tmp_path / "a"))
        after = await gate.ready(parse("ties(a, b)"))
        assert after.name != before.name
        assert merges.take(after.path).digest != old.digest
        assert merges.take(before.path).digest == old.digest  # a request in flight keeps what it began with

    asyncio.run(run())


def test_requests_at_a_time_prepare_a_merge_once(tmp_path: Path) -> None:
    async def run() -> None:
        calls: list[str] = []
        gate = gate_with(worker(), calls)
        for name, seed in (("a", 1), ("b", 2)):
            tiny.make_adapter(seed).save(tmp_path / name)
            await gate.register(name, str(tmp_path / name))
        spec = parse("ties(a, b)")
        await asyncio.gather(*(gate.ready(spec) for _ in range(20)))
        assert len(calls) == 1

    asyncio.run(run())


def test_all_who_wait_for_a_merge_get_its_one_failure(tmp_path: Path) -> None:
    async def run() -> None:
        calls: list[str] = []
        gate = gate_with(worker(), calls)
        for name, rank in (("a", 4), ("b", 8)):
            tiny.make_adapter(1, rank).save(tmp_path / name)
            await gate.register(name, str(tmp_path / name))
        spec = parse("ties(a, b)")
        outcomes = await asyncio.gather(*(gate.ready(spec) for _ in range(20)), return_exceptions=True)
        assert all(isinstance(outcome, MergeError) for outcome in outcomes)
        assert len(calls) == 1

    asyncio.run(run())


def test_a_client_that_leaves_does_not_take_the_merge_with_it(tmp_path: Path) -> None:
    async def run() -> None:
        gate = gate_with(worker())
        tiny.make_adapter(1).save(tmp_path / "a")
        await gate.register("a", str(tmp_path / "a"))
        first = asyncio.create_task(gate.ready(parse("sum(a)")))
        await asyncio.sleep(0)
        second = asyncio.create_task(gate.ready(parse("sum(a)")))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).spec == parse("sum(a)")

    asyncio.run(run())


def test_two_merges_never_share_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MergeIdentity, "number", FIRST_ID)

    async def run() -> None:
        merges = worker()
        gate, other = gate_with(merges), gate_with(merges)
        tiny.make_adapter(1).save(tmp_path / "a")
        for server in (gate, other):
            await server.register("a", str(tmp_path / "a"))
        first, second = parse("sum(a)"), parse("sum(0.5*a)")
        outcomes = await asyncio.gather(gate.ready(first), gate.ready(second), return_exceptions=True)
        assert isinstance(outcomes[1], MergeError)
        with pytest.raises(MergeError, match="taken by another"):
            await gate.ready(second)
        with pytest.raises(MergeError, match="taken by another"):
            await other.ready(second)  # the worker knows what the other server asked for

    asyncio.run(run())


def test_the_gate_remembers_a_bounded_number_of_merges(tmp_path: Path) -> None:
    async def run() -> None:
        calls: list[str] = []
        gate = gate_with(worker(), calls)
        tiny.make_adapter(1, only="layers.0.self_attn.k_proj").save(tmp_path / "a")
        await gate.register("a", str(tmp_path / "a"))
        for i in range(KNOWN_MERGES + 1):
            await gate.ready(parse(f"sum({1 + i}*a)"))
        await gate.ready(parse(f"sum({1 + KNOWN_MERGES}*a)"))
        assert len(calls) == KNOWN_MERGES + 1
        await gate.ready(parse("sum(1*a)"))  # the oldest was forgotten, and is prepared again
        assert len(calls) == KNOWN_MERGES + 2

    asyncio.run(run())


def test_an_adapter_that_cannot_be_merged_says_why(tmp_path: Path) -> None:
    async def run() -> None:
        gate = gate_with(worker())
        tiny.make_adapter(1).save(tmp_path / "a")
        config = tmp_path / "a" / "adapter_config.json"
        config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
        await gate.register("a", str(tmp_path / "a"))
        with pytest.raises(MergeError, match=r"cannot be merged.*use_dora"):
            gate.identify(parse("sum(a)"))

    asyncio.run(run())


def test_an_alias_must_be_new_and_its_sources_known(tmp_path: Path) -> None:
    async def run() -> None:
        gate = gate_with(worker())
        with pytest.raises(MergeError, match=r"mix.*unknown adapter 'a'"):
            gate.check_aliases([])
        with pytest.raises(MergeError, match="mix: this name is already served"):
            gate.check_aliases(["mix"])

    asyncio.run(run())


def test_a_forgotten_adapter_is_unknown(tmp_path: Path) -> None:
    async def run() -> None:
        gate = gate_with(worker())
        tiny.make_adapter(1).save(tmp_path / "a")
        await gate.register("a", str(tmp_path / "a"))
        gate.forget("a")
        with pytest.raises(UnknownAdapterError):
            gate.identify(parse("sum(a)"))

    asyncio.run(run())


def test_settings_travel_and_leave_the_aliases_behind() -> None:
    config = {"merged_lora": {"enable": True, "aliases": {"mix": "ties(b, a)"}}}
    settings = Settings.of(config)
    assert settings.enable
    assert str(settings.aliases["mix"]) == "ties(a, b)"
    assert settings.to_config(aliases=False) == {"enable": True}
    assert Settings.of({"merged_lora": settings.to_config(aliases=True)}) == settings
    device = Settings.of({"merged_lora": {"enable": True, "backend": "triton", "gpu_gib": 2}})
    assert (device.backend, device.gpu_gib) == ("triton", 2.0)
    assert Settings.of({"merged_lora": device.to_config(aliases=False)}) == device
    assert (settings.backend, settings.gpu_gib) == ("auto", 1.0)
    assert not Settings.of({}).enable
    assert not Settings.of(None).enable


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"enabled": True}, "takes"),
        ({"enable": "yes"}, "true or false"),
        ({"aliases": ["mix"]}, "an object"),
        ({"aliases": {"mix": 7}}, "'mix'"),
        (5, "takes"),
        ({"backend": "cuda"}, "one of auto, triton, cpu, numpy, got 'cuda'"),
        ({"backend": ["triton"]}, "one of auto"),
        ({"gpu_gib": 0}, "above 0, got '0'"),
        ({"gpu_gib": "1"}, "a number"),
        ({"gpu_gib": True}, "a number"),
        ({"gpu_gib": float("nan")}, "above 0"),
    ],
)
def test_malformed_settings_are_refused(given: object, words: str) -> None:
    with pytest.raises(MergeError, match=words):
        Settings.of({"merged_lora": given})


@pytest.mark.parametrize("text", ["mix", "=ties(a, b)", "mix=ties(a", "../mix=ties(a, b)", "mix=nothing(a)"])
def test_a_malformed_alias_is_refused(text: str) -> None:
    with pytest.raises(MergeError):
        parse_alias(text)


def test_a_size_on_the_command_line_is_a_number_above_zero() -> None:
    assert parse_gib("0.5") == 0.5
    for text in ("0", "-1", "nan", "inf", "much"):
        with pytest.raises(MergeError, match="GiB"):
            parse_gib(text)
