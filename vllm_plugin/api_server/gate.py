"""In each API server: from what a request says to the adapter that serves it, within bounds.

Knows names and keys of copies; holds no weights.  vLLM is reached through functions given at construction, so
that this file imports none of it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from merged_lora.errors import MergeError, SpecError, UnknownAdapterError
from merged_lora.planning import amplification, check_names
from merged_lora.spec import MergeSpec, from_json, is_spec, parse
from merged_lora.vllm_plugin.identity import NUMBER_TAKEN, MergeIdentity
from merged_lora.vllm_plugin.merge_log import log_merge
from merged_lora.vllm_plugin.rpc import CacheFullError, Facts, Reply, raise_failure
from merged_lora.vllm_plugin.settings import Settings, check_alias_name

from .aliases import Aliases
from .metrics import Metrics
from .sources import Sources

logger = logging.getLogger("vllm.merged_lora")


class BusyError(MergeError):
    """So many new merges wait that one more is not taken; ``seconds`` until it may be."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} new merges are waiting to be made; ask again in {seconds} s")
        self.seconds = seconds


def status_of(error: MergeError) -> tuple[HTTPStatus, str]:
    """HTTP status of an error, and its type in OpenAI's format."""
    if isinstance(error, BusyError):
        return HTTPStatus.TOO_MANY_REQUESTS, "TooManyRequestsError"
    if isinstance(error, CacheFullError):
        return HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"
    if isinstance(error, UnknownAdapterError):
        return HTTPStatus.NOT_FOUND, "NotFoundError"
    return HTTPStatus.BAD_REQUEST, "BadRequestError"


class Holder:
    """Stands for a request where there is none: what is leased to it is kept while it lives."""


@dataclass
class Live:
    """A merge that was made.  used: Unix time of its last request.  hits: requests after the first."""

    identity: MergeIdentity
    facts: Facts
    used: float = field(default_factory=time.time)
    hits: int = 0


