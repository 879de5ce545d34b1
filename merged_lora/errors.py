"""What a user can get wrong, each kind with a message that names the problem and the way out.

Knows nothing of HTTP or of the command line: those map the kinds to a status or an exit code.
"""

from collections.abc import Iterable


class MergeError(Exception):
    """A merge that cannot be done as asked; the message says what to do instead."""


class SpecError(MergeError):
    """The text or JSON that names a merge is malformed, or an option is wrong."""


class UnknownStrategyError(SpecError):
    """The spec names a strategy that the table does not hold."""


class UnknownAdapterError(MergeError):
    """The spec names a source that nobody has given a place."""


class AdapterError(MergeError):
    """An adapter's files are missing, damaged, contradictory, or hold what no merge supports."""


class PlanError(MergeError):
    """The sources are sound, but do not fit together or do not fit the rank limit."""


class BackendError(MergeError):
    """The backend asked for does not exist or cannot be loaded here."""


def listed(names: Iterable[object], limit: int = 8) -> str:
    """The names as one readable line: sorted by the caller, cut after ``limit`` with a count of the rest."""
    items = [str(name) for name in names]
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")
