"""The gate of an API server: from a request to the merge that serves it, within the operator's limits.

Knows names and the keys of copies, and holds no weights.  vLLM is reached through functions given at
construction, so that this file imports nothing of it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from merged_lora.errors import MergeError, SpecError, UnknownAdapterError, listed
from merged_lora.lru import Lru
from merged_lora.planning import check_names
from merged_lora.replay import Survival
from merged_lora.spec import MergeSpec, Source, check_length, from_json, is_spec, parse
from merged_lora.vllm_plugin.identity import NUMBER_TAKEN, MergeIdentity
from merged_lora.vllm_plugin.merge_log import log_merge
from merged_lora.vllm_plugin.rpc import Facts, Reply, raise_failure
from merged_lora.vllm_plugin.settings import Settings, check_alias_name

from .aliases import Aliases
from .limits import check_limits
from .metrics import Metrics
from .replaying import NotReplayed, Replay, Replays
from .sources import Sources

logger = logging.getLogger("vllm.merged_lora")


class BusyError(MergeError):
    """Too much is waiting; a client may ask again in ``seconds``."""

    def __init__(self, waiting: int, seconds: int, what: str = "new merges are waiting to be made") -> None:
        super().__init__(f"{waiting} {what}; ask again in {seconds} s")
        self.seconds = seconds


class Lease:
    """A stand-in for a request: leases taken in its name last as long as the object."""


@dataclass
class LiveMerge:
    """A merge that was made.

    identity: the merge.
    facts:    what the workers reported of it.
    used:     Unix time of its last request.
    hits:     number of requests after the first.
    replay:   what its replay showed; None if it was not replayed.
    """

    identity: MergeIdentity
    facts: Facts
    used: float = field(default_factory=time.time)
    hits: int = 0
    replay: Replay | None = None


class MergeGate:
    """The merges of one API server.

    settings: what the operator asked for.
    sources:  the adapters that may be merged.
    prepare:  asks every worker to make the merge with this path.
    replays:  finds out what a merge keeps of its sources.
    metrics:  counts what happens here.
    """

    def __init__(
        self,
        settings: Settings,
        sources: Sources,
        prepare: Callable[[str], Awaitable[Reply]],
        replays: Replays,
        metrics: Metrics,
    ) -> None:
        self.sources = sources
        self._settings = settings
        self._aliases = Aliases(settings.aliases, settings.alias_store)
        self._prepare = prepare
        self._replays = replays
        self._metrics = metrics
        self._live: Lru[str, LiveMerge] = Lru()
        self._making: dict[str, tuple[MergeIdentity, asyncio.Task[LiveMerge]]] = {}
        self._turn = asyncio.Semaphore(1)
        self._seconds = 0.1  # moving average of the time to make a merge
        self._replaying: dict[str, asyncio.Task[Replay]] = {}
        self._replay_seconds = 1.0  # moving average of the time to replay a merge
        self._background: set[asyncio.Task[None]] = set()  # so that nobody collects them

    @property
    def aliases(self) -> dict[str, MergeSpec]:
        """The merge of each alias, as defined now."""
        return dict(self._aliases.current())

    @property
    def merges(self) -> Sequence[LiveMerge]:
        """The merges that are ready, most recently used first."""
        return list(reversed(self._live.values()))

    async def check_aliases(self, reserved: Collection[str]) -> None:
        """Raise MergeError if an alias hides a served name or merges an adapter that is not registered.

        reserved: names of the base model.
        """
        lease = Lease()
        for alias, spec in self._aliases.current().items():
            try:
                self._check_alias(alias, reserved)
                check_limits(spec, self._settings)
                await self.sources.refresh(spec.names, lease)
                self.identify(spec)
            except MergeError as error:
                raise MergeError(f"--merged-lora-modules {alias}: {error}") from None

    async def define(self, alias: str, spec: MergeSpec, reserved: Collection[str]) -> tuple[LiveMerge, bool]:
        """Make a merge, then define an alias for it; raises MergeError.

        reserved: names of the base model.  Returns the merge, and whether the alias is new.

        With ``--merged-lora-check``, the alias serves requests while this waits for the replay of its merge.
        """
        check_alias_name(alias)
        self._check_alias(alias, reserved)
        check_limits(spec, self._settings)
        self._check_no_aliases(spec)
        live = await self.ready(spec, Lease())
        new = self._aliases.define(alias, spec)
        if self._settings.check:
            await self._watch(live)
        return live, new

    def remove(self, alias: str) -> None:
        """Remove an alias; its requests go on.  Raises UnknownAdapterError if there is none of that name."""
        if not self._aliases.remove(alias):
            raise UnknownAdapterError(f"there is no alias {alias[:64]!r}")

    def asked_for(self, model: str | None, body: object, served: Callable[[str], bool]) -> MergeSpec | None:
        """The merge that a request asks for, None if it asks for none; raises MergeError.

        model:  the request's model.
        body:   its ``merged_adapters``, or None.
        served: whether vLLM itself serves a name.
        """
        if body is not None:
            if model and not served(model):
                raise SpecError('"merged_adapters" goes with the base model\'s name in "model"')
            return self._ad_hoc(from_json(body))
        if not model or served(model) or self._is_adapter(model):
            return None
        alias = self._aliases.current().get(model)
        if alias is not None or not is_spec(model):
            return alias
        check_length(model, self._settings.max_spec_length)
        return self._ad_hoc(parse(model))

    def identify(self, spec: MergeSpec) -> MergeIdentity:
        """The merge of the adapters that its names refer to now; raises MergeError."""
        self._check_no_aliases(spec)
        check_names(spec, self.sources.components)
        return MergeIdentity(spec, tuple(self.sources.key(name) for name in spec.names))

    async def ready(self, spec: MergeSpec, request: object) -> LiveMerge:
        """The merge, made and checked on every worker: once, however many requests ask at the same time.

        request: the copies that the merge is made from stay in memory as long as this object lives.

        Everybody who waits for a merge gets its outcome, including a failure.  New merges are made one after
        the other; raises BusyError if too many wait.
        """
        await self.sources.refresh(spec.names, request)
        identity = self.identify(spec)
        self.sources.lease(request, identity.contents)
        live = self._live.use(identity.digest)
        if live is not None:
            live.used, live.hits = time.time(), live.hits + 1
            self._metrics.hits.inc()
            return live
        if identity.digest not in self._making:
            self._check_new(identity)
            self._making[identity.digest] = identity, asyncio.create_task(self._make(identity))
        # Shielded: a client that leaves must not cancel the merge for the others who wait for it.
        return await asyncio.shield(self._making[identity.digest][1])

    async def check(self, spec: MergeSpec) -> LiveMerge:
        """A merge with its replay, which is done at most once; raises MergeError.

        spec: the merge; an alias alone means its merge.

        Raises CalibrationError if a source has no answers to replay, and BusyError if too many replays wait.
        """
        aliases = self._aliases.current()
        (alias, *_), lease = spec.names, Lease()
        if spec == MergeSpec("sum", (Source(alias),)) and not self._is_adapter(alias):
            spec = aliases.get(alias, spec)
        live = await self.ready(spec if spec in aliases.values() else self._ad_hoc(spec), lease)
        waiting = len(self._replaying) - 1
        new = live.replay is None and live.identity.digest not in self._replaying
        if new and self._replaying and waiting >= self._settings.max_waiting:
            seconds = max(1, math.ceil(len(self._replaying) * self._replay_seconds))
            raise BusyError(waiting, seconds, "checks of merges are waiting")
        for each in await self.replay(live):
            if isinstance(each, NotReplayed):
                raise each.error
        return live

    async def replay(self, live: LiveMerge) -> Replay:
        """What the replay of a merge shows: done once, however many ask, and logged if a source is lost."""
        if live.replay is not None:
            return live.replay
        digest = live.identity.digest
        if digest not in self._replaying:
            lease = Lease()
            self.sources.lease(lease, live.identity.contents)
            self._replaying[digest] = asyncio.create_task(self._replay(live, lease))
        # Shielded: a client that leaves must not cancel the replay for the others who wait for it.
        return await asyncio.shield(self._replaying[digest])

    def check_aliases_later(self) -> None:
        """With ``--merged-lora-check``, make and replay the merges of all aliases, in the background."""
        if self._settings.check:
            self._begin(self._watch_aliases())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _watch_aliases(self) -> None:
        for alias, spec in self.aliases.items():
            try:
                live = await self.ready(spec, Lease())
            except MergeError as error:
                logger.warning("alias %s: not checked, because it cannot be made: %s", alias, error)
            except Exception:
                logger.exception("alias %s: not checked, because it could not be made", alias)
            else:
                await self._watch(live)

    async def _watch(self, live: LiveMerge) -> None:
        """Replay a merge; what prevents that is logged, and fails no request."""
        try:
            await self.replay(live)
        except MergeError as error:
            logger.warning("%s: not checked: %s", self._called(live), error)
        except Exception:
            logger.exception("%s: checking failed", self._called(live))

    async def _replay(self, live: LiveMerge, lease: Lease) -> Replay:
        """Replay a merge while ``lease`` keeps the copies of its sources."""
        try:
            start = time.perf_counter()
            found = live.replay = await self._replays.of(live.identity)
            self._replay_seconds += (time.perf_counter() - start - self._replay_seconds) / 4
        finally:
            del self._replaying[live.identity.digest]
        for each in found:
            if isinstance(each, Survival) and each.lost:
                logger.warning("%s: %s", self._called(live), each)
            elif isinstance(each, NotReplayed):
                logger.warning("%s: %s is not checked: %s", self._called(live), each.source, each.error)
        return found

    def _called(self, live: LiveMerge) -> str:
        """A merge by its aliases, or by its spec if it has none."""
        spec = live.identity.spec
        aliases = [alias for alias, merge in self._aliases.current().items() if merge == spec]
        return f"alias {listed(aliases)}" if aliases else str(spec)

    def _is_adapter(self, name: str) -> bool:
        component = self.sources.components.get(name)
        return component is not None and component.served

    def _check_alias(self, alias: str, reserved: Collection[str]) -> None:
        if alias in reserved or self._is_adapter(alias):
            raise MergeError("this name is already served")

    def _ad_hoc(self, spec: MergeSpec) -> MergeSpec:
        """A merge without an alias, checked; raises SpecError."""
        if self._settings.max_ad_hoc == 0:
            raise SpecError(
                f"this server serves no merges but its aliases: {', '.join(self.aliases) or 'none'}"
            )
        check_limits(spec, self._settings)
        self._check_no_aliases(spec)
        return spec

    def _check_no_aliases(self, spec: MergeSpec) -> None:
        aliases = self._aliases.current()
        for name in spec.names:
            if name in aliases and not self._is_adapter(name):
                raise SpecError(f"{name!r} is itself a merge, {aliases[name]}; name its sources instead")

    def _check_new(self, identity: MergeIdentity) -> None:
        others = [
            *(live.identity for live in self._live.values()),
            *(other for other, _ in self._making.values()),
        ]
        if any(other.number == identity.number for other in others):
            raise MergeError(NUMBER_TAKEN)
        waiting = len(self._making) - 1
        if waiting >= self._settings.max_waiting and self._making:
            self._metrics.merges.labels(identity.spec.strategy, "busy").inc()
            seconds = max(1, math.ceil(len(self._making) * self._seconds))
            raise BusyError(waiting, seconds)

    async def _make(self, identity: MergeIdentity) -> LiveMerge:
        strategy, spec = identity.spec.strategy, str(identity.spec)
        result = "failed"
        try:
            async with self._turn:
                start = time.perf_counter()
                reply = await self._prepare(identity.path)
                seconds = time.perf_counter() - start
            if not reply["ok"]:
                result = "failed" if reply["kind"] == "internal" else "refused"
                logger.warning("not merged spec=%r digest=%s error=%r", spec, identity.digest, reply["error"])
            raise_failure(reply)
            facts = Facts(**reply["facts"])
            result = "made" if reply["made"] else "shared"
            if reply["made"]:
                self._seconds += (seconds - self._seconds) / 4
                self._metrics.seconds.observe(seconds)
                log_merge(identity, facts)
            live = self._remember(LiveMerge(identity, facts))
            if self._settings.check and identity.spec in self._aliases.current().values():
                self._begin(self._watch(live))
            return live
        finally:
            del self._making[identity.digest]
            self._metrics.merges.labels(strategy, result).inc()

    def _remember(self, live: LiveMerge) -> LiveMerge:
        limit = max(1, self._settings.max_ad_hoc + len(self._aliases.current()))
        dropped = self._live.add(live.identity.digest, live, limit)
        if dropped:
            self._metrics.evictions.labels("merge").inc(dropped)
        return live
