"""From a path or a location to a folder here that holds the adapter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from merged_lora.errors import AdapterError, FetchError, NotFoundError
from merged_lora.locations import Location, hub_hint, locate

from . import transfer
from .cache import Cache
from .files import GIB, Bound, Report, Store

CACHE_GIB = 32.0


@contextmanager
def local_folder(
    source: str | os.PathLike[str] | Location, limit: Bound | None = None, report: Report | None = None
) -> Iterator[Path]:
    """The folder with an adapter, which is fetched if it is elsewhere; nothing removes it meanwhile.

    source: a path, or a location such as ``hf:org/repo``; :func:`merged_lora.locations.locate` has the rules.
    limit:  on the bytes of an adapter that is fetched; by default, the size of the cache.
    report: called with the number of bytes that came in; by default, a bar is shown on a terminal.

    What is in the cache and did not change is not fetched again.  Raises MergeError.
    """
    location = source if isinstance(source, Location) else locate(source)
    if isinstance(location, Path):
        if not os.path.lexists(location) and hub_hint(location):
            raise AdapterError(f"{location}: no such adapter folder{hub_hint(location)}")
        yield location
        return
    with _bar(location, report) as counted, ExitStack() as held:
        try:
            folder = held.enter_context(_fetched(location, limit, counted))
        except (FetchError, NotFoundError) as error:
            if isinstance(source, str) and location.kind == "hf" and not source.startswith("hf:"):
                raise type(error)(f"{error}; there is no folder {source} here either") from None
            raise
        yield folder


def cache() -> Cache:
    """The cache of stores and servers, as the environment has it; raises AdapterError for a wrong setting."""
    folder = os.environ.get("MERGED_LORA_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Cache(Path(folder) if folder else Path(home) / "merged-lora", _cache_bound().nbytes)


def _cache_bound() -> Bound:
    text = os.environ.get("MERGED_LORA_CACHE_GIB") or str(CACHE_GIB)
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0 < gib < 1 << 20:
        raise AdapterError(f"MERGED_LORA_CACHE_GIB must be a number of GiB above 0, got {text[:64]!r}")
    return Bound(int(gib * GIB), "raise MERGED_LORA_CACHE_GIB")


@contextmanager
def _fetched(location: Location, limit: Bound | None, report: Report) -> Iterator[Path]:
    offline = os.environ.get("MERGED_LORA_OFFLINE", "0") not in ("", "0")
    bound = min(filter(None, (limit, _cache_bound())), key=lambda bound: bound.nbytes)
    if location.kind == "hf":
        from . import hub

        yield hub.fetch(location, bound, report, offline)
        return
    if offline:
        with cache().known(location) as folder:
            if folder is None:
                raise FetchError(
                    f"{location}: not in the cache, and MERGED_LORA_OFFLINE is set; leave it out"
                )
            yield folder
        return
    with cache().current(location, _store(location), bound, report) as folder:
        yield folder


def _store(location: Location) -> Store:
    from . import cloud, https

    kinds: dict[str, Callable[[Location, float], Store]] = {
        "s3": cloud.S3Store,
        "gs": cloud.GcsStore,
        "https": https.HttpsStore,
    }
    return kinds[location.kind](location, transfer.PATIENCE)


@contextmanager
def _bar(location: Location, report: Report | None) -> Iterator[Report]:
    if report is not None:
        yield report
        return
    from tqdm import tqdm

    # disable=None: a bar is shown only if stderr is a terminal
    with tqdm(desc=str(location), unit="B", unit_scale=True, leave=False, disable=None) as bar:
        yield bar.update
