"""Keys of PEFT's ``rank_pattern`` and ``alpha_pattern`` that mean one module each.

Readers differ in how they match a key, which is a regular expression. Up to PEFT 0.14, a key is the name of a
module, or matches the end of one after a dot. Later releases and vLLM take modules whose names it matches,
as a whole, or after a dot. The first key that matches decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TypeVar

Value = TypeVar("Value", int, float)

_PLAIN = re.compile(r"[\w.-]+")


def patterns_of(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """The values that are not the default, by keys that every reader takes for the same module.

    values:  a value for each module name.
    default: the value of modules that no key matches.

    A key is the plain name of its module, unless that matches another module's name too.
    """
    if all(value == default for value in values.values()):
        return {}
    ambiguous = _ambiguous(tuple(values))
    # A name without a dot has no key that spares longer names and is understood by older releases of PEFT.
    # It comes last, after those of all names that it matches.
    return {
        _exact(name) if name in ambiguous else name: values[name]
        for name in sorted(values, key=lambda name: "." not in name)
        if values[name] != default or name in ambiguous
    }


def _exact(name: str) -> str:
    """A key for this name alone. It matches after a dot, because older releases of PEFT look nowhere else."""
    head, dot, tail = name.partition(".")
    return rf"(?<=^{re.escape(head)}\.){re.escape(tail)}" if dot else re.escape(name)


@lru_cache(maxsize=16)
def _ambiguous(names: tuple[str, ...]) -> frozenset[str]:
    """Names that match, as a regular expression, the end of another name, and the names that they match.

    The dot of a name matches any character. Names with other special characters count too.
    """
    shapes: dict[int, set[tuple[int, ...]]] = {}  # by length: where names have their dots
    known: dict[tuple[int, tuple[int, ...], str], str] = {}
    for name in names:
        dots = tuple(at for at, character in enumerate(name) if character == ".")
        shapes.setdefault(len(name), set()).add(dots)
        known[len(name), dots, _without(name, dots)] = name
    found = {name for name in names if not _PLAIN.fullmatch(name)}
    for name in names:
        starts = (0, *(at + 1 for at, character in enumerate(name) if character == "."))
        for end in (name[start:] for start in starts):
            for dots in shapes.get(len(end), ()):
                other = known.get((len(end), dots, _without(end, dots)), name)
                if other != name:
                    found |= {name, other}
    return frozenset(found)


def _without(text: str, positions: tuple[int, ...]) -> str:
    """The text without the characters at these positions, in ascending order."""
    starts, ends = (0, *(at + 1 for at in positions)), (*positions, len(text))
    return "".join(text[start:end] for start, end in zip(starts, ends, strict=True))
