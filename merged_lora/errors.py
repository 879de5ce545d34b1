"""The mistakes that a user can make; each message names the problem and the way out.

Knows nothing of HTTP or the command line, which map these classes to a status or an exit code.
"""

from collections.abc import Iterable


class MergeError(Exception):
    """A merge cannot be made as asked; the message says what to do instead."""


class SpecError(MergeError):
    """The text or JSON that names a merge is malformed, or an option is wrong."""


class UnknownStrategyError(SpecError):
    """The spec names a strategy that is not in the table."""


class UnknownAdapterError(MergeError):
    """The spec names a source whose location is unknown."""


class AdapterError(MergeError):
    """An adapter's files are missing, damaged or contradictory, or use what no merge supports."""


class FetchError(MergeError):
    """An adapter could not be fetched from where it is kept; an attempt after ``seconds`` may succeed."""

    seconds = 10


class NotFoundError(MergeError):
    """There is no adapter where one should be fetched from."""


class ForbiddenError(MergeError):
    """What was asked for is not allowed: an adapter is kept from us, or the operator does not permit it."""


class CalibrationError(MergeError):
    """A calibration is missing, damaged, or made for another adapter, or cannot be made as asked."""


class EvaluationError(MergeError):
    """A merge cannot be judged as asked: by its examples, by its server, or by what that can do."""


class PlanError(MergeError):
    """The sources are valid, but do not fit together, or do not fit the rank limit or the model."""


class BackendError(MergeError):
    """The backend asked for does not exist, or cannot be loaded on this machine."""


def listed(names: Iterable[object], limit: int = 5) -> str:
    """The names as one readable line; after ``limit`` of them, the number of the others."""
    items = [str(name) for name in names]
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")
