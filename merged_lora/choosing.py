"""Which modules take part in a merge: the options ``modules`` and ``without``.  Knows names, and no adapters.

A pattern is a run of whole parts of a module's name: ``q_proj``, ``experts``, ``layers.1`` (which is not part
of ``layers.10``).  In it, ``*`` means any characters and ``?`` one, so that ``*.self_attn.*`` is read as
elsewhere.  No other character is special, also not ``[``, which names of experts have.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection
from difflib import get_close_matches

from .checks import ALL
from .errors import PlanError, listed
from .names import shortened


def chosen(names: Collection[str], modules: str, without: str | None) -> list[str]:
    """The names of the modules that take part, sorted.

    names:   of all modules of the sources.
    modules: patterns with a space between them; a module that one of them matches takes part.
    without: patterns of those that are left out of these; None for none.

    Raises PlanError, with names that are near, for a pattern that matches no name, and if nothing is left.
    """
    left = set(names) if modules == ALL else _matched(names, "modules", modules)
    if without is not None:
        left -= _matched(names, "without", without)
    if not left:
        raise PlanError(f'without="{without}" leaves no module of the sources; leave out less')
    return sorted(left)


def chooser(modules: str, without: str | None) -> Callable[[str], bool]:
    """A function that says whether the module of a name takes part; patterns are as for :func:`chosen`."""
    wanted = [_matcher(pattern) for pattern in modules.split()] if modules != ALL else [lambda name: True]
    unwanted = [_matcher(pattern) for pattern in (without or "").split()]
    return lambda name: any(m(name) for m in wanted) and not any(m(name) for m in unwanted)


def _matched(names: Collection[str], option: str, patterns: str) -> set[str]:
    found: set[str] = set()
    for pattern in patterns.split():
        matches = _matcher(pattern)
        own = {name for name in names if matches(name)}
        if not own:
            flag = "--only" if option == "modules" else "--without"
            raise PlanError(
                f"{option} ({flag}): no module of the sources matches {shortened(pattern)!r}; "
                f"{_near(pattern, names)}"
            )
        found |= own
    return found


def _matcher(pattern: str) -> Callable[[str], bool]:
    # Between dots, a run of whole parts is what any characters may surround.
    expression = re.compile(fnmatch.translate(f"*{_dotted(pattern)}*".replace("[", "[[]")))
    return lambda name: expression.match(_dotted(name)) is not None


def _dotted(name: str) -> str:
    """The name with a dot at both ends of every part; an expert's number is a part."""
    return f".{name.replace('[', '.[')}."


def _near(pattern: str, names: Collection[str]) -> str:
    """Names that the pattern may mean, or how names end if none is near."""
    parts = {name: name.split(".") for name in sorted(names)}
    known = sorted({part for own in parts.values() for part in own if not part.isdecimal()})
    words = [word.strip("*?") for word in pattern[:256].split(".")]
    near = {close for word in words if word for close in get_close_matches(word, known, 2, 0.7)}
    if near:
        return f"near: {listed(name for name, own in parts.items() if near & set(own))}"
    return f"their names end in {listed(sorted({own[-1] for own in parts.values()}))}"
