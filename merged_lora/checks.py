"""Checks of single values: each returns the value in canonical form, or raises ValueError.

The messages start with "must be" and follow the name of the option or setting that the value is for.
Knows nothing of specs, strategies or servers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

ALL = "*"
"""The pattern of every module."""
MAX_PATTERNS = 64


def number(value: object) -> float:
    """A finite number; no text, and neither true nor false."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    try:
        finite = float(value)
    except OverflowError:
        raise ValueError("must be a finite number") from None
    if not math.isfinite(finite):
        raise ValueError("must be a finite number")
    return finite + 0.0  # -0.0 becomes 0.0


def whole_number(low: int, high: int) -> Callable[[object], int]:
    """A check for whole numbers from ``low`` to ``high``, both included."""

    def check(value: object) -> int:
        try:
            whole = value if isinstance(value, int) and not isinstance(value, bool) else int(number(value))
        except ValueError:
            raise ValueError(f"must be a whole number from {low} to {high}") from None
        if whole != value or not low <= whole <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return whole

    return check


def one_of(*words: str) -> Callable[[object], str]:
    """A check for one of these words."""

    def check(value: object) -> str:
        if value not in words:
            if len(words) > 2:
                raise ValueError(f"must be one of {', '.join(words)}")
            raise ValueError("must be " + " or ".join(f'"{word}"' for word in words))
        return str(value)

    return check


def flag(value: object) -> bool:
    """Either true or false."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def patterns(value: object) -> str:
    """Patterns of module names in canonical form: sorted, each once, with a space between them."""
    if not isinstance(value, str):
        raise ValueError("must be text: patterns of module names with a space between them")
    found = sorted(set(value.split()))
    if not found or len(found) > MAX_PATTERNS:
        raise ValueError(f"must be 1 to {MAX_PATTERNS} patterns of module names with a space between them")
    if "," in value or not " ".join(found).isprintable():
        raise ValueError("must be patterns of module names with a space between them, and no comma")
    return " ".join(found)


def modules(value: object) -> str:
    """As ``patterns``; ``*`` alone if that is among them, because it matches all that others do."""
    found = patterns(value)
    return ALL if ALL in found.split() else found