class MergeGate:
    """The merges that this server has promised.

    prepare: asks every worker to make a merge.
    """

    def __init__(
        self,
        settings: Settings,
        sources: Sources,
        prepare: Callable[[str], Awaitable[Reply]],
        metrics: Metrics,
    ) -> None:
        self.sources = sources
        self._settings = settings
        self._aliases = Aliases(settings.aliases, settings.alias_store)
        self._prepare = prepare
        self._metrics = metrics
        self._known: OrderedDict[str, Live] = OrderedDict()
        self._making: dict[str, tuple[MergeIdentity, asyncio.Task[Live]]] = {}
        self._turn = asyncio.Semaphore(1)
        self._seconds = 0.1  # that a merge takes, as far as seen

    @property
    def aliases(self) -> dict[str, MergeSpec]:
        """Alias to merge, as it stands now."""
        return dict(self._aliases.current())

    async def check_aliases(self, reserved: Collection[str]) -> None:
        """Raise MergeError where an alias hides a served name or merges what is not registered."""
        holder = Holder()
        for alias, spec in self._aliases.current().items():
            try:
                self._check_alias(alias, reserved)
                await self.sources.refresh(self._bounded(spec).names, holder)
                self.identify(spec)
            except MergeError as error:
                raise MergeError(f"--merged-lora-modules {alias}: {error}") from None

    async def define(self, alias: str, spec: MergeSpec, reserved: Collection[str]) -> tuple[Live, bool]:
        """Let an alias stand for a merge, which is made first; whether it is new.  Raises MergeError."""
        check_alias_name(alias)
        self._check_alias(alias, reserved)
        live = await self.ready(self._unaliased(self._bounded(spec)), Holder())
        return live, self._aliases.define(alias, spec)

    def remove(self, alias: str) -> None:
        """Take an alias away; requests under way go on.  Raises UnknownAdapterError where there is none."""
        if not self._aliases.remove(alias):
            raise UnknownAdapterError(f"there is no alias {alias[:64]!r}")

    def asked_for(self, model: str | None, body: object, served: Callable[[str], bool]) -> MergeSpec | None:
        """The merge that a request asks for, None where it asks for none; raises MergeError.

        model: the request's model.  body: its ``merged_adapters``, or None.  served: whether vLLM itself
        serves a name.
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
        if len(model) > self._settings.max_spec_length:
            limit = self._settings.max_spec_length
            raise SpecError(f"the spec has {len(model)} characters; at most {limit} are taken")
        return self._ad_hoc(parse(model))

    def identify(self, spec: MergeSpec) -> MergeIdentity:
        """The merge of what its names stand for now; raises MergeError."""
        check_names(self._unaliased(spec), self.sources.components)
        return MergeIdentity(spec, tuple(self.sources.key(name) for name in spec.names))

    async def ready(self, spec: MergeSpec, holder: object) -> Live:
        """The merge, made and checked on every worker: once, however many requests ask at a time.

        holder: the request; what the merge is made of is kept in memory for as long as it lives.
        All who wait for a merge get its outcome, a failure too.  New merges are made one after the other;
        raises BusyError where too many wait.
        """
        await self.sources.refresh(spec.names, holder)
        identity = self.identify(spec)
        self.sources.lease(holder, identity.contents)
        live = self._known.get(identity.digest)
        if live is not None:
            self._known.move_to_end(identity.digest)
            live.used, live.hits = time.time(), live.hits + 1
            self._metrics.hits.inc()
            return live
        if identity.digest not in self._making:
            self._check_new(identity)
            self._making[identity.digest] = identity, asyncio.create_task(self._make(identity))
        # Shielded: a client that leaves must not take the merge from the others who wait for it.
        return await asyncio.shield(self._making[identity.digest][1])

    def report(self) -> dict[str, Any]:
        """What ``GET /v1/merged_lora`` tells."""
        aliases = self._aliases.current()
        components = self.sources.components
        return {
            "object": "merged_lora",
            "aliases": [{"alias": alias, "spec": str(spec)} for alias, spec in sorted(aliases.items())],
            "merges": [self.described(live) for live in reversed(self._known.values())],
            "sources": [
                {
                    "name": name,
                    "digest": c.key,
                    "bytes": c.nbytes,
                    "served": c.served,
                    "refusal": c.refusal or None,
                }
                for name, c in sorted(components.items())
            ],
            "bytes_held": self.sources.held,
        }

    def described(self, live: Live) -> dict[str, Any]:
        """One merge, as ``GET /v1/merged_lora`` tells it."""
        spec = live.identity.spec
        contents = zip(spec.sources, live.identity.contents, strict=True)
        return {
            "spec": str(spec),
            "strategy": spec.strategy,
            "sources": [
                {"name": s.name, "weight": None if spec.automatic else s.weight, "digest": digest}
                for s, digest in contents
            ],
            "rank": live.facts.rank,
            "kept_energy": live.facts.kept_energy,
            "kept_energy_by_module": live.facts.kept_by_module,
            "digest": live.identity.digest,
            "last_used": live.used,
            "hits": live.hits,
        }

    def _is_adapter(self, name: str) -> bool:
        component = self.sources.components.get(name)
        return component is not None and component.served

    def _check_alias(self, alias: str, reserved: Collection[str]) -> None:
        if alias in reserved or self._is_adapter(alias):
            raise MergeError("this name is already served")

    def _ad_hoc(self, spec: MergeSpec) -> MergeSpec:
        if self._settings.max_ad_hoc == 0:
            raise SpecError(
                f"this server serves no merges but its aliases: {', '.join(self.aliases) or 'none'}"
            )
        return self._unaliased(self._bounded(spec))

    def _bounded(self, spec: MergeSpec) -> MergeSpec:
        limits = self._settings
        if len(spec.sources) > limits.max_sources:
            raise SpecError(f"{len(spec.sources)} sources; this server merges at most {limits.max_sources}")
        if len(str(spec)) > limits.max_spec_length:
            raise SpecError(
                f"the spec has {len(str(spec))} characters; at most {limits.max_spec_length} are taken"
            )
        strength = amplification(spec)
        if strength > limits.max_strength * (1 + 1e-9):  # but for the rounding of what it is made of
            raise SpecError(
                f"the merge multiplies a source by {strength:.7g}; this server multiplies by at most "
                f"{limits.max_strength:.7g}, use smaller weights or a smaller scale"
            )
        return spec

    def _unaliased(self, spec: MergeSpec) -> MergeSpec:
        aliases = self._aliases.current()
        for name in spec.names:
            if name in aliases and not self._is_adapter(name):
                raise SpecError(f"{name!r} is itself a merge, {aliases[name]}; name its sources instead")
        return spec

    def _check_new(self, identity: MergeIdentity) -> None:
        others = [
            *(live.identity for live in self._known.values()),
            *(other for other, _ in self._making.values()),
        ]
        if any(other.number == identity.number for other in others):
            raise MergeError(NUMBER_TAKEN)
        waiting = len(self._making) - 1
        if waiting >= self._settings.max_waiting and self._making:
            self._metrics.merges.labels(identity.spec.strategy, "busy").inc()
            raise BusyError(waiting, max(1, math.ceil(len(self._making) * self._seconds)))

    async def _make(self, identity: MergeIdentity) -> Live:
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
            return self._remember(Live(identity, facts))
        finally:
            del self._making[identity.digest]
            self._metrics.merges.labels(strategy, result).inc()

    def _remember(self, live: Live) -> Live:
        self._known[live.identity.digest] = live
        while len(self._known) > max(1, self._settings.max_ad_hoc + len(self._aliases.current())):
            self._known.popitem(last=False)
            self._metrics.evictions.labels("merge").inc()
        return live
