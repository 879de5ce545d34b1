"""In each API server: from what a request says to the adapter that serves it.

Knows the names of adapters and aliases and the content digests that the workers reported; holds no weights.
vLLM is reached through two functions given at construction, so that this file imports none of it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass

from merged_lora.errors import MergeError, SpecError
from merged_lora.plan import check_names
from merged_lora.spec import MergeSpec, from_json, is_spec, parse

from .identity import NUMBER_TAKEN, MergeIdentity
from .worker import Reply, raise_failure

KNOWN_MERGES = 256  # merges remembered as prepared; an older one is prepared again when it is asked for


@dataclass(frozen=True)
class Component:
    """A registered adapter as a source: its content digest, or why it cannot be merged."""

    digest: str | None
    refusal: str = ""


class MergeGate:
    """The merges that this server has promised.

    aliases: names that stand for a merge, as in ``--merged-lora-modules``.
    capture: asks every worker to read an adapter's path.  prepare: asks every worker to make a merge.
    changes: the lock under which adapters are loaded and unloaded, so that vLLM's list and this one agree.
    """

    def __init__(
        self,
        aliases: Mapping[str, MergeSpec],
        capture: Callable[[str], Awaitable[Reply]],
        prepare: Callable[[str], Awaitable[Reply]],
    ) -> None:
        self.aliases = dict(aliases)
        self.components: dict[str, Component] = {}
        self.changes = asyncio.Lock()
        self._capture = capture
        self._prepare = prepare
        self._known: OrderedDict[str, MergeIdentity] = OrderedDict()
        self._making: dict[str, tuple[MergeIdentity, asyncio.Task[None]]] = {}
        self._turn = asyncio.Semaphore(1)

    def check_aliases(self, reserved: Collection[str]) -> None:
        """Raise MergeError where an alias hides a served name or merges what is not registered."""
        for alias, spec in self.aliases.items():
            if alias in reserved or alias in self.components:
                raise MergeError(f"--merged-lora-modules {alias}: this name is already served")
            try:
                self.identify(spec)
            except MergeError as error:
                raise MergeError(f"--merged-lora-modules {alias}: {error}") from None

    async def register(self, name: str, path: str) -> None:
        """Take a newly loaded adapter as a source; one that cannot be merged is kept with the reason.

        Call it, and what loads or unloads the adapter, under ``changes``.
        """
        reply = await self._capture(path)
        if reply["ok"]:
            self.components[name] = Component(reply["digest"])
        else:
            self.components[name] = Component(None, reply["error"])

    def forget(self, name: str) -> None:
        """Take an adapter out of the sources; merges already made of it go on."""
        self.components.pop(name, None)

    def asked_for(self, model: str | None, body: object, served: Callable[[str], bool]) -> MergeSpec | None:
        """The merge that a request asks for, None where it asks for none; raises MergeError.

        model: the request's model.  body: its ``merged_adapters``, or None.  served: whether vLLM itself
        serves a name.
        """
        if body is not None:
            if model and not served(model):
                raise SpecError('"merged_adapters" goes with the base model\'s name in "model"')
            return self._unaliased(from_json(body))
        if not model or served(model) or model in self.components:
            return None
        if model in self.aliases:
            return self.aliases[model]
        return self._unaliased(parse(model)) if is_spec(model) else None

    def identify(self, spec: MergeSpec) -> MergeIdentity:
        """The merge of what its names stand for now; raises MergeError."""
        check_names(self._unaliased(spec), self.components)
        contents = []
        for name in spec.names:
            component = self.components[name]
            if component.digest is None:
                raise MergeError(f"{name!r} is served, but cannot be merged: {component.refusal}")
            contents.append(component.digest)
        return MergeIdentity(spec, tuple(contents))

    async def ready(self, spec: MergeSpec) -> MergeIdentity:
        """The merge, made and checked on every worker: once, however many requests ask at a time.

        All who wait for it get its outcome, a failure too.  New merges are made one after the other.
        """
        identity = self.identify(spec)
        if identity.digest in self._known:
            self._known.move_to_end(identity.digest)
            return identity
        if identity.digest not in self._making:
            others = [*self._known.values(), *(other for other, _ in self._making.values())]
            if any(other.number == identity.number for other in others):
                raise MergeError(NUMBER_TAKEN)
            self._making[identity.digest] = identity, asyncio.create_task(self._make(identity))
        # Shielded: a client that leaves must not take the merge from the others who wait for it.
        await asyncio.shield(self._making[identity.digest][1])
        return identity

    async def _make(self, identity: MergeIdentity) -> None:
        try:
            async with self._turn:
                raise_failure(await self._prepare(identity.path))
            self._known[identity.digest] = identity
            while len(self._known) > KNOWN_MERGES:
                self._known.popitem(last=False)
        finally:
            del self._making[identity.digest]

    def _unaliased(self, spec: MergeSpec) -> MergeSpec:
        for name in spec.names:
            if name in self.aliases and name not in self.components:
                raise SpecError(f"{name!r} is itself a merge, {self.aliases[name]}; name its sources instead")
        return spec
