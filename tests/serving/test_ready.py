"""The memory for merges that are ready: who makes room, and who has it next."""

from __future__ import annotations

import asyncio

import pytest

from gates import PATIENCE
from merged_lora.spec import parse
from merged_lora.vllm_plugin.api_server.gate import Lease
from merged_lora.vllm_plugin.api_server.ready import LiveMerge, ReadyMerges
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.rpc import Facts


def room() -> ReadyMerges:
    """Room for ten bytes."""
    return ReadyMerges(10, lambda: 100, lambda _: None)


async def add(ready: ReadyMerges, nbytes: int, request: object) -> str:
    """Store a merge of that many bytes, which it is named by, and lease it to a request."""
    identity = MergeIdentity(parse(f"sum({nbytes}*a)"), ("0" * 32,))
    facts = Facts("cpu", 1, 1, 1.0, {}, seconds=0.1, announced=0.1, nbytes=nbytes)
    await ready.reserve(nbytes, PATIENCE)
    ready.add(LiveMerge(identity, facts), nbytes, request)
    return identity.digest


def sizes(ready: ReadyMerges) -> list[int]:
    """Bytes of each merge, the least recently used one first."""
    return [live.facts.nbytes for live in reversed(ready.merges)]


async def waiting(ready: ReadyMerges, *nbytes: int) -> list[asyncio.Task[None]]:
    """Clients that ask for room, one after the other."""
    tasks = [asyncio.create_task(ready.reserve(each, PATIENCE)) for each in nbytes]
    await asyncio.sleep(0.01)
    return tasks


async def done(*tasks: asyncio.Task[None]) -> list[bool]:
    """Which clients have their room."""
    await asyncio.sleep(0.01)
    return [task.done() for task in tasks]


def test_no_merge_is_dropped_as_long_as_that_makes_too_little_room() -> None:
    async def run() -> None:
        ready, request = room(), Lease()
        await add(ready, 3, Lease())
        await add(ready, 6, request)
        (client,) = await waiting(ready, 5)
        assert not client.done()
        assert sizes(ready) == [3, 6]
        del request
        assert await done(client) == [True]
        assert sizes(ready) == []

    asyncio.run(run())


def test_only_the_least_recently_used_merges_make_room() -> None:
    async def run() -> None:
        ready, request = room(), Lease()
        first = await add(ready, 2, Lease())
        await add(ready, 3, Lease())
        await add(ready, 4, request)
        ready.use(first)
        (client,) = await waiting(ready, 4)
        assert client.done()
        assert sizes(ready) == [4, 2]
        del request

    asyncio.run(run())


def test_who_came_first_has_room_first_however_much_it_needs() -> None:
    async def run() -> None:
        ready, request = room(), Lease()
        await add(ready, 6, request)
        clients = await waiting(ready, 8, 1, 1, 2)
        assert await done(*clients) == [False] * 4
        del request
        assert await done(*clients) == [True, True, True, False]
        ready.cancel(1)
        assert await done(*clients) == [True, True, True, False]
        ready.cancel(1)
        assert await done(*clients) == [True] * 4

    asyncio.run(run())


@pytest.mark.parametrize("let_in", [False, True])
def test_who_leaves_holds_up_nobody(let_in: bool) -> None:
    async def run() -> None:
        ready = room()
        await ready.reserve(6, PATIENCE)
        clients = await waiting(ready, 8, 9, 4)
        if let_in:  # in the same turn of the loop as it leaves
            ready.cancel(6)
        clients[1].cancel()
        clients[0].cancel()
        assert await done(*clients) == [True] * 3
        assert [client.cancelled() for client in clients] == [True, True, False]
        ready.cancel(4 if let_in else 10)
        assert ready._reserved == 0
        assert not ready._waiting

    asyncio.run(run())


def test_who_gets_no_room_in_time_reserves_nothing_and_those_behind_go_on() -> None:
    async def run() -> None:
        ready, request = room(), Lease()
        await add(ready, 6, request)
        first = asyncio.create_task(ready.reserve(8, 0.02))
        await asyncio.sleep(0)
        second = asyncio.create_task(ready.reserve(4, PATIENCE))
        await asyncio.sleep(0)
        assert not second.done()
        with pytest.raises(TimeoutError):
            await first
        await second
        assert ready.needed == 10
        ready.cancel(4)
        assert ready.needed == 6
        del request

    asyncio.run(run())


def test_nobody_is_refused_as_long_as_those_before_get_room() -> None:
    async def run() -> None:
        ready, loop = room(), asyncio.get_running_loop()
        await ready.reserve(9, PATIENCE)
        first, second, third = await waiting(ready, 9, 9, 9)
        for task in (first, second):
            began = loop.time()
            ready.cancel(9)
            assert await done(task) == [True]
            patience = [turn.patience.when() for turn in ready._waiting]
            assert all(when is not None and when >= began + PATIENCE for when in patience)
        ready.cancel(9)
        await third

    asyncio.run(run())
