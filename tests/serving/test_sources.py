"""A folder of sources: read when a request names it, read again when changed, and nothing outside of it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from gates import gate_with, register, worker
from merged_lora.calibration import CALIBRATION_NAME, Exchange
from merged_lora.cli import main
from merged_lora.engine import merge
from merged_lora.errors import MergeError, UnknownAdapterError
from merged_lora.files.layout import WEIGHTS_NAME
from merged_lora.spec import parse
from merged_lora.vllm_plugin.api_server.gate import Lease
from merged_lora.vllm_plugin.worker.snapshots import Snapshots

ME = Lease()
ASKED = Exchange((1, 2), (3,), fitted=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the adapters ``a`` and ``team/b``."""
    root = tmp_path / "sources"
    tiny.make_adapter(1).save(root / "a")
    tiny.make_adapter(2).save(root / "team" / "b")
    return root


def test_an_adapter_in_the_folder_is_a_source(folder: Path) -> None:
    async def run() -> None:
        gate = gate_with(worker(), source_dir=str(folder))
        live = await gate.ready(parse("sum(a, team/b)"), ME)
        assert live.identity.contents == (tiny.make_adapter(1).digest, tiny.make_adapter(2).digest)
        assert gate.asked_for("a", None, lambda name: False) is None  # a source, not a model

    asyncio.run(run())


@pytest.mark.parametrize(
    ("what", "flags"),
    [("head", ["--drop", "heads"]), ("pickle", ["--allow-pickle"]), ("outer", ["--rename"])],
)
def test_the_copy_that_an_error_recommends_is_served(folder: Path, what: str, flags: list[str]) -> None:
    weights, whole = folder / "a" / WEIGHTS_NAME, load_file(folder / "a" / WEIGHTS_NAME)
    if what == "pickle":
        torch.save(whole, weights.with_suffix(".bin"))
        weights.unlink()
    elif what == "head":
        save_file(whole | {"base_model.model.score.weight": torch.ones(2, tiny.HIDDEN)}, weights)
    else:
        save_file({f"outer.{name}": tensor for name, tensor in whole.items()}, weights)

    async def run() -> None:
        gate = gate_with(worker(), source_dir=str(folder))
        with pytest.raises(MergeError, match=f"{' '.join(flags)}.* of the command merged-lora") as refused:
            await gate.ready(parse("sum(a)"), ME)
        named = [word for word in str(refused.value).split() if "=" in word and "=True" not in word]
        flags.extend(named[-1:] if what == "outer" else [])
        assert main(["merge", "a", f"--adapter=a={folder / 'a'}", *flags, f"--output={folder / 'copy'}"]) == 0
        live = await gate.ready(parse("sum(copy)"), ME)
        assert live.identity.contents == (merge("a", {"a": tiny.make_adapter(1)}).digest,)

    asyncio.run(run())


@pytest.mark.parametrize(
    "name",
    [
        "c",
        "team",
        ".hidden",
        "team/.hidden",
        "a/adapter_config.json",
        "x" * 250,
        "team//b",
        "team/./b",
        "a/",
        "loop",
        "loop/x",
    ],
)
def test_what_is_no_adapter_folder_is_unknown(folder: Path, name: str) -> None:
    tiny.make_adapter(3).save(folder / ".hidden")
    tiny.make_adapter(3).save(folder / "team" / ".hidden")
    (folder / "loop").symlink_to(folder / "loop")

    async def run() -> None:
        gate = gate_with(worker(), source_dir=str(folder))
        with pytest.raises((UnknownAdapterError, MergeError), match=r"unknown adapter|is a path"):
            await gate.ready(parse(f'sum("{name}")'), ME)

    asyncio.run(run())


@pytest.mark.parametrize(
    "name", ["../outside", "/etc", "team/../../outside", "~root", "a\\u0000b", "\\\\host\\\\x"]
)
def test_a_name_that_is_a_path_is_refused_by_the_grammar(name: str) -> None:
    with pytest.raises(MergeError, match=r"is a path|control character"):
        parse(f'sum("{name}")')


def test_links_are_followed_inside_the_folder_alone(folder: Path) -> None:
    tiny.make_adapter(3).save(folder.parent / "outside")
    (folder / "inward").symlink_to(folder / "a")
    (folder / "outward").symlink_to(folder.parent / "outside")
    shutil.copytree(folder / "a", folder / "leaky")
    (folder / "leaky" / "adapter_model.safetensors").unlink()
    (folder / "leaky" / "adapter_model.safetensors").symlink_to(
        folder.parent / "outside" / "adapter_model.safetensors"
    )

    async def run() -> None:
        gate = gate_with(worker(), source_dir=str(folder))
        assert (await gate.ready(parse("sum(inward)"), ME)).identity.contents == (
            tiny.make_adapter(1).digest,
        )
        with pytest.raises(UnknownAdapterError):
            await gate.ready(parse("sum(outward)"), ME)
        with pytest.raises(MergeError, match="link out of the folder"):
            await gate.ready(parse("sum(leaky)"), ME)

    asyncio.run(run())


def test_a_changed_source_is_read_again_and_is_another_merge(folder: Path) -> None:
    async def run() -> None:
        gate = gate_with(worker(), source_dir=str(folder))
        before = (await gate.ready(parse("sum(a)"), ME)).identity
        assert (await gate.ready(parse("sum(a)"), ME)).identity == before
        tiny.make_adapter(5).save(folder / "a", overwrite=True)
        after = (await gate.ready(parse("sum(a)"), ME)).identity
        assert after.contents == (tiny.make_adapter(5).digest,)
        assert after.name != before.name

    asyncio.run(run())


