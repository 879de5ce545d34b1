"""Names for merges, changed at run time and shared by several API servers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gates import gate_with, register, worker
from merged_lora.errors import MergeError, UnknownAdapterError
from merged_lora.spec import parse
from merged_lora.vllm_plugin.api_server.aliases import MAX_ALIASES, Aliases
from merged_lora.vllm_plugin.api_server.gate import MergeGate


def test_without_a_store_nothing_changes() -> None:
    aliases = Aliases({"mix": parse("sum(a)")})
    with pytest.raises(MergeError, match="--merged-lora-runtime-aliases"):
        aliases.define("new", parse("sum(b)"))
    with pytest.raises(MergeError, match="--merged-lora-runtime-aliases"):
        aliases.remove("mix")
    assert dict(aliases.current()) == {"mix": parse("sum(a)")}


def test_what_one_api_server_changes_the_others_see(tmp_path: Path) -> None:
    store = str(tmp_path / "aliases.json")
    one, other = (Aliases({"mix": parse("sum(a)")}, store) for _ in range(2))
    assert one.define("new", parse("ties(a, b, density=0.25)")) is True
    assert one.define("mix", parse("sum(b)")) is False
    assert dict(other.current()) == {"mix": parse("sum(b)"), "new": parse("ties(a, b, density=0.25)")}
    assert other.remove("mix") is True
    assert other.remove("mix") is False
    assert set(one.current()) == {"new"}


def test_the_number_of_aliases_is_bounded(tmp_path: Path) -> None:
    given = {f"a{i}": parse("sum(a)") for i in range(MAX_ALIASES)}
    aliases = Aliases(given, str(tmp_path / "aliases.json"))
    with pytest.raises(MergeError, match=f"there are {MAX_ALIASES} aliases"):
        aliases.define("one-more", parse("sum(a)"))
    aliases.define("a0", parse("sum(b)"))
    assert len(aliases.current()) == MAX_ALIASES


async def served(tmp_path: Path) -> MergeGate:
    """A gate with the adapters ``a`` and ``b`` and the alias ``mix``, which may be changed."""
    gate = gate_with(worker(), alias_store=str(tmp_path / "aliases.json"), runtime_aliases=True)
    await register(gate, "a", tmp_path, 1)
    await register(gate, "b", tmp_path, 2)
    return gate


def test_a_redefined_alias_is_another_merge(tmp_path: Path) -> None:
    async def run() -> None:
        gate = await served(tmp_path)
        before, new = await gate.define("m", parse("sum(a)"), ["base"])
        assert new
        after, new = await gate.define("m", parse("sum(b)"), ["base"])
        assert not new
        assert before.identity.name != after.identity.name
        assert gate.asked_for("m", None, lambda name: False) == parse("sum(b)")

    asyncio.run(run())


def test_an_alias_whose_merge_cannot_be_made_is_not_defined(tmp_path: Path) -> None:
    async def run() -> None:
        gate = await served(tmp_path)
        await register(gate, "wide", tmp_path, 3, rank=16)
        for alias, spec, words in (
            ("m", "linear(a, wide)", "equal ranks"),
            ("m", "sum(nobody)", "unknown adapter"),
            ("m", "sum(mix)", "itself a merge"),
            ("base", "sum(a)", "already served"),
            ("a", "sum(b)", "already served"),
            ("../m", "sum(a)", "is a path"),
        ):
            with pytest.raises(MergeError, match=words):
                await gate.define(alias, parse(spec), ["base"])
        assert set(gate.aliases) == {"mix"}

    asyncio.run(run())


def test_an_alias_that_is_gone_is_unknown(tmp_path: Path) -> None:
    async def run() -> None:
        gate = await served(tmp_path)
        gate.remove("mix")
        assert gate.asked_for("mix", None, lambda name: False) is None
        with pytest.raises(UnknownAdapterError, match="no alias 'mix'"):
            gate.remove("mix")

    asyncio.run(run())
