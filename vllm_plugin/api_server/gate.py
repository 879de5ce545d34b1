"""The gate of an API server: from a request to the merge that serves it, within the operator's limits.

Knows names and the keys of copies, and holds no weights.  vLLM is reached through functions given at
construction, so that this file imports nothing of it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from merged_lora.aliases import check_alias_name
from merged_lora.errors import CalibrationError, MergeError, SpecError, UnknownAdapterError, listed
from merged_lora.locations import location_hint
from merged_lora.lru import Lru
from merged_lora.planning import check_names
from merged_lora.replay import Survival
from merged_lora.spec import MergeSpec, Source, check_length, from_json, is_spec, parse
from merged_lora.vllm_plugin.identity import NUMBER_TAKEN, MergeIdentity
from merged_lora.vllm_plugin.merge_log import log_merge
from merged_lora.vllm_plugin.rpc import Facts, Pending, raise_failure
from merged_lora.vllm_plugin.settings import GIB, Settings

from .aliases import Aliases
from .limits import check_limits
from .metrics import Metrics
from .ready import LiveMerge, ReadyMerges
from .replaying import NotReplayed, Replay, Replays
from .sources import Sources
from .workers import Workers

logger = logging.getLogger("vllm.merged_lora")

FORGOTTEN = 4096
"""Number of merges remembered as having been ready once."""
ROOM_SECONDS = 30.0
"""Longest time that a new merge waits for room in memory while no other gets any: half of the minute after
which many proxies give up on a reply, so that clients hear the reason.  Nobody can know when the requests
that use the memory end."""
QUIET = 60.0
"""Seconds between two warnings of missing room."""
LATE, LATE_SECONDS = 2.0, 1.0
"""A merge that takes this many times as long as expected, and this many seconds more, is worth a warning."""


class BusyError(MergeError):
    """Too much is waiting, or in use; a client may ask again in ``seconds``."""

    def __init__(self, reason: str, seconds: int) -> None:
        super().__init__(f"{reason}; ask again in {seconds} s")
        self.seconds = seconds


class Lease:
    """A stand-in for a request: leases taken in its name last as long as the object."""


@dataclass(eq=False)
class Making:
    """A merge in the making.

    identity: the merge.
    began:    time at which it was asked for, as ``time.monotonic`` has it.
    waiting:  number of requests that wait for it.
    has_room: whether there is room for it in memory, without which it is not begun.
    state:    what the workers reported last; None before the first report, and if they had the merge already.
    result:   how it ended, for the metrics.
    task:     makes it; deleted when it is done, because its error knows the frames that know this object.
    """

    identity: MergeIdentity
    began: float = field(default_factory=time.monotonic)
    waiting: int = 0
    has_room: bool = False
    state: Pending | None = None
    result: str = "failed"
    task: asyncio.Task[LiveMerge] = field(init=False, repr=False)


class MergeGate:
    """The merges of one API server.

    settings: what the operator asked for.
    sources:  the adapters that may be merged.
    workers:  make merges, and keep those that are ready.
    replays:  finds out what a merge keeps of its sources.
    metrics:  counts what happens here.
    servers:  number of API servers, which share the memory for merges that are ready.
    """

    def __init__(
        self,
        settings: Settings,
        sources: Sources,
        workers: Workers,
        replays: Replays,
        metrics: Metrics,
        servers: int = 1,
    ) -> None:
        self.sources = sources
        self._settings = settings
        self._aliases = Aliases(settings.aliases, settings.alias_store)
        self._workers = workers
        self._replays = replays
        self._metrics = metrics
        self._servers = servers
        limit = int(settings.ready_gib * GIB) // servers
        self._ready = ReadyMerges(limit, self._most, self._forget)
        self._making: dict[str, Making] = {}
        self._forgotten: Lru[str, int] = Lru()  # bytes of merges that were ready once, by digest
        self._warned = -math.inf  # time of the last warning of missing room
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
        return self._ready.merges

    @property
    def making(self) -> Sequence[Making]:
        """The merges that are being made or wait for that, in the order in which they were asked for."""
        return list(self._making.values())

    @property
    def ready_bytes(self) -> int:
        """Bytes of the merges that are ready, in each worker."""
        return self._ready.nbytes

    async def check_aliases(self, reserved: Collection[str]) -> None:
        """Raise MergeError if an alias hides a served name or merges an adapter that is not registered.

        reserved: names of the base model.
        """
        lease = Lease()
        for alias, spec in self._aliases.current().items():
            try:
                self._check_alias(alias, reserved)
                check_limits(spec, self._settings)
                await self.sources.refresh(spec.names, lease, patient=True)
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
        known = self.sources.components
        try:
            check_names(spec, known)
        except UnknownAdapterError as error:
            hint = next(filter(None, (location_hint(name) for name in spec.names if name not in known)), "")
            raise UnknownAdapterError(f"{error}{hint if self._settings.allow else ''}") from None
        return MergeIdentity(spec, tuple(self.sources.key(name) for name in spec.names))

    async def ready(self, spec: MergeSpec, request: object) -> LiveMerge:
        """The merge, as :meth:`serve` returns it."""
        live, _ = await self.serve(spec, request)
        return live

    async def serve(self, spec: MergeSpec, request: object) -> tuple[LiveMerge, bool]:
        """The merge, made and checked on every worker: once, however many requests ask at the same time.

        Returns the merge, and whether this request waited until it was made.

        request: the merge, and the copies that it is made from, stay in memory as long as this object lives.

        Everybody who waits for a merge gets its outcome, including a failure.  It is made beside the engine's
        steps, and given up when the last of them leaves; raises BusyError if too many wait, or if requests
        under way leave no room for it.
        """
        await self.sources.refresh(spec.names, request)
        identity = self.identify(spec)
        digest = identity.digest
        self.sources.lease(request, identity.contents)
        live = self._ready.use(digest)
        if live is not None:
            self._ready.lease(digest, request)
            live.used, live.hits = time.time(), live.hits + 1
            self._metrics.hits.inc()
            return live, False
        if digest not in self._making:
            self._check_new(identity)
            self._begin_making(identity)
        making = self._making[digest]
        live = await self._wait(making)
        self._ready.lease(digest, request)
        return live, making.state is not None

    async def _wait(self, making: Making) -> LiveMerge:
        """The merge when it is made; the caller is one of those who wait for it.

        As long as one of them holds ``making``, the merge stays.
        """
        start = time.perf_counter()
        making.waiting += 1
        try:
            # Shielded: a client that leaves must not cancel the merge for the others who wait for it.
            return await asyncio.shield(making.task)
        finally:
            self._metrics.waited.observe(time.perf_counter() - start)
            making.waiting -= 1
            if not making.waiting and self._making.get(making.identity.digest) is making:
                del self._making[making.identity.digest]  # who asks from now on has it made anew
                making.task.cancel()

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
            raise BusyError(f"{waiting} checks of merges are waiting", seconds)
        for each in await self.replay(live):
            if isinstance(each, NotReplayed):
                raise CalibrationError(str(each.error))  # not the one that is kept: it would keep this frame
        return live

    async def replay(self, live: LiveMerge) -> Replay:
        """What the replay of a merge shows: done once, however many ask, and logged if a source is lost."""
        if live.replay is not None:
            return live.replay
        digest = live.identity.digest
        if digest not in self._replaying:
            lease = Lease()
            self.sources.lease(lease, live.identity.contents)
            self._ready.lease(digest, lease)
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
            del lease, self._replaying[live.identity.digest]
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
            what = "an adapter" if self._is_adapter(alias) else "a base model"
            raise MergeError(f"{alias!r} is already served, as {what}; choose another name for the alias")

    def _ad_hoc(self, spec: MergeSpec) -> MergeSpec:
        """A merge without an alias, checked; raises SpecError."""
        if self._settings.max_ad_hoc == 0:
            raise SpecError(
                f"this server serves no merges but its aliases: {listed(sorted(self.aliases)) or 'none'}"
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
        others = [live.identity for live in self.merges] + [making.identity for making in self.making]
        if any(other.number == identity.number for other in others):
            raise MergeError(NUMBER_TAKEN)
        waiting = len(self._making) - 1
        if waiting >= self._settings.max_waiting and self._making:
            self._metrics.merges.labels(identity.spec.strategy, "busy").inc()
            seconds = max(1, math.ceil(sum(map(self._left, self.making))))
            raise BusyError(f"{waiting} new merges are waiting to be made", seconds)

    def _left(self, making: Making) -> float:
        """Seconds that a merge in the making is expected to take from now on."""
        state = making.state
        return state.left if state is not None and state.announced else self._seconds

    def _begin_making(self, identity: MergeIdentity) -> None:
        making = self._making[identity.digest] = Making(identity)
        making.task = asyncio.create_task(self._make(making))
        making.task.add_done_callback(functools.partial(self._made, making))
        self._metrics.queue.set(len(self._making))

    async def _make(self, making: Making) -> LiveMerge:
        identity, lease = making.identity, Lease()
        # Made again, a merge is as large as it was.
        room = self._forgotten.get(identity.digest, self.sources.largest)
        self.sources.lease(lease, identity.contents)
        try:
            await self._reserve(room)
            making.has_room = True
            try:
                facts = await self._made_by_workers(making)
            except BaseException:
                self._ready.cancel(room)
                raise
        finally:
            del lease  # an error that is kept somewhere knows this frame
        live = LiveMerge(identity, facts)
        self._ready.add(live, room, making)
        if self._settings.check and identity.spec in self._aliases.current().values():
            self._begin(self._watch(live))
        return live

    async def _reserve(self, nbytes: int) -> None:
        """Reserve room for a new merge; raises BusyError, and logs that now and then, if there is none."""
        try:
            await self._ready.reserve(nbytes, ROOM_SECONDS)
        except TimeoutError:
            sharing = f", shared by {self._servers} API servers" if self._servers > 1 else ""
            used, limit = self._ready.needed / GIB, self._ready.limit / GIB
            reason = (
                f"a new merge may take {nbytes / GIB:.3g} GiB, and there was no room for {ROOM_SECONDS:g} s: "
                f"those that requests use or wait for take {used:.3g} of {limit:.3g} GiB "
                f"(--merged-lora-ready-gib {self._settings.ready_gib:g}{sharing})"
            )
            if time.monotonic() - self._warned >= QUIET:
                self._warned = time.monotonic()
                logger.warning("%s", reason)
            raise BusyError(reason, math.ceil(ROOM_SECONDS)) from None

    async def _made_by_workers(self, making: Making) -> Facts:
        identity = making.identity

        def watch(state: Pending) -> None:
            making.state = state

        # With the others in the making: a worker may have finished one, and this server not know it yet.
        others = [digest for digest in self._making if digest != identity.digest]
        needed = [*self._ready.digests, *others]
        reply = await self._workers.prepare(identity.path, needed, watch)
        if not reply["ok"]:
            spec, digest = str(identity.spec), identity.digest
            logger.warning("not merged spec=%r digest=%s error=%r", spec, digest, reply["error"])
        raise_failure(reply)
        facts = Facts(**reply["facts"])
        if reply["made"]:
            self._seconds += (facts.seconds - self._seconds) / 4
            self._metrics.seconds.observe(facts.seconds)
            log_merge(identity, facts)
            if facts.announced and facts.seconds > LATE * facts.announced + LATE_SECONDS:
                logger.warning(
                    "%s took %.1f s instead of the %.1f s that were expected",
                    identity.spec,
                    facts.seconds,
                    facts.announced,
                )
            if identity.digest in self._forgotten:
                self._metrics.again.inc()
        making.result = "made" if reply["made"] else "shared"
        return facts

    def _made(self, making: Making, task: asyncio.Task[LiveMerge]) -> None:
        """Count how a merge in the making ended."""
        del making.task
        if self._making.get(making.identity.digest) is making:
            del self._making[making.identity.digest]
        self._metrics.queue.set(len(self._making))
        if task.cancelled():
            making.result = "cancelled"
        elif isinstance(task.exception(), BusyError):
            making.result = "busy"
        elif isinstance(task.exception(), MergeError):
            making.result = "refused"
        self._metrics.merges.labels(making.identity.spec.strategy, making.result).inc()

    def _most(self) -> int:
        return max(1, self._settings.max_ad_hoc + len(self._aliases.current()))

    def _forget(self, live: LiveMerge) -> None:
        self._forgotten.add(live.identity.digest, live.facts.nbytes, FORGOTTEN)
        self._metrics.evictions.labels("merge").inc()
