"""Aliases, names for merges: those given when the server started, and changes made at run time.

The API servers of one server share the changes through a file, which is always replaced as a whole.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from merged_lora.errors import MergeError
from merged_lora.spec import MergeSpec, parse

MAX_ALIASES = 1024


class Aliases:
    """The aliases of one server.

    given: the aliases it was started with.
    store: the file of the changes; None if aliases may not change.
    """

    def __init__(self, given: Mapping[str, MergeSpec], store: str | None = None) -> None:
        self._current = dict(given)
        self._store = Path(store) if store is not None else None
        self._stamp: tuple[int, int] | None = None

    def current(self) -> Mapping[str, MergeSpec]:
        """The merge of each alias, as defined now."""
        if self._store is not None:
            try:
                found = self._store.stat()
            except FileNotFoundError:  # nothing has been changed yet
                return self._current
            if (found.st_ino, found.st_mtime_ns) != self._stamp:
                self._current = self._read()
                self._stamp = found.st_ino, found.st_mtime_ns
        return self._current

    def define(self, alias: str, spec: MergeSpec) -> bool:
        """Define an alias; returns whether it is new.  Raises MergeError."""
        with self._changing() as aliases:
            new = alias not in aliases
            if new and len(aliases) >= MAX_ALIASES:
                raise MergeError(f"there are {MAX_ALIASES} aliases; remove one first")
            aliases[alias] = spec
        return new

    def remove(self, alias: str) -> bool:
        """Remove an alias; returns whether there was one."""
        with self._changing() as aliases:
            return aliases.pop(alias, None) is not None

    @contextmanager
    def _changing(self) -> Iterator[dict[str, MergeSpec]]:
        if self._store is None:
            raise MergeError("aliases change at run time only with --merged-lora-runtime-aliases")
        with self._store.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            aliases = dict(self.current())
            yield aliases
            new = self._store.with_suffix(".new")
            new.write_text(
                json.dumps({alias: str(spec) for alias, spec in aliases.items()}), encoding="utf-8"
            )
            new.replace(self._store)

    def _read(self) -> dict[str, MergeSpec]:
        assert self._store is not None
        texts = json.loads(self._store.read_text(encoding="utf-8"))
        return {alias: parse(text) for alias, text in texts.items()}
