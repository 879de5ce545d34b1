"""Adapters on disk that were fetched from stores and servers, by their content, within a bound.

    adapters/DIGEST/   the files of an adapter; DIGEST depends on their names and content
    places/KEY.json    what was found at a location, whose digest is KEY
    parts/KEY/         files that are not complete, and how many bytes they will have

Files are complete or absent.  Processes may share a cache: each locks what it uses, and no other removes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from merged_lora.errors import FetchError, MergeError
from merged_lora.locations import Location
from merged_lora.scratch import in_place_of

from .files import GIB, Bound, Remote, Report, Store, choose
from .transfer import found_in, full, transfer

LOCK = ".lock"
SIZE = ".size"
ABANDONED = 3600.0
"""Seconds after which a folder that was begun and not finished is removed."""


@dataclass(frozen=True)
class Place:
    """What was found at a location.

    folder:  name of the folder of its files.
    files:   size and tag of each.
    digests: SHA-256 of each.
    """

    folder: str
    files: Mapping[str, tuple[int, str]]
    digests: Mapping[str, str]


class Cache:
    """The adapters in a folder that belongs to this cache.

    root:  the folder, which is made if it is missing.
    limit: most bytes that all adapters may have together.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self._limit = limit
        self._root = root
        self._adapters, self._places, self._parts = root / "adapters", root / "places", root / "parts"

    @contextmanager
    def known(self, location: Location) -> Iterator[Path | None]:
        """The folder of what was fetched from a location before, held meanwhile; None if there is none.

        A MergeError of whoever uses it becomes a FetchError if the folder is damaged, which removes it.
        """
        place = self._place(location)
        with ExitStack() as holds:
            folder = self._hold(place.folder, holds) if place else None
            try:
                yield folder
            except MergeError:
                if folder is not None:
                    self._refuse_damage(location, folder, holds)
                raise

    @contextmanager
    def current(self, location: Location, store: Store, bound: Bound, report: Report) -> Iterator[Path]:
        """The folder of what is at a location at this time, which stays meanwhile; raises MergeError.

        A MergeError of whoever uses it becomes a FetchError if the folder is damaged, which removes it.

        location: the place of the adapter.
        store:    asks and brings what is there; only files that have changed are fetched.
        bound:    on the bytes of the adapter.
        report:   called with the number of bytes that came in.
        """
        with ExitStack() as holds:
            try:
                with self._alone(location) as parts:
                    folder = _Fetch(self, location, store, parts, report).folder(bound, holds)
                    shutil.rmtree(parts, ignore_errors=True)
            except OSError as error:
                raise full(location, error) from None
            try:
                yield folder
            except MergeError:
                self._refuse_damage(location, folder, holds)
                raise

    # What the steps of a fetch need

    def _place(self, location: Location) -> Place | None:
        try:
            found = json.loads((self._places / f"{key_of(location)}.json").read_text(encoding="utf-8"))
            files = {name: (size, tag) for name, (size, tag) in found["files"].items()}
            return Place(found["folder"], files, {name: found["digests"][name] for name in files})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # never fetched, or written by another release: fetched anew

    def _hold(self, folder: str, holds: ExitStack) -> Path | None:
        """The folder of this name, which stays until ``holds`` is closed; None if it is not there."""
        path = self._adapters / folder
        try:
            lock = holds.enter_context((path / LOCK).open("rb+"))
            fcntl.flock(lock, fcntl.LOCK_SH)
            if not os.path.samestat(os.fstat(lock.fileno()), (path / LOCK).stat()):
                return None
            os.utime(path / LOCK)  # the folders that were used last are removed last
        except OSError:
            return None
        return path

    def _refuse_damage(self, location: Location, folder: Path, holds: ExitStack) -> None:
        """Remove a folder if its files are not those that were fetched, and raise FetchError."""
        with suppress(OSError):
            names = [file.name for file in folder.iterdir() if file.name != LOCK]
            if _name_of({name: _digest(folder / name) for name in names}) == folder.name:
                return
        holds.close()
        done = "was removed; try again" if self._remove(folder) else f"is in use; remove {folder}"
        raise FetchError(f"{location}: its copy in the cache was damaged and {done}") from None

    @contextmanager
    def _alone(self, location: Location) -> Iterator[Path]:
        """The folder for parts of files of a location, while no other process fetches from there.

        It stays for another try if it holds parts of files; requests for what is not there leave nothing.
        """
        parts = self._parts / key_of(location)
        with ExitStack() as locked:
            while not _is_locked(parts, locked):
                locked.close()
            try:
                yield parts
            finally:
                if {file.name for file in parts.glob("*")} <= {LOCK, SIZE}:
                    shutil.rmtree(parts, ignore_errors=True)

    def _make_room(self, location: Location, parts: Path, nbytes: int) -> None:
        """Reserve bytes for a fetch, for which what was not used for the longest time is removed."""
        with (self._root / LOCK).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._sweep()
            folders = [*_folders(self._adapters), *(each for each in _folders(self._parts) if each != parts)]
            used = {folder: _bytes_of(folder) for folder in folders}
            missing = sum(used.values()) + nbytes - self._limit
            for folder in sorted(folders, key=_last_use):
                if missing <= 0:
                    break
                if self._remove(folder):
                    missing -= used[folder]
            if missing > 0:
                raise FetchError(
                    f"{location}: the cache in {self._root} is full of what is in use, "
                    f"and {missing / GIB:.3g} GiB are missing; try again later or raise MERGED_LORA_CACHE_GIB"
                )
            (parts / SIZE).write_text(str(nbytes), encoding="utf-8")
        free = shutil.disk_usage(self._root).free + _bytes_of(parts, announced=False)
        if free < nbytes:
            raise FetchError(
                f"{location}: takes {nbytes / GIB:.3g} GiB, and the disk of the cache has {free / GIB:.3g} "
                "GiB left; make room, or set MERGED_LORA_CACHE"
            )

    def _sweep(self) -> None:
        """Remove what processes left that were killed while they removed or added an adapter."""
        for rubbish in self._root.glob(".removed-*"):
            shutil.rmtree(rubbish, ignore_errors=True)
        for scratch in self._root.glob(".made-*"):
            if time.time() - _last_use(scratch) > ABANDONED:
                self._remove(scratch)

    def _remove(self, folder: Path) -> bool:
        """Remove a folder that no process uses; returns whether that was so."""
        rubbish = self._root / f".removed-{secrets.token_hex(8)}"
        with suppress(OSError), (folder / LOCK).open("rb+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder.rename(rubbish)
            shutil.rmtree(rubbish, ignore_errors=True)
            return True
        return False

    def _add(self, files: Mapping[str, Path], digests: Mapping[str, str], holds: ExitStack) -> Path:
        """The folder with these files, which are moved; it stays until ``holds`` is closed."""
        folder = _name_of(digests)
        there = self._hold(folder, holds)
        if there is not None:
            return there
        scratch = self._root / f".made-{secrets.token_hex(8)}"
        scratch.mkdir()
        try:
            lock = holds.enter_context((scratch / LOCK).open("xb"))
            fcntl.flock(lock, fcntl.LOCK_SH)
            for name, file in files.items():
                if file.is_relative_to(self._adapters):
                    _copy(file, scratch / name)
                else:
                    file.rename(scratch / name)
            _sync(scratch)
            self._adapters.mkdir(exist_ok=True)
            with suppress(OSError):  # another process was faster
                scratch.rename(self._adapters / folder)
                return self._adapters / folder
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return self._add({}, digests, holds)

    def _remember(self, location: Location, place: Place) -> None:
        self._places.mkdir(exist_ok=True)
        for old in self._places.glob("*.json"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                if not (self._adapters / json.loads(old.read_text(encoding="utf-8"))["folder"]).is_dir():
                    old.unlink()
        with in_place_of(self._places / f"{key_of(location)}.json") as scratch:
            scratch.write_text(json.dumps({"location": str(location), **asdict(place)}), encoding="utf-8")


class _Fetch:
    """One fetch from a location, while no other process fetches from there."""

    def __init__(self, cache: Cache, location: Location, store: Store, parts: Path, report: Report) -> None:
        self._cache, self._location, self._store = cache, location, store
        self._parts, self._report = parts, report
        self._place = cache._place(location)
        self._old: Path | None = None
        self._digests: dict[str, str] = {}

    def folder(self, bound: Bound, holds: ExitStack) -> Path:
        """The folder with the adapter as it is; see :meth:`Cache.current`."""
        with ExitStack() as old:
            self._old = self._cache._hold(self._place.folder, old) if self._place else None
            chosen = choose(self._location, self._find, self._take, bound)
            place = {name: (remote.size, remote.tag) for name, remote in chosen.items()}
            same = (
                self._place is not None and self._place.files == place and all(t for _, t in place.values())
            )
            made = self._cache._hold(self._place.folder, holds) if self._place is not None and same else None
            if made is not None:
                return made
            self._cache._make_room(self._location, self._parts, sum(size for size, _ in place.values()))
            files = {name: self._take(name, remote) for name, remote in chosen.items()}
            made = self._cache._add(files, self._digests, holds)
            self._cache._remember(self._location, Place(made.name, place, self._digests))
            return made

    def _find(self, name: str) -> Remote | None:
        return found_in(self._location, name, self._store.find)

    def _take(self, name: str, remote: Remote) -> Path:
        """A file that is here: the one that was fetched before, if it is the same and sound, or a new one."""
        if self._old is not None and self._place is not None and remote.tag:
            known = self._place.files.get(name) == (remote.size, remote.tag)
            if known and _digest(self._old / name) == self._place.digests[name]:
                self._digests[name] = self._place.digests[name]
                return self._old / name
        tag = hashlib.sha256(f"{remote.size} {remote.tag}".encode()).hexdigest()[:16]
        part = self._parts / f"{tag}-{name}"
        if not remote.tag:
            part.unlink(missing_ok=True)  # it cannot be known to be a part of the same file
        self._digests[name] = transfer(self._location, self._store, name, remote, part, self._report)
        return part


def _is_locked(parts: Path, locked: ExitStack) -> bool:
    """Wait for the lock of a folder, which is made; returns False if another process removed it meanwhile."""
    parts.mkdir(parents=True, exist_ok=True)
    try:
        lock = locked.enter_context((parts / LOCK).open("ab"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        return os.path.samestat(os.fstat(lock.fileno()), (parts / LOCK).stat())
    except FileNotFoundError:
        return False


def key_of(location: Location) -> str:
    """A name for a location that any file may have."""
    return hashlib.sha256(str(location).encode()).hexdigest()[:32]


def _folders(parent: Path) -> list[Path]:
    return list(parent.iterdir()) if parent.is_dir() else []


def _bytes_of(folder: Path, announced: bool = True) -> int:
    """Bytes of the files in a folder, or those that were announced for it if that is more."""
    total = 0
    with suppress(OSError):
        total = sum(file.stat().st_size for file in folder.iterdir())
    with suppress(OSError, ValueError):
        total = max(total, int((folder / SIZE).read_text(encoding="utf-8")) if announced else 0)
    return total


def _last_use(folder: Path) -> float:
    try:
        return (folder / LOCK).stat().st_mtime
    except OSError:
        return 0.0


def _copy(file: Path, target: Path) -> None:
    try:
        target.hardlink_to(file)
    except OSError:  # a file system without links
        shutil.copyfile(file, target)


def _sync(folder: Path) -> None:
    """Wait until the entries of a folder are on disk; its files are."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _name_of(digests: Mapping[str, str]) -> str:
    """The name of the folder of files with these digests."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
