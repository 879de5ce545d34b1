"""Names and bodies that nobody would write lead to a merge or a clear error, and to nothing else."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from fetched import https_site, own_caches
from gates import gate_with, worker
from merged_lora.errors import MergeError
from merged_lora.spec import parse
from merged_lora.strategies import TABLE
from merged_lora.vllm_plugin.api_server.gate import Lease, MergeGate
from merged_lora.vllm_plugin.api_server.routes import report
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.rpc import Facts, Reply
from running import within_a_second
from vllm_server import Server

GENERATED, MUTATED, LOCATIONS, ASKED = 5_000, 5_000, 1_000, 500

SEEDS = (
    "ties(0.7*sql, 0.3*chat, density=0.5)",
    "0.7*sql + 0.3*chat - 0.2*tone",
    'dare_ties("sql", -1e-3*chat, density=[0.3, 0.7], seed=7, majority_sign_method="frequency")',
    "slerp(sql, chat, t=0.25)",
    'sum(sql, chat, modules="*.self_attn.* layers.0", without="q_proj")',
    "svd(sql, chat, tone, rank=4, normalize=true, scale=2)",
    '{"ids": ["sql", "chat"], "weights": [0.5, 1], "merge_strategy": "linear"}',
)
WORDS = (
    *TABLE,
    "sql",
    "chat",
    "tone",
    "density",
    "modules",
    "without",
    "q_proj",
    "seed",
    "rank",
    "t",
    "(",
    ")",
    "[",
    "]",
    ",",
    "*",
    "+",
    "-",
    "=",
)
WORDS += (
    " ",
    "0",
    "1e999",
    "-0.0",
    "nan",
    "true",
    '"',
    "\\",
    "\u202e",
    "é",
    "\0",
    "../",
    "merged-lora:",
    "9" * 40,
)

PLACES = ("https://", "HTTPS://", "hf:", "s3://", "@", "%2e%2e/", "/..", "?x=1", "#", "//")
"""Words of locations."""


def mutated(seed: random.Random, text: str, words: Sequence[str] = WORDS) -> str:
    """The text with some bytes changed, removed, doubled or replaced by words of the grammar."""
    data = bytearray(text.encode())
    for _ in range(seed.randint(1, 6)):
        at = seed.randrange(len(data) + 1)
        match seed.randrange(4):
            case 0:
                data[at : at + 1] = bytes([seed.randrange(256)])
            case 1:
                del data[at : at + seed.randint(1, 8)]
            case 2:
                data[at:at] = data[at : at + seed.randint(1, 40)] * seed.randint(1, 3)
            case _:
                data[at:at] = seed.choice(words).encode()
    return data.decode("utf-8", "replace")


async def knock(gate: MergeGate, model: str, body: object) -> None:
    """Ask the gate: a merge or none, or a MergeError whose message is short."""
    message = "a merge, or none"
    try:
        spec = gate.asked_for(model, body, lambda name: name == "base")
        if spec is not None:
            await gate.ready(spec, Lease())
    except MergeError as error:
        message = str(error)
    assert 0 < len(message) < 2_000, model


async def knock_briefly(gate: MergeGate, model: str, body: object) -> None:
    """Ask a gate whose merges cost nothing."""
    with within_a_second(model):
        await knock(gate, model, body)


@pytest.fixture(scope="module")
def gate() -> MergeGate:
    """A gate whose merges cost nothing; three adapters are registered."""
    found = gate_with(worker(), max_ad_hoc=20)

    async def prepare(path: str, needed: object, watch: object) -> Reply:
        facts = asdict(Facts("cpu", 8, 1, 1.0, {}, 0.0, 0.0, 1))
        return Reply(ok=True, key=MergeIdentity.from_path(path).digest, held=0, facts=facts, made=True)

    async def copied(path: str, options: object) -> Reply:
        digest = tiny.make_adapter(int(path)).digest
        return Reply(ok=True, key=digest, refusal="", nbytes=1, held=1, largest=1)

    found._workers.prepare = prepare  # type: ignore[method-assign]
    found.sources._copied = copied  # type: ignore[method-assign]
    for seed, name in enumerate(("sql", "chat", "tone"), 1):
        asyncio.run(found.sources.serve(name, asyncio.run(found.sources.copy(str(seed), {}))))
    return found


def assert_bounded(gate: MergeGate) -> None:
    """Nothing has grown beyond its limit."""
    shown = report(gate)
    assert len(shown["merges"]) <= 20 + len(shown["aliases"])
    assert len(shown["sources"]) == 3
    assert not gate._making
    assert not gate.sources._leases


@pytest.mark.slow
@settings(max_examples=GENERATED, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    st.one_of(st.text(max_size=3_000), st.lists(st.sampled_from(WORDS), max_size=60).map("".join)),
    st.one_of(
        st.none(),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(max_size=40)),
            lambda inner: st.one_of(
                st.lists(inner, max_size=4),
                st.dictionaries(st.sampled_from(["ids", "weights", "merge_strategy", "density", "x"]), inner),
            ),
            max_leaves=12,
        ),
    ),
)
def test_generated_names_and_bodies_get_a_merge_or_an_error(
    gate: MergeGate, model: str, body: object
) -> None:
    asyncio.run(knock_briefly(gate, model if body is None else "base", body))


def test_mutated_names_and_bodies_get_a_merge_or_an_error(gate: MergeGate) -> None:
    seed = random.Random(4)

    async def run() -> None:
        for _ in range(MUTATED):
            text = mutated(seed, seed.choice(SEEDS))
            body = None
            if text.startswith("{"):
                try:
                    body = json.loads(text)
                except (ValueError, RecursionError):
                    continue
            await knock_briefly(gate, text if body is None else "base", body)

    asyncio.run(run())
    assert_bounded(gate)


@pytest.mark.slow
def test_mutated_locations_get_a_merge_or_an_error_and_ask_for_what_is_allowed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = random.Random(6)
    cache = own_caches(tmp_path, monkeypatch)
    with https_site(tmp_path, monkeypatch) as site:
        for number, name in enumerate(("sql", "chat"), 1):
            tiny.make_adapter(number).save(tmp_path / name)
            site.put(name, tmp_path / name)
        sql, chat = site.location("sql"), site.location("chat")
        specs = (
            f'0.7*"{sql}" + 0.3*"{chat}"',
            f"ties({sql}, {chat}, density=0.5)",
            f'sum("{sql}", "{chat}/")',
        )
        found = gate_with(worker(), aliases={}, allow=(site.location("*"),), max_ad_hoc=20)

        async def run() -> None:
            for _ in range(LOCATIONS):
                await knock(found, mutated(seed, seed.choice(specs), (*WORDS, *PLACES, sql, chat)), None)
            assert len(report(found)["merges"]) <= 20
            merged = await found.ready(parse(specs[0]), Lease())
            assert set(merged.identity.contents) == {tiny.make_adapter(number).digest for number in (1, 2)}

        asyncio.run(run())
        paths = {asked.path for asked in site.server.asked}
    assert len(paths) > 10
    assert all(re.fullmatch(r"(/x(/[^/]+)+)/[^/]+", path) and "/../" not in path for path in paths), paths
    assert len([*cache.glob("adapters/*")]) == 2
    assert [*cache.glob("parts/*")] == []


@pytest.mark.engine
def test_five_hundred_over_http_are_served_or_refused(server: Server) -> None:
    seed = random.Random(5)
    before = server.logprobs("mix")
    counts = {"sources": len(server.get("/v1/merged_lora")[1]["sources"]), "series": len(server.metrics())}
    found: dict[int, int] = {}
    for i in range(ASKED):
        text = mutated(seed, seed.choice(SEEDS))
        request: dict[str, Any] = {"model": text, "prompt": "x", "max_tokens": 1}
        data = json.dumps(request).encode()
        if text.startswith("{"):
            data = b'{"model": "base", "prompt": "x", "max_tokens": 1, "merged_adapters": %s}' % text.encode()
        if i % 10 == 0:  # the whole body is mutated, as bytes
            at = seed.randrange(len(data))
            data = data[:at] + bytes([seed.randrange(256)]) + data[at + 1 :]
        status, reply = server.post("/v1/completions", data)
        assert status == 200 or 400 <= status < 500, (data, reply)
        found[status] = found.get(status, 0) + 1
    assert {200, 400, 404} <= set(found), found
    assert server.logprobs("mix") == before
    shown = server.get("/v1/merged_lora")[1]
    assert len(shown["sources"]) == counts["sources"]
    assert len(shown["merges"]) <= tiny.MAX_AD_HOC + len(shown["aliases"])
    fresh = len(server.metrics()) - counts["series"]
    assert fresh <= 5 * len(TABLE), "a label takes what clients write"
