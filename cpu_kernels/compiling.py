"""What numba's compiler does for the loops: whether it can keep them on the disk, and a word when it begins.

Nothing is said where loops that were kept are loaded.
"""

# mypy: disable-error-code="untyped-decorator,misc"
# numba has no type stubs.
from __future__ import annotations

import logging
from typing import Any

from numba import njit
from numba.core import event

logger = logging.getLogger(__name__)


class Notice(event.Listener):
    """Logs once, as information, that functions of a module are compiled.

    module:  its name.
    message: what is logged.
    """

    def __init__(self, module: str, message: str) -> None:
        self._module, self._message = module, message
        self._given = False

    def on_start(self, started: Any) -> None:
        """Called by numba under its compiler's lock, before it compiles what is not in its cache."""
        if not self._given and started.data["dispatcher"].py_func.__module__ == self._module:
            self._given = True
            logger.info(self._message)

    def on_end(self, ended: Any) -> None:
        """Called by numba when it has compiled."""


def _nothing() -> None:
    pass


def can_cache() -> bool:
    """Whether numba has a folder for its cache of functions in this package; if not, a warning is logged."""
    try:
        njit(cache=True)(_nothing)
    except RuntimeError:  # what numba raises without a folder that it can write
        logger.warning(
            "the loops of the CPU backend are compiled anew in each process, because numba can write neither "
            "beside the code nor into the user's cache; set NUMBA_CACHE_DIR to a folder that can be written"
        )
        return False
    return True


def announce(module: str, cached: bool) -> None:
    """Log it when numba begins to compile functions of a module.

    module: its name.
    cached: whether what is compiled is kept.
    """
    when = "once per installation" if cached else "in each process"
    event.register("numba:compile", Notice(module, f"the loops of the CPU backend are compiled, {when} ..."))
