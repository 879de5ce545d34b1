"""Sources that a request names by a location: what is allowed, fetched once, kept, looked for again."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

import tiny
from fetched import Site, hf_site, https_site, impatient, own_caches
from gates import gate_with, until, worker
from merged_lora.errors import (
    AdapterError,
    FetchError,
    ForbiddenError,
    MergeError,
    NotFoundError,
    UnknownAdapterError,
)
from merged_lora.files.layout import CONFIG_NAME, WEIGHTS_NAME
from merged_lora.locations import parse as parse_location
from merged_lora.spec import parse
from merged_lora.vllm_plugin.api_server import fetched
from merged_lora.vllm_plugin.api_server.gate import Lease, MergeGate
from merged_lora.vllm_plugin.api_server.routes import report, status_of
from stand_ins import Answer, Asked, Hub

ME = Lease()


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of fetched adapters, of this test alone."""
    return own_caches(tmp_path, monkeypatch)


@pytest.fixture
def site(caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A server with the adapters ``sql`` and ``chat``."""
    with https_site(tmp_path, monkeypatch) as site:
        for seed, name in enumerate(("sql", "chat"), 1):
            tiny.make_adapter(seed).save(tmp_path / name)
            site.put(name, tmp_path / name)
        yield site


def gate_for(site: Site, **settings: Any) -> MergeGate:
    """A gate that allows what is in the folder of a server."""
    return gate_with(worker(), **{"aliases": {}, "allow": (site.location("*"),), **settings})


def of(*locations: str) -> Any:
    """The sum of sources at these locations."""
    return parse(" + ".join(f'"{location}"' for location in locations))


def fetches(site: Site) -> int:
    """How often weights were fetched."""
    return len(site.server.asked_for(WEIGHTS_NAME))


def damage(cache: Path, name: str) -> None:
    """Let a file of the one adapter on disk hold something else."""
    (file,) = cache.glob(f"adapters/*/{name}")
    file.write_bytes(b"junk" + file.read_bytes()[4:])


def stalled(asked: Asked, answer: Answer) -> Answer:
    """An answer of which the weights stay out."""
    if asked.method == "GET" and asked.path.endswith(WEIGHTS_NAME):
        answer.cut, answer.stall = 100, True
    return answer


def test_a_location_that_is_allowed_is_a_source_and_fetched_once(site: Site) -> None:
    async def run() -> None:
        gate = gate_for(site)
        spec = parse(f"sum({site.location('sql')}, 0.5*{site.location('chat')})")
        assert gate.asked_for(str(spec), None, lambda name: False) == spec
        found = await asyncio.gather(*(gate.ready(spec, ME) for _ in range(8)))
        digests = {tiny.make_adapter(1).digest, tiny.make_adapter(2).digest}
        assert all(set(live.identity.contents) == digests for live in found)
        assert fetches(site) == 2
        await gate.ready(of(site.location("sql")), ME)
        assert fetches(site) == 2

    asyncio.run(run())


def test_what_no_pattern_allows_is_forbidden_and_nothing_is_asked(site: Site) -> None:
    async def run() -> None:
        for allow in ((), ("hf:org/*", "https://localhost:1/*")):
            gate = gate_for(site, allow=allow)
            with pytest.raises(ForbiddenError, match=site.location("sql")) as refused:
                await gate.ready(of(site.location("sql")), ME)
            assert status_of(refused.value)[0] == 403
            with pytest.raises(ForbiddenError):
                async with gate.sources.folder_of(site.location("sql"), trusted=False):
                    pass
        assert not site.server.asked

    asyncio.run(run())


@pytest.mark.parametrize("name", ["HTTPS://localhost:1/sql", "http://localhost:1/sql", "org/sql"])
def test_a_name_that_is_nearly_a_location_is_unknown_with_what_to_write(site: Site, name: str) -> None:
    async def run() -> None:
        with pytest.raises(UnknownAdapterError, match=r"write (https://localhost:1|hf:org)/sql$"):
            await gate_for(site).ready(of(name), ME)
        with pytest.raises(UnknownAdapterError, match=r"none is known$"):
            await gate_for(site, allow=()).ready(of(name), ME)

    asyncio.run(run())


def test_of_many_patterns_a_few_are_shown(site: Site) -> None:
    gate = gate_for(site, allow=tuple(f"hf:org{i}/*" for i in range(20)))
    with pytest.raises(ForbiddenError, match=r"only hf:org0/\*, .* and 15 more$"):
        gate.sources.fetches.allowed(site.location("sql"))


def test_one_place_has_one_name(site: Site) -> None:
    async def run() -> None:
        gate = gate_for(site)
        for location in (site.location("sql/"), site.location("sql").replace("localhost", "LOCALHOST")):
            with pytest.raises(AdapterError, match=f"is written '{site.location('sql')}'"):
                await gate.ready(of(location), ME)
        assert not site.server.asked

    asyncio.run(run())


def test_what_is_not_there_is_not_found_and_not_asked_for_again_at_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        gate = gate_for(site)
        for _ in range(3):
            with pytest.raises(NotFoundError) as refused:
                await gate.ready(of(site.location("none")), ME)
            assert status_of(refused.value)[0] == 404
        assert len(site.server.asked) == 1
        monkeypatch.setattr(fetched, "QUIET", 0.0)
        with pytest.raises(NotFoundError):
            await gate.ready(of(site.location("none")), ME)
        assert len(site.server.asked) == 2

    asyncio.run(run())


def test_a_source_that_takes_long_is_503_and_comes_in_all_the_same(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        gate = gate_for(site, fetch_seconds=0.2)
        site.server.fault = stalled
        began = time.monotonic()
        with pytest.raises(FetchError, match=r"on its way, .* ask again in 10 s") as refused:
            await gate.ready(of(site.location("sql"), site.location("chat")), ME)
        assert time.monotonic() - began < 5  # both wait for the same time, and the loop was free meanwhile
        assert (status_of(refused.value)[0], refused.value.seconds) == (503, 10)
        assert {each["location"] for each in report(gate)["fetching"]} == {
            site.location("sql"),
            site.location("chat"),
        }
        site.server.fault = lambda asked, answer: answer
        site.server.released.set()
        await until(lambda: not report(gate)["fetching"])
        await gate.ready(of(site.location("sql"), site.location("chat")), ME)

    asyncio.run(run())


def test_the_server_goes_on_while_a_source_comes_in(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        gate = gate_for(site)
        site.server.fault = lambda asked, answer: stalled(asked, answer) if "/sql/" in asked.path else answer
        waiting = asyncio.create_task(gate.ready(of(site.location("sql")), ME))
        await gate.ready(of(site.location("chat")), ME)
        assert not waiting.done()
        waiting.cancel()  # its client leaves, and the fetch goes on
        await asyncio.sleep(0)
        assert report(gate)["fetching"]
        site.server.released.set()
        site.server.fault = lambda asked, answer: answer
        await until(lambda: not report(gate)["fetching"])
        assert site.location("sql") in gate.sources.components

    asyncio.run(run())


def test_a_fetch_that_fails_fails_all_who_wait_for_it(site: Site) -> None:
    async def run() -> None:
        gate = gate_for(site)
        site.server.fault = lambda asked, answer: Answer(500)
        found = await asyncio.gather(
            *(gate.ready(of(site.location("sql")), ME) for _ in range(4)), return_exceptions=True
        )
        assert [type(error) for error in found] == [FetchError] * 4
        assert not list(gate.sources.components)

    asyncio.run(run())


def test_only_so_many_sources_may_be_on_their_way(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        gate = gate_for(site, max_waiting=1, fetch_seconds=0.0)
        site.server.fault = stalled
        for number in range(fetched.AT_A_TIME + 1):
            tiny_location = site.location(f"sql{number}")
            site.server.files |= {
                path.replace("/sql/", f"/sql{number}/"): body
                for path, body in site.server.files.items()
                if "/sql/" in path
            }
            with pytest.raises(FetchError, match="on its way"):
                await gate.ready(of(tiny_location), ME)
        with pytest.raises(FetchError, match="5 other sources are on their way"):
            await gate.ready(of(site.location("chat")), ME)
        await until(lambda: fetches(site) == fetched.AT_A_TIME)
        site.server.released.set()
        site.server.fault = lambda asked, answer: answer
        await until(lambda: not report(gate)["fetching"])

    asyncio.run(run())


def test_a_source_that_changed_is_another_one_after_a_while_and_no_request_waits_for_that(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        gate, spec = gate_for(site), of(site.location("sql"))
        first = await gate.ready(spec, ME)
        tiny.make_adapter(9).save(tmp_path / "other")
        site.put("sql", tmp_path / "other")
        assert (await gate.ready(spec, ME)).identity == first.identity
        assert fetches(site) == 1
        monkeypatch.setattr(fetched, "RECHECK", 0.0)
        assert (await gate.ready(spec, ME)).identity == first.identity
        await until(lambda: not report(gate)["fetching"])
        monkeypatch.setattr(fetched, "RECHECK", 300.0)
        assert (await gate.ready(spec, ME)).identity.contents == (tiny.make_adapter(9).digest,)

    asyncio.run(run())


def test_a_source_that_is_gone_or_out_of_reach_stays_in_memory_and_the_log_says_so(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        gate, spec = gate_for(site), of(site.location("sql"))
        first = await gate.ready(spec, ME)
        monkeypatch.setattr(fetched, "RECHECK", 0.0)
        for status in (404, 500):
            monkeypatch.setattr(fetched, "QUIET", 0.0)

            def failing(asked: Asked, answer: Answer, status: int = status) -> Answer:
                return Answer(status)

            site.server.fault = failing
            with caplog.at_level(logging.WARNING, "vllm.merged_lora"):
                assert (await gate.ready(spec, ME)).identity == first.identity
                await until(lambda: not report(gate)["fetching"])
            assert f"its copy in memory stays: {site.location('sql')}" in caplog.text
            caplog.clear()
        assert (await gate.ready(spec, ME)).identity == first.identity

    asyncio.run(run())


def test_a_commit_is_never_looked_for_again(
    caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetched, "RECHECK", 0.0)

    async def run(site: Site) -> None:
        assert isinstance(site.server, Hub)
        tiny.make_adapter(1).save(tmp_path / "sql")
        location = f"{site.put('sql', tmp_path / 'sql')}@{site.server.commit}"
        gate = gate_with(worker(), aliases={}, allow=("hf:org/*@*",))
        await gate.ready(of(location), ME)
        asked = len(site.server.asked)
        await gate.ready(of(location), ME)
        await asyncio.sleep(0.05)
        assert len(site.server.asked) == asked

    with hf_site(monkeypatch) as site:
        asyncio.run(run(site))


def test_a_source_over_the_memory_for_copies_is_refused_before_its_weights_come_in(site: Site) -> None:
    async def run() -> None:
        gate = gate_for(site, cache_gib=1e-6)
        with pytest.raises(AdapterError, match="its operator can raise --merged-lora-cache-gib"):
            await gate.ready(of(site.location("sql")), ME)
        assert not fetches(site)

    asyncio.run(run())


@pytest.mark.parametrize("name", [WEIGHTS_NAME, CONFIG_NAME])
def test_a_damaged_copy_on_disk_is_removed_and_the_next_use_fetches_it_again(
    site: Site, caches: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    async def run() -> None:
        spec = of(site.location("sql"))
        await gate_for(site).ready(spec, ME)
        damage(caches, name)
        gate = gate_for(site)  # of a server that starts later, with nothing in memory
        for _ in range(2):  # the second time within the while in which it is not tried again
            with pytest.raises(FetchError, match=f"^{site.location('sql')}: .* damaged and was removed; try"):
                await gate.ready(spec, ME)
        monkeypatch.setattr(fetched, "QUIET", 0.0)
        live = await gate.ready(spec, ME)
        assert live.identity.contents == (tiny.make_adapter(1).digest,)
        assert fetches(site) == 2 if name == WEIGHTS_NAME else 1

    asyncio.run(run())


def test_a_copy_on_disk_that_is_damaged_later_is_mended_while_the_one_in_memory_serves(
    site: Site, caches: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fetched, "QUIET", 0.0)
    monkeypatch.setattr(fetched, "RECHECK", 0.0)

    async def run() -> None:
        gate, spec = gate_for(site), of(site.location("sql"))
        first = await gate.ready(spec, ME)
        await until(lambda: not report(gate)["fetching"])
        damage(caches, WEIGHTS_NAME)
        for count in (1, 2):
            with caplog.at_level(logging.WARNING, "vllm.merged_lora"):
                assert (await gate.ready(spec, ME)).identity == first.identity
                await until(lambda: not report(gate)["fetching"])
            assert fetches(site) == count
            assert ("its copy in the cache was damaged and was removed" in caplog.text) == (count == 1)
            caplog.clear()

    asyncio.run(run())


def test_a_damaged_copy_of_an_adapter_that_vllm_would_load_is_removed(site: Site, caches: Path) -> None:
    async def run() -> None:
        gate = gate_for(site)
        await gate.ready(of(site.location("sql")), ME)
        damage(caches, WEIGHTS_NAME)
        with pytest.raises(FetchError, match="damaged and was removed"):
            async with gate.sources.folder_of(site.location("sql"), trusted=False) as folder:
                await gate.sources.copy(folder, {})
        async with gate.sources.folder_of(site.location("sql"), trusted=False) as folder:
            await gate.sources.copy(folder, {})

    asyncio.run(run())


def test_a_source_that_is_no_adapter_is_said_to_be_and_not_fetched_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetched, "QUIET", 0.0)
    site.server.files[f"{site.place('sql')}/{WEIGHTS_NAME}"] = b"no tensors"

    async def run() -> None:
        gate = gate_for(site)
        for _ in range(2):
            with pytest.raises(AdapterError, match=f"{site.location('sql')}' cannot be merged: ") as refused:
                await gate.ready(of(site.location("sql")), ME)
            assert status_of(refused.value)[0] == 400
        assert fetches(site) == 1

    asyncio.run(run())


def test_no_redirect_leaves_the_host(site: Site) -> None:
    async def run() -> None:
        gate = gate_for(site)
        site.server.fault = lambda asked, answer: Answer(302, {"Location": "https://127.0.0.1/x/sql/y"})
        with pytest.raises(FetchError, match=r"redirected to another host, '127.0.0.1'"):
            await gate.ready(of(site.location("sql")), ME)

    asyncio.run(run())


def test_copies_of_fetched_sources_make_room_for_each_other_and_come_back_from_the_disk(site: Site) -> None:
    async def run() -> None:
        size = tiny.make_adapter(1).nbytes
        registry = CollectorRegistry()
        gate = gate_with(worker(int(1.5 * size)), registry=registry, aliases={}, allow=(site.location("*"),))
        for name in ("sql", "chat", "sql", "chat"):
            live = await gate.ready(of(site.location(name)), Lease())
            assert live.identity.contents == (tiny.make_adapter({"sql": 1, "chat": 2}[name]).digest,)
        assert registry.get_sample_value("merged_lora_evictions_total", {"what": "source"}) == 3
        assert fetches(site) == 2

    asyncio.run(run())


def test_an_adapter_that_the_operator_names_by_a_location_is_a_folder_for_vllm(
    site: Site, tmp_path: Path
) -> None:
    async def run() -> None:
        gate = gate_for(site, allow=())
        async with gate.sources.folder_of(site.location("sql"), trusted=True) as folder:
            assert (Path(folder) / WEIGHTS_NAME).read_bytes() == (
                tmp_path / "sql" / WEIGHTS_NAME
            ).read_bytes()
        for path in (str(tmp_path / "sql"), "org/repo"):
            async with gate.sources.folder_of(path, trusted=False) as folder:
                assert folder == path  # vLLM's own business

    asyncio.run(run())


def test_an_alias_of_locations_is_fetched_when_the_server_starts(site: Site) -> None:
    async def run() -> None:
        mix = parse(f"ties({site.location('sql')}, {site.location('chat')})")
        gate = gate_for(site, aliases={"mix": mix}, fetch_seconds=0.0)
        await gate.check_aliases([])
        await gate.ready(mix, ME)
        with pytest.raises(MergeError, match=r"--merged-lora-modules mix: .* only hf:org/\*"):
            await gate_for(site, aliases={"mix": mix}, allow=("hf:org/*",)).check_aliases([])

    asyncio.run(run())


def test_a_location_is_the_name_of_a_source_in_a_spec_without_quotes(site: Site) -> None:
    for location in ("hf:org/repo/folder", "s3://bucket/a/b", site.location("sql")):
        assert parse(f"sum(0.5*{location}, b)").names == ("b", location)
        assert str(parse_location(location)) == location


@pytest.mark.slow
def test_in_chaos_every_request_gets_its_merge_or_a_reason_and_later_its_merge(
    site: Site, tmp_path: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetched, "QUIET", 0.0)
    monkeypatch.setattr(fetched, "RECHECK", 0.0)
    impatient(monkeypatch)
    chance = random.Random(0)
    other = tiny.make_adapter(3)
    other.save(tmp_path / "other")
    sql = {tiny.make_adapter(1).digest, other.digest}

    def fault(asked: Asked, answer: Answer) -> Answer:
        match chance.randrange(12):
            case 0:
                return Answer(500)
            case 1:
                return Answer(302, {"Location": "https://example.org/"})
            case 2:
                answer.cut = len(answer.body) // 2
            case 3:
                answer.cut, answer.stall = 10, True
            case 4:
                answer.headers["Content-Length"] = str(len(answer.body) + 7)
            case 5:
                answer.body = answer.body[:-1]
            case 6:
                site.put("sql", tmp_path / chance.choice(["sql", "other"]))
            case 7:
                return Answer(404)
        return answer

    async def run() -> None:
        gate = gate_for(site, fetch_seconds=0.5)
        site.server.fault = fault
        served = 0
        for _ in range(60):
            names = ("sql", "chat", "sql", "none")
            asked = [gate.ready(of(site.location(name)), Lease()) for name in names]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            for name, found in zip(names, answers, strict=True):
                if isinstance(found, MergeError):
                    assert site.location(name) in str(found)
                    continue
                assert not isinstance(found, BaseException), found
                allowed = sql if name == "sql" else {tiny.make_adapter(2).digest}
                assert set(found.identity.contents) <= allowed
                served += 1
        assert served
        site.server.fault = lambda asked, answer: answer
        await until(lambda: not report(gate)["fetching"])
        for name in ("sql", "chat"):
            await gate.ready(of(site.location(name)), Lease())

    asyncio.run(run())
    end = time.monotonic() + 30
    while any(thread.name == "merged-lora-fetch" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert not list(caches.glob(".made-*"))
