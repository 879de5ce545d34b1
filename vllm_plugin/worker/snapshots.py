"""Copies of adapters in a worker's memory: limited in size, shared by content, kept while they are needed.

Knows nothing of vLLM or of merging.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from merged_lora.errors import AdapterError
from merged_lora.vllm_plugin.rpc import CacheFullError
from merged_lora.vllm_plugin.settings import GIB

Copy = TypeVar("Copy")


@dataclass(frozen=True)
class _Entry(Generic[Copy]):
    copy: Copy
    nbytes: int


class Snapshots(Generic[Copy]):
    """Copies by key.  Each owner (an API server) says which it needs; a copy that nobody needs is dropped.

    One thread changes it; any thread may ask whether there is a copy, or room for one more.

    limit: largest number of bytes of all copies together.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: dict[str, _Entry[Copy]] = {}
        self._needs: dict[str, set[str]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(entry.nbytes for entry in list(self._entries.values()))

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Copy:
        return self._entries[key].copy

    def get(self, key: str) -> Copy | None:
        """The copy under a key; None if there is none."""
        entry = self._entries.get(key)
        return entry.copy if entry is not None else None

    def keep(self, owner: str, needed: Collection[str]) -> set[str]:
        """Drop the copies that no owner needs, given that this one needs only these; returns their keys."""
        self._needs[owner] = set(needed)
        kept = set().union(*self._needs.values())
        dropped = set(self._entries) - kept
        for key in dropped:
            del self._entries[key]
        return dropped

    def check_room(self, nbytes: int) -> None:
        """Raise CacheFullError if there is no room for that many more bytes."""
        total = self.nbytes + nbytes
        if total > self.limit:
            raise CacheFullError(
                f"this adapter and those in memory take {total / GIB:.3g} GiB together, "
                f"--merged-lora-cache-gib allows {self.limit / GIB:.3g}",
                total - self.limit,
            )

    def check_size(self, nbytes: int) -> None:
        """Raise AdapterError if that many bytes do not fit even if everything else is dropped."""
        if nbytes > self.limit:
            raise AdapterError(
                f"the adapter takes {nbytes / GIB:.3g} GiB, "
                f"--merged-lora-cache-gib allows {self.limit / GIB:.3g}"
            )

    def add(self, owner: str, key: str, copy: Copy, nbytes: int, replace: bool = False) -> None:
        """Keep a copy for an owner; raises CacheFullError.

        owner:   the API server that needs it.
        key:     key of the copy.
        copy:    the copy itself.
        nbytes:  its size.
        replace: the copy replaces one with the same key; without it, the one that is there stays.
        """
        if key not in self._entries or replace:
            old = self._entries[key].nbytes if key in self._entries else 0
            self.check_room(nbytes - old)
            self._entries[key] = _Entry(copy, nbytes)
        self._needs.setdefault(owner, set()).add(key)
