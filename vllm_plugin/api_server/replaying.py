"""Replays of merges on the running server: which of its sources' own answers a merge still gives.

Knows nothing of vLLM: workers and engine are reached through functions given at construction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from merged_lora.errors import CalibrationError
from merged_lora.replay import Replayed, Survival, survival
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.rpc import raise_failure

from .metrics import Metrics
from .workers import Workers

AT_ONCE = 4
"""Number of requests that the replays of an API server have under way, so that clients' get on meanwhile."""

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class NotReplayed:
    """A source without answers that can be replayed.

    source: its name.
    error:  the reason, and the way out.
    """

    source: str
    error: CalibrationError


Replay = tuple[Survival | NotReplayed, ...]
"""What a replay shows, for each source of the merge in its order."""


class Replays:
    """The replays of one API server, one after the other.

    workers:   have the prompts and answers.
    run:       sends one prompt with its answer through the engine, under a merge.
    longest:   largest number of tokens of a prompt and its answer together.
    metrics:   counts results.
    """

    def __init__(
        self,
        workers: Workers,
        run: Callable[[MergeIdentity, Tokens, Tokens], Awaitable[Replayed]],
        longest: int,
        metrics: Metrics,
    ) -> None:
        self._workers = workers
        self._run = run
        self._longest = longest
        self._metrics = metrics
        self._turn = asyncio.Semaphore(1)

    async def of(self, identity: MergeIdentity) -> Replay:
        """What a merge keeps of each of its sources, whose copies must stay in memory until this returns.

        Raises UnknownAdapterError if a copy is gone already, and whatever the engine raises.
        """
        names = identity.spec.names
        try:
            async with self._turn:
                # All of them before the first request: the engine may need every copy to serve the merge.
                found = [
                    await self._asked(key, name, identity.spec.strategy)
                    for name, key in zip(names, identity.contents, strict=True)
                ]
                pairs = zip(names, found, strict=True)
                return tuple([await self._replayed(identity, name, exchanges) for name, exchanges in pairs])
        except Exception:
            self._metrics.checks.labels("failed").inc()
            raise

    async def _asked(
        self, key: str, name: str, strategy: str
    ) -> list[tuple[Tokens, Tokens]] | CalibrationError:
        reply = await self._workers.replay(key, name, strategy)
        try:
            raise_failure(reply)
        except CalibrationError as error:
            return error
        exchanges = [(tuple(prompt), tuple(answer)) for prompt, answer in reply["exchanges"]]
        length = max(len(prompt) + len(answer) for prompt, answer in exchanges)
        if length > self._longest:
            return CalibrationError(
                f"{name}: a prompt of its calibration and the answer have {length} tokens, more than the "
                f"{self._longest} that fit here; raise --max-model-len, or calibrate on shorter prompts"
            )
        return exchanges

    async def _replayed(
        self, identity: MergeIdentity, name: str, exchanges: list[tuple[Tokens, Tokens]] | CalibrationError
    ) -> Survival | NotReplayed:
        if isinstance(exchanges, CalibrationError):
            self._metrics.checks.labels("failed").inc()
            return NotReplayed(name, exchanges)
        places = asyncio.Semaphore(AT_ONCE)

        async def run(prompt: Tokens, answer: Tokens) -> Replayed:
            async with places:
                return await self._run(identity, prompt, answer)

        tasks = [asyncio.create_task(run(*exchange)) for exchange in exchanges]
        try:
            found = survival(name, await asyncio.gather(*tasks))
        finally:  # no prompt outlives this, because a lease of the caller keeps the merge
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            del task, tasks  # the error of a task knows this frame, and the frames of those who hold leases
        self._metrics.checks.labels("lost" if found.lost else "kept").inc()
        return found
