"""Checks of single values: each returns the value in canonical form, or raises ValueError.

The messages start with "must be" and follow the name of the option or setting that the value is for.
Knows nothing of specs, strategies or servers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T", covariant=True)

ALL = "*"
"""The pattern of every module."""
MAX_PATTERNS = 64


@dataclass(frozen=True)
class Check(Generic[T]):
    """A check of a value, which is called with it.

    read:   returns the value in canonical form, or raises ValueError.
    schema: what it accepts, in the words of JSON Schema.
    """

    read: Callable[[object], T]
    schema: Mapping[str, object] = field(hash=False)

    def __call__(self, value: object) -> T:
        """The value in canonical form; raises ValueError."""
        return self.read(value)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    try:
        finite = float(value)
    except OverflowError:
        raise ValueError("must be a finite number") from None
    if not math.isfinite(finite):
        raise ValueError("must be a finite number")
    return finite + 0.0  # -0.0 becomes 0.0


number = Check(_number, {"type": "number"})
"""A finite number; no text, and neither true nor false."""


def spelled(value: object) -> object:
    """The number that a text spells; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
    except ValueError:
        return value


def _share(value: object) -> float:
    share = number(value)
    if not 0.0 < share <= 1.0:
        raise ValueError("must be over 0 and at most 1")
    return share


def _unit(value: object) -> float:
    share = number(value)
    if not 0.0 <= share <= 1.0:
        raise ValueError("must be between 0 and 1")
    return share


share = Check(_share, {"type": "number", "exclusiveMinimum": 0, "maximum": 1})
"""A number over 0 and at most 1."""
unit = Check(_unit, {"type": "number", "minimum": 0, "maximum": 1})
"""A number between 0 and 1, both included."""


def whole_number(low: int, high: int) -> Check[int]:
    """A check for whole numbers from ``low`` to ``high``, both included."""

    def check(value: object) -> int:
        try:
            whole = value if isinstance(value, int) and not isinstance(value, bool) else int(number(value))
        except ValueError:
            raise ValueError(f"must be a whole number from {low} to {high}") from None
        if whole != value or not low <= whole <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return whole

    return Check(check, {"type": "integer", "minimum": low, "maximum": high})


def one_of(*words: str) -> Check[str]:
    """A check for one of these words."""

    def check(value: object) -> str:
        if value not in words:
            if len(words) > 2:
                raise ValueError(f"must be one of {', '.join(words)}")
            raise ValueError("must be " + " or ".join(f'"{word}"' for word in words))
        return str(value)

    return Check(check, {"type": "string", "enum": list(words)})


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


flag = Check(_flag, {"type": "boolean"})
"""Either true or false."""


def _patterns(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text: patterns of module names with a space between them")
    found = sorted(set(value.split()))
    if not found or len(found) > MAX_PATTERNS:
        raise ValueError(f"must be 1 to {MAX_PATTERNS} patterns of module names with a space between them")
    if "," in value or not " ".join(found).isprintable():
        raise ValueError("must be patterns of module names with a space between them, and no comma")
    return " ".join(found)


def _modules(value: object) -> str:
    found = patterns(value)
    return ALL if ALL in found.split() else found


patterns = Check(_patterns, {"type": "string"})
"""Patterns of module names in canonical form: sorted, each once, with a space between them."""
modules = Check(_modules, {"type": "string"})
"""As ``patterns``; ``*`` alone if that is among them, because it matches all that others do."""
