"""The one interface of all backends, and the one place that loads a wing by name."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

from .errors import BackendError
from .factors import Factors
from .plan import MergePlan

logger = logging.getLogger(__name__)

Progress = Callable[[int], None]
"""Called with the number of modules finished since the last call, from the caller's thread."""

MODULES = {"cpu": "merged_lora.cpu_kernels.backend", "numpy": "merged_lora.reference.backend"}
AUTO = ("cpu", "numpy")
"""Fastest first; each next one is taken where the one before lacks what it needs."""


@dataclass(frozen=True)
class Result:
    """What a backend returns.

    modules: the merged factors, by module.
    energy:  for each module whose rank was cut, the squared norm kept and the squared norm asked for.
    """

    modules: dict[str, Factors]
    energy: dict[str, tuple[float, float]]

    def kept_energy(self) -> float:
        """Share of the squared norm kept, over all modules whose rank was cut; 1 where none was."""
        total = sum(asked for _, asked in self.energy.values())
        return sum(kept for kept, _ in self.energy.values()) / total if total else 1.0


class Backend(Protocol):
    """Follows a plan.  All backends give the same bits in ``factors`` space."""

    name: str

    def merge(self, plan: MergePlan, progress: Progress) -> Result:
        """The merged factors of every module of the plan, each with scaling 1."""
        ...


@functools.cache
def load_backend(name: str) -> Backend:
    """The backend of that name; ``auto`` takes the fastest that this machine has and logs which.

    Raises BackendError where the name is unknown or what it needs is not installed.
    """
    if name == "auto":
        for candidate in AUTO:
            try:
                backend = load_backend(candidate)
            except BackendError as error:
                logger.warning("%s; trying the next backend", error)
                continue
            logger.info("backend auto: %s", backend.name)
            return backend
        raise BackendError("no backend can be loaded")
    if name not in MODULES:
        raise BackendError(f"unknown backend {name!r}; there are: auto, {', '.join(MODULES)}")
    try:
        module = import_module(MODULES[name])
    except (ImportError, RuntimeError) as error:  # numba raises the latter where it can keep nothing on disk
        raise BackendError(f"backend {name} cannot be loaded: {error}") from error
    return cast(Backend, module.load())
