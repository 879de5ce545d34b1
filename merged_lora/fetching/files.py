"""Which files of an adapter are fetched: configuration, safetensors and calibration, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from merged_lora.calibration import CALIBRATION_NAME
from merged_lora.errors import AdapterError, NotFoundError
from merged_lora.files.layout import CONFIG_NAME, WEIGHTS_NAME
from merged_lora.files.opening import INDEX_NAMES, MAX_JSON, PICKLES, WEIGHTS, read_index
from merged_lora.locations import Location

MAX_SHARDS = 1024
GIB = 1 << 30

Report = Callable[[int], object]
"""Called with the number of bytes that came in since the last call."""


class TransientError(Exception):
    """What prevented a transfer may go away by itself; the message says what it was."""


@dataclass(frozen=True)
class Remote:
    """A file of an adapter that is elsewhere.

    size:   in bytes.
    tag:    changes with the content; empty if there is nothing that does.
    digest: what its content hashes to, as the algorithm and hexadecimal digits; None if that is unknown.
    """

    size: int
    tag: str
    digest: tuple[str, str] | None = None


@dataclass(frozen=True)
class Bound:
    """How many bytes an adapter may have, and what raises that."""

    nbytes: int
    way_out: str


class Store(Protocol):
    """A folder elsewhere.  They raise MergeError, or TransientError if another attempt is worth it."""

    def find(self, name: str) -> Remote | None:
        """The file of this name; None if there is none."""

    def read(self, name: str, remote: Remote, start: int) -> Iterator[bytes]:
        """The content of a file from byte ``start`` on; raises FetchError if it is not that file any more."""


def choose(
    location: Location,
    find: Callable[[str], Remote | None],
    take: Callable[[str, Remote], Path],
    bound: Bound,
) -> dict[str, Remote]:
    """The files of an adapter that are fetched, by name.

    location: its place, for errors.
    find:     the file of a name, None if there is none.
    take:     fetches a small file.
    bound:    on the bytes of all of them.

    Raises NotFoundError if there is no adapter, AdapterError if there is none that can be used.
    """

    def look(name: str) -> Remote | None:
        remote = find(name)
        if remote is not None and remote.size < 1:
            raise AdapterError(f"{location}: {name} has {remote.size} bytes; no file of an adapter is empty")
        return remote

    config = look(CONFIG_NAME)
    if config is None:
        raise NotFoundError(f"{location}: holds no {CONFIG_NAME}")
    chosen = {CONFIG_NAME: _small(location, CONFIG_NAME, config), **_weights(location, look, take)}
    calibration = look(CALIBRATION_NAME)
    if calibration is not None:
        chosen[CALIBRATION_NAME] = calibration
    total = sum(remote.size for remote in chosen.values())
    if total > bound.nbytes:
        raise AdapterError(
            f"{location}: its files have {total / GIB:.3g} GiB, the limit is {bound.nbytes / GIB:.3g} GiB; "
            f"{bound.way_out}"
        )
    return chosen


def _weights(
    location: Location, find: Callable[[str], Remote | None], take: Callable[[str, Remote], Path]
) -> dict[str, Remote]:
    """The file of the weights, or the index and the shards; raises as :func:`choose` does."""
    for name in WEIGHTS:
        found = find(name)
        if found is None:
            continue
        if name not in INDEX_NAMES:
            return {name: found}
        chosen = {name: _small(location, name, found)}
        for shard in _shards(location, name, take(name, found)):
            remote = find(shard)
            if remote is None:
                raise NotFoundError(f"{location}: {name} names {shard}, which is not there")
            chosen[shard] = remote
        return chosen
    pickled = next((name for name in PICKLES if find(name) is not None), None)
    if pickled is not None:
        raise AdapterError(
            f"{location}: its weights are pickled ({pickled}) and never fetched; save them as safetensors"
        )
    raise NotFoundError(f"{location}: holds no {WEIGHTS_NAME}")


def _small(location: Location, name: str, remote: Remote) -> Remote:
    if remote.size > MAX_JSON:
        raise AdapterError(f"{location}: {name} has {remote.size} bytes, the limit is {MAX_JSON}")
    return remote


def _shards(location: Location, name: str, index: Path) -> list[str]:
    """The files that an index names, which is here; raises AdapterError."""
    try:
        files = set(read_index(index).values())
    except AdapterError as error:  # a folder of a cache says nothing to a user
        raise AdapterError(str(error).replace(str(index), f"{location}/{name}")) from None
    if not 0 < len(files) <= MAX_SHARDS:
        raise AdapterError(
            f"{location}: {name} names {len(files)} files, at least 1 and at most {MAX_SHARDS} fit"
        )
    return sorted(files)
