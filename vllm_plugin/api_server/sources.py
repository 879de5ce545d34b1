"""The adapters that an API server may merge: their names, and the keys of their copies in the workers.

Holds no weights.  The workers are reached through functions given at construction.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merged_lora.errors import AdapterError, MergeError
from merged_lora.files.layout import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from merged_lora.locations import parse
from merged_lora.lru import Lru
from merged_lora.vllm_plugin.rpc import CacheFullError, Reply, raise_failure
from merged_lora.vllm_plugin.settings import Settings

from .fetched import Fetches, is_location
from .metrics import Metrics
from .workers import Workers

logger = logging.getLogger("vllm.merged_lora")

Stamp = tuple[tuple[int, int, int], ...]
"""Inode, size and time of change of each file of an adapter."""


@dataclass(frozen=True)
class Component:
    """An adapter as a source.

    key:     key of its copy in the workers; None if there is no copy.
    refusal: why it cannot be merged; empty if it can.
    nbytes:  bytes of the copy.
    served:  whether vLLM serves it under its name too.
    stamp:   stamp of its files when they were read.
    """

    key: str | None
    refusal: str = ""
    nbytes: int = 0
    served: bool = False
    stamp: Stamp = ()


class Sources:
    """The adapters that may be merged, by name.

    workers: hold the copies.
    metrics: counts evictions and bytes.
    settings: with the folder of sources, and the locations from which others are fetched.

    Adapters change under the lock ``changes``, so that vLLM's list and this one agree.  ``held`` is the bytes
    of all copies over all ranks, ``largest`` those of the largest merge that the model allows in a worker.
    """

    def __init__(self, workers: Workers, metrics: Metrics, settings: Settings) -> None:
        self.changes = asyncio.Lock()
        self.held = 0
        self.largest = 0
        self._metrics = metrics
        self._workers = workers
        self.fetches: Fetches[Component] = Fetches(settings, self._take)
        self._folder = Path(settings.source_dir) if settings.source_dir is not None else None
        self._components: Lru[str, Component] = Lru()
        self._leases: dict[int, tuple[str, ...]] = {}  # shrinks whenever a request dies: iterate over a copy
        self._next_lease = 0

    @property
    def components(self) -> Mapping[str, Component]:
        """All known sources, least recently used first; those in the folder once a request has named them."""
        return self._components

    # Adapters that vLLM serves

    async def copy(self, path: str, options: Mapping[str, Any]) -> Component:
        """Copy an adapter that vLLM is about to load, under ``changes``; the result is for :meth:`serve`.

        path:    folder of the adapter, or its name on the hub.
        options: how vLLM reads it.

        Raises MergeError if vLLM would refuse the adapter or the copy does not fit.  One that vLLM
        accepts but no merge can take is copied too, with the reason.
        """
        reply = await self._copied(path, options)
        return Component(reply["key"], reply["refusal"], reply["nbytes"], served=True)

    async def serve(self, name: str, component: Component) -> None:
        """Make an adapter that vLLM has loaded a source under its name, under ``changes``."""
        self._components[name] = component
        await self.trim()

    async def forget(self, name: str) -> None:
        """Remove an adapter from the sources, under ``changes``; its merges in progress go on."""
        self._components.pop(name, None)
        await self.trim()

    # Adapters in the folder, and those that are fetched

    async def refresh(self, names: Iterable[str], request: object, patient: bool = False) -> None:
        """Read the adapters that are named, if they are elsewhere or in the folder, and new or changed.

        names:   names of sources; those of other adapters are left alone.
        request: the copies are leased to it; see :meth:`lease`.
        patient: wait for what is fetched as long as it takes.

        If a folder vanishes or cannot be read any more, its copy stays and that is logged; if there is no
        copy, the reason is stored with the name.  Raises CacheFullError; if a source cannot be fetched, or
        not soon, FetchError, NotFoundError or ForbiddenError.
        """
        own = [name for name in names if name not in self._components or not self._components[name].served]
        await self._fetch([name for name in own if is_location(name)], request, patient)
        for name in own if self._folder is not None else ():
            if is_location(name):
                continue
            found = await asyncio.to_thread(self._find, name)
            component = self._components.get(name)
            if found is None:
                if component is not None and component.key is None:
                    del self._components[name]
                elif component is not None and component.stamp:
                    logger.warning("source %r is gone from its folder; its copy in memory stays", name)
                    component = self._components[name] = replace(component, stamp=())
                self._lease(component, request)
                continue
            path, stamp = found
            if component is None or component.stamp != stamp:
                async with self.changes:
                    component = self._components.get(name)  # it may have been read in the meantime
                    if component is None or (not component.served and component.stamp != stamp):
                        component = self._components[name] = await self._read(name, path, stamp, component)
                        await self.trim()
            self._lease(component, request)

    async def _fetch(self, names: Iterable[str], request: object, patient: bool) -> None:
        """Fetch the sources that are new; those that are known are looked for again meanwhile."""
        coming = []
        for name in names:
            self.fetches.allowed(name)
            component = self._components.get(name)
            if component is None:
                coming.append(self.fetches.begin(name))
                continue
            self._lease(component, request)
            if not self.fetches.is_fresh(name):
                with suppress(MergeError):  # which is logged, and the copy stays
                    self.fetches.begin(name)
        until = None if patient else self.fetches.deadline()
        for fetch in coming:
            self._lease(await self.fetches.wait(fetch, until), request)

    async def _take(self, name: str, folder: Path) -> Component:
        """The source that was fetched into a folder, read anew if it is another than before.

        Raises AdapterError if it cannot be read, which also shows its fetch that its copy may be damaged.
        """
        stamp = await asyncio.to_thread(_stamp, _files(folder))
        async with self.changes:
            component = self._components.get(name)
            if component is None or (not component.served and component.stamp != stamp):
                try:
                    reply = await self._copied(str(folder), None)
                except CacheFullError:  # there may be room for the next request
                    raise
                except MergeError as error:
                    raise AdapterError(f"{name!r} cannot be merged: {error}") from None
                component = self._components[name] = Component(
                    reply["key"], nbytes=reply["nbytes"], stamp=stamp
                )
                await self.trim()
        # Whoever waits for it takes a lease when its turn comes; until then, this one keeps the copy.
        self._lease(component, asyncio.current_task())
        return component

    @asynccontextmanager
    async def folder_of(self, path: str, trusted: bool) -> AsyncIterator[str]:
        """The folder of an adapter that vLLM is about to load, fetched if need be; raises MergeError.

        path:    the folder, or a location with its scheme; anything else is vLLM's own business.
        trusted: whether the operator named it; otherwise it must be allowed.
        """
        if not is_location(path):
            yield path
            return
        location = parse(path) if trusted else self.fetches.allowed(path)
        async with self.fetches.folder(location) as folder:
            yield str(folder)

    async def _read(self, name: str, path: str, stamp: Stamp, component: Component | None) -> Component:
        try:
            reply = await self._copied(path, None)
        except CacheFullError:  # there may be room for the next request
            raise
        except MergeError as error:
            if component is not None and component.key is not None:
                logger.warning(
                    "source %r changed and cannot be read (%s); its copy in memory stays", name, error
                )
                return replace(component, stamp=stamp)
            return Component(None, str(error), stamp=stamp)
        return Component(reply["key"], nbytes=reply["nbytes"], stamp=stamp)

    def _find(self, name: str) -> tuple[str, Stamp] | None:
        """Path and stamp of the adapter of that name in the folder; None if there is none."""
        assert self._folder is not None
        if name != Path(name).as_posix() or any(part.startswith(".") for part in Path(name).parts):
            return None  # one folder has one name
        try:
            folder = (self._folder / name).resolve()
            if not folder.is_relative_to(self._folder) or not (folder / CONFIG_NAME).is_file():
                return None
            found = _files(folder)
            outside = [file.name for file in found if not file.resolve().is_relative_to(self._folder)]
            if outside:
                raise AdapterError(f"{name!r}: {outside[0]} is a link out of the folder of sources")
            return str(folder), _stamp(found)
        except (OSError, RuntimeError):
            # A name too long for the file system, files that vanish in the meantime, a circle of links.
            return None

    # Copies

    def key(self, name: str) -> str:
        """The key of a source's copy; raises MergeError if it cannot be merged."""
        component = self._components[name]
        if component.key is None or component.refusal:
            served = "is served, but cannot" if component.served else "cannot"
            raise MergeError(f"{name!r} {served} be merged: {component.refusal}")
        self._components.use(name)
        return component.key

    def lease(self, request: object, keys: tuple[str, ...]) -> None:
        """Keep the copies under these keys for as long as a request lives."""
        self._next_lease += 1
        self._leases[self._next_lease] = keys
        weakref.finalize(request, self._leases.pop, self._next_lease).atexit = False

    def hold(self, name: str | None, request: object) -> None:
        """Lease the copy of the adapter that a request names, if it names one."""
        component = self._components.get(name or "")
        if component is not None and component.served:
            self._lease(component, request)

    def _lease(self, component: Component | None, request: object) -> None:
        if component is not None and component.key is not None:
            self.lease(request, (component.key,))

    async def _copied(self, path: str, options: Mapping[str, Any] | None) -> Reply:
        """The reply about a new copy; if the cache is full, idle copies of the folder make room for it."""
        while True:
            reply = await self._workers.capture(self._needed(), path, options)
            if reply["ok"] or reply["kind"] != "full" or not self._drop_idle(reply["missing"]):
                raise_failure(reply)
                self._hold(reply)
                self.largest = reply["largest"]
                return reply

    def _drop_idle(self, missing: int) -> bool:
        """Drop the least recently used copies of the folder; returns whether there were any."""
        leased = {key for keys in list(self._leases.values()) for key in keys}
        dropped = False
        for name, component in list(self._components.items()):
            if missing <= 0:
                break
            if component.served or component.key is None or component.key in leased:
                continue
            del self._components[name]
            missing -= component.nbytes
            self._metrics.evictions.labels("source").inc()
            dropped = True
        return dropped

    async def trim(self) -> None:
        """Let the workers drop the copies that are no longer needed, under ``changes``."""
        reply = await self._workers.release(self._needed())
        raise_failure(reply)
        self._hold(reply)

    def _hold(self, reply: Reply) -> None:
        self.held = reply["held"]
        self._metrics.held.set(self.held)

    def _needed(self) -> list[str]:
        needed = {component.key for component in self._components.values() if component.key is not None}
        return sorted(needed.union(*list(self._leases.values())))


def _files(folder: Path) -> list[Path]:
    """The files of the adapter in a folder."""
    named = (folder / CONFIG_NAME, folder / WEIGHTS_NAME, folder / INDEX_NAME)
    files = dict.fromkeys([*named, *sorted(folder.glob("*.safetensors"))])
    return [file for file in files if file.exists()]


def _stamp(files: Iterable[Path]) -> Stamp:
    return tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in map(Path.stat, files))
