"""What a message says of the names that exist, when a request has named none of them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from merged_lora.errors import listed
from merged_lora.names import LONGEST_SHOWN, shortened

SHOWN = 12
"""Number of names that a message lists."""
COMPARED = 1000
"""Number of names that are compared with the wrong one, by as many characters as messages show."""


def names_instead(wrong: str, names: Iterable[str]) -> str:
    """A sentence with the closest of the names, if one is close, and one that lists them: under 1,000 signs.

    wrong: the name that nothing has.
    names: adapters and aliases.
    """
    short = {name: shortened(name) for name in sorted(names)}
    folded = {name[:LONGEST_SHOWN].casefold(): shown for name, shown in list(short.items())[:COMPARED]}
    close = get_close_matches(wrong[:LONGEST_SHOWN].casefold(), folded, 1)
    hint = f"Did you mean `{folded[close[0]]}`? " if close else ""
    return f"{hint}Adapters and merges: {listed(short.values(), SHOWN) or 'none'}."
