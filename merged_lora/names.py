"""The names of adapters: which characters they may hold.

Knows nothing of specs: ``spec.check_own_name`` refuses a name that reads as one.
"""

from __future__ import annotations

import re
import unicodedata

from .errors import SpecError

MAX_NAME = 256
LONGEST_SHOWN = 64

_CONTROL = ("Cc", "Cs")
_UNSEEN = ("Cf", "Zl", "Zp")
_IGNORABLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8"
    "\U000e0000-\U000e0fff]"
)
"""Characters of other categories that leave no mark: Unicode's default ignorables; the blank of Braille."""


def shortened(name: str) -> str:
    """The name as a message shows it: at most LONGEST_SHOWN characters."""
    return name if len(name) <= LONGEST_SHOWN else name[: LONGEST_SHOWN - 3] + "..."


def check_text(name: object) -> None:
    """Raise SpecError for a name that is not text."""
    if not isinstance(name, str):
        raise SpecError(f"an adapter's name is text, not {type(name).__name__}")


def checked_name(name: str) -> str:
    """The name of a source of a merge as it is; raises SpecError for one that no source may have."""
    check_text(name)
    shown = shortened(name)
    if not name or len(name) > MAX_NAME:
        raise SpecError(f"an adapter's name has 1 to {MAX_NAME} characters, {shown!r} has {len(name)}")
    check_characters(name)
    if name.startswith(("/", "\\", "~")) or ".." in re.split(r"[/\\]", name):
        raise SpecError(
            f"adapter name {shown!r} is a path; use the name under which the adapter is registered"
        )
    return name


def check_characters(name: str) -> None:
    """Raise SpecError for a name with a character that cannot be seen, by which it could pass for another."""
    if name.isascii() and name.isprintable():
        return
    for character in name:
        category = unicodedata.category(character)
        if category in _CONTROL:
            what = "a control character"
        elif category in _UNSEEN or _IGNORABLE.match(character):
            what = "an invisible character"
        else:
            continue
        raise SpecError(f"adapter name {shortened(name)!a} holds {what}, U+{ord(character):04X}")


def printable(text: str) -> str:
    """The text on one line: names and paths may contain line ends, terminal codes or undecodable bytes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