def test_a_calibration_that_comes_changes_or_goes_is_another_merge(folder: Path) -> None:
    async def run() -> None:
        merges = worker()
        gate = gate_with(merges, source_dir=str(folder))
        plain = (await gate.ready(parse("sum(a)"), ME)).identity
        made, identities = merges.load_merge(plain.path).digest, [plain]
        for seed in (1, 2):
            tiny.calibrate(folder / "a", ASKED, seed=seed)
            identities.append((await gate.ready(parse("sum(a)"), ME)).identity)
        assert len({identity.name for identity in identities}) == 3
        (folder / "a" / CALIBRATION_NAME).unlink()
        assert (await gate.ready(parse("sum(a)"), ME)).identity == plain
        for identity in identities:  # each request in flight keeps what it began with
            assert merges.load_merge(identity.path).digest == made
        replies = [merges.replay(identity.contents[0], "a", "sum") for identity in identities]
        assert [reply["ok"] for reply in replies] == [False, True, True]

    asyncio.run(run())


@pytest.mark.parametrize("damage", ["truncated", "of other weights"])
def test_an_adapter_whose_calibration_cannot_be_used_is_merged_all_the_same(
    folder: Path, damage: str
) -> None:
    async def run() -> None:
        merges = worker()
        gate = gate_with(merges, source_dir=str(folder))
        before = (await gate.ready(parse("sum(a)"), ME)).identity
        made = merges.load_merge(before.path).digest
        name = "a" if damage == "truncated" else "team/b"
        tiny.calibrate(folder / name, ASKED)
        file = folder / "a" / CALIBRATION_NAME
        file.write_bytes((folder / name / CALIBRATION_NAME).read_bytes()[: -5 if name == "a" else None])
        identity = (await gate.ready(parse("sum(a)"), ME)).identity
        assert merges.load_merge(identity.path).digest == made
        reply = merges.replay(identity.contents[0], "a", "sum")
        assert reply["kind"] == "calibration"
        assert str(file) in reply["error"]

    asyncio.run(run())


def test_a_source_that_vanishes_or_breaks_is_served_from_memory(folder: Path) -> None:
    async def run() -> None:
        merges = worker()
        gate = gate_with(merges, source_dir=str(folder))
        before = (await gate.ready(parse("sum(a)"), ME)).identity
        merged = merges.load_merge(before.path).digest
        (folder / "a" / "adapter_model.safetensors").write_bytes(b"not an adapter")
        assert (await gate.ready(parse("sum(a)"), ME)).identity == before
        shutil.rmtree(folder / "a")
        assert (await gate.ready(parse("sum(a)"), ME)).identity == before
        assert merges.load_merge(before.path).digest == merged
        assert (await gate.ready(parse("sum(2*a)"), ME)).identity.contents == before.contents
        tiny.make_adapter(6).save(folder / "a")  # and when it comes back, it is read
        assert (await gate.ready(parse("sum(a)"), ME)).identity.contents == (tiny.make_adapter(6).digest,)

    asyncio.run(run())


def test_a_source_that_never_could_be_read_says_why_until_it_can(folder: Path) -> None:
    async def run() -> None:
        weights = folder / "a" / "adapter_model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-5])
        gate = gate_with(worker(), source_dir=str(folder))
        for _ in range(2):
            with pytest.raises(MergeError, match="'a' cannot be merged"):
                await gate.ready(parse("sum(a)"), ME)
        weights.write_bytes(whole)
        await gate.ready(parse("sum(a)"), ME)

    asyncio.run(run())


def test_an_adapter_that_is_served_goes_before_one_in_the_folder(folder: Path, tmp_path: Path) -> None:
    async def run() -> None:
        gate = gate_with(worker(), source_dir=str(folder))
        await register(gate, "a", tmp_path, 7)
        assert (await gate.ready(parse("sum(a)"), ME)).identity.contents == (tiny.make_adapter(7).digest,)

    asyncio.run(run())


def test_idle_copies_make_room_and_those_under_way_stay(folder: Path) -> None:
    async def run() -> None:
        for i in range(3, 7):
            tiny.make_adapter(i).save(folder / f"n{i}")
        size = tiny.make_adapter(1).nbytes
        merges = worker(limit=3 * size)
        gate = gate_with(merges, source_dir=str(folder))
        first = Lease()
        path = (await gate.ready(parse("sum(a)"), first)).identity.path
        merged = merges.load_merge(path).digest
        for i in range(3, 7):
            await gate.ready(parse(f"sum(n{i})"), Lease())
        assert gate.sources.held == 3 * size
        assert set(gate.sources.components) == {"a", "n5", "n6"}
        assert merges.load_merge(path).digest == merged
        with pytest.raises(MergeError, match="--merged-lora-cache-gib"):
            await gate.ready(parse("sum(n3, n4, n5)"), Lease())  # with the one under way, four
        del first
        await gate.ready(parse("sum(n3, n4, n5)"), Lease())

    asyncio.run(run())


def test_many_requests_for_one_new_source_read_it_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        merges = worker()
        gate = gate_with(merges, source_dir=str(folder))
        read: list[str] = []
        find = merges._adapters.find

        def reading(path: str) -> Path:
            read.append(path)
            return find(path)

        monkeypatch.setattr(merges._adapters, "find", reading)
        await asyncio.gather(*(gate.ready(parse(f"sum({1 + i}*a)"), ME) for i in range(20)))
        assert len(read) == 1

    asyncio.run(run())


def test_a_copy_stays_while_one_of_its_owners_needs_it() -> None:
    copies: Snapshots[str] = Snapshots(10)
    copies.add("one", "x", "content", 4)
    copies.add("two", "x", "content", 4)
    assert copies.nbytes == 4
    assert copies.keep("one", []) == set()
    assert copies.keep("two", []) == {"x"}
    assert copies.nbytes == 0
