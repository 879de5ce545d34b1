"""Brings one file here: in parts, from where an earlier attempt ended, and checked when it is complete."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from merged_lora.errors import FetchError
from merged_lora.locations import Location

from .files import Remote, Report, Store, TransientError

PATIENCE = 30.0
"""Seconds without an answer after which an attempt ends."""
SLOWEST = 1 << 10
"""Bytes a second under which, over :data:`PATIENCE` seconds, a transfer counts as stalled."""
ATTEMPTS = 4
"""Attempts in a row that bring next to nothing, after which a transfer fails."""
PAUSE = 0.5
"""Seconds before the second attempt; twice as many before each further one."""

Found = TypeVar("Found")


def found_in(location: Location, name: str, find: Callable[[str], Found]) -> Found:
    """What a store says of a file, asked again if it fails for a reason that may pass; raises MergeError."""
    return _attempts(location, name, lambda: find(name), lambda: 0)


def transfer(location: Location, store: Store, name: str, remote: Remote, part: Path, report: Report) -> str:
    """Complete the file ``part`` to one in a store; returns its SHA-256.

    location: its place, for errors.
    store:    brings the content.
    remote:   the file as the store described it.
    part:     holds what came in before, or does not exist.

    Raises FetchError, after which ``part`` holds what is known to be a part of the file or does not exist.
    """

    def arrived() -> int:
        return part.stat().st_size if part.exists() else 0

    def attempt() -> None:
        if not remote.tag:
            part.unlink(missing_ok=True)  # nothing shows whether it is a part of the same file
        if arrived() < remote.size:
            _append(location, store, name, remote, part, report)
        if arrived() != remote.size:
            raise TransientError(f"it ended after {arrived()} of {remote.size} bytes")

    try:
        if arrived() > remote.size:
            part.unlink()
        report(arrived())
        _attempts(location, name, attempt, arrived)
        return _checked(location, name, remote, part)
    except FetchError as error:
        if not isinstance(error.__cause__, TransientError):
            part.unlink(missing_ok=True)
        raise
    except OSError as error:
        raise full(location, error) from None


def full(location: Location, error: OSError) -> FetchError:
    """What to say of a disk that does not take what was fetched."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FetchError(
            f"{location}: there is no room left on the disk of the cache; make some, or set MERGED_LORA_CACHE"
        )
    return FetchError(
        f"{location}: the cache cannot be written: {error.strerror or error}; set MERGED_LORA_CACHE"
    )


class Pace:
    """Notices a transfer from a location that goes on too slowly to be one."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._since, self._bytes = time.monotonic(), 0

    def count(self, nbytes: int) -> None:
        """Count what came in; raises FetchError if that is next to nothing for :data:`PATIENCE` seconds."""
        self._bytes += nbytes
        spent = time.monotonic() - self._since
        if spent >= PATIENCE:
            if self._bytes < SLOWEST * spent:
                text = f"it sent {self._bytes} bytes in {spent:.0f} s"
                raise FetchError(f"{self._location}: {text}; try again later") from TransientError(text)
            self._since, self._bytes = time.monotonic(), 0


def _append(location: Location, store: Store, name: str, remote: Remote, part: Path, report: Report) -> None:
    """Write what a store sends behind what is there; raises FetchError if that is too much or too slow."""
    pace = Pace(location)
    with part.open("ab") as written:
        for chunk in store.read(name, remote, written.tell()):
            written.write(chunk)
            if written.tell() > remote.size:
                raise FetchError(
                    f"{location}: {name} has more than the {remote.size} bytes it was said to have"
                )
            report(len(chunk))
            pace.count(len(chunk))
        written.flush()
        os.fsync(written.fileno())


def _checked(location: Location, name: str, remote: Remote, part: Path) -> str:
    """The SHA-256 of a complete file; raises FetchError if the store stated another digest."""
    digests = {algorithm: hashlib.new(algorithm) for algorithm in ("sha256", "md5")}
    with part.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            for digest in digests.values():
                digest.update(chunk)
    if remote.digest is not None and digests[remote.digest[0]].hexdigest() != remote.digest[1]:
        raise FetchError(
            f"{location}: {name} came in with another {remote.digest[0]} than it has there; fetch it again"
        )
    return digests["sha256"].hexdigest()


def _attempts(
    location: Location, name: str, attempt: Callable[[], Found], arrived: Callable[[], int]
) -> Found:
    """The result of a work that is tried again, with pauses, as long as that brings it forward."""
    failures, before = 0, arrived()
    while True:
        try:
            return attempt()
        except TransientError as error:
            failures = failures + 1 if arrived() < before + SLOWEST * PATIENCE else 1
            before = arrived()
            if failures >= ATTEMPTS:
                raise FetchError(f"{location}: {name} cannot be fetched: {error}; try again later") from error
            time.sleep(PAUSE * 2 ** (failures - 1))
