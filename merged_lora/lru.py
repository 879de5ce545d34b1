"""A dictionary in the order of last use.  Knows nothing of what it holds, and is not safe between threads."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Lru(OrderedDict[Key, Value]):
    """Entries from the least to the most recently used; whoever adds one says how many may stay."""

    def use(self, key: Key) -> Value | None:
        """The value of a key, which is then the most recently used one; None if there is none."""
        if key not in self:
            return None
        self.move_to_end(key)
        return self[key]

    def add(self, key: Key, value: Value, limit: int) -> int:
        """Store a value as the most recently used one; returns how many others were dropped for it.

        limit: number of entries that may stay, at least 1.
        """
        self[key] = value
        self.move_to_end(key)
        dropped = max(0, len(self) - limit)
        for _ in range(dropped):
            self.popitem(last=False)
        return dropped
