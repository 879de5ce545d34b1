"""Names that merges have on a server."""

from __future__ import annotations

from .errors import MergeError, SpecError
from .spec import MergeSpec, Source, check_own_name

CHECK = "check"
"""Last part of the route that replays a merge; no alias has this name."""


def check_alias_name(name: str) -> None:
    """Raise MergeError for a name that no adapter could have, or that is a route in ``/v1/merged_lora``.

    A name that reads as a merge is refused too, because the alias may be another one.
    """
    if name == CHECK:
        raise MergeError(f"alias {name!r}: POST /v1/merged_lora/{CHECK} is a route; take another name")
    try:
        check_own_name(name)
        MergeSpec("sum", (Source(name),))
    except SpecError as error:
        raise MergeError(f"alias {name[:64]!r}: {error}") from None
