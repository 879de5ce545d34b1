"""Checks of single values: each returns the value in canonical form, or raises ValueError.

The messages start with "must be" and follow the name of the option or setting that the value is for.
Knows nothing of specs, strategies or servers.
"""

from __future__ import annotations

import math
from collections.abc import Callable


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
