"""The one interface of all backends, and the one place that loads a wing by name."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Protocol, cast, runtime_checkable

import torch

from .adapters import Adapter
from .errors import BackendError, listed
from .factors import Factors
from .plan import MergePlan

logger = logging.getLogger(__name__)

Progress = Callable[[int], None]
"""Called with the number of modules finished since the last call, from the caller's thread."""

MODULES = {
    "triton": "merged_lora.triton_kernels.backend",
    "cpu": "merged_lora.cpu_kernels.backend",
    "numpy": "merged_lora.reference.backend",
}
AUTO = ("triton", "cpu", "numpy")
"""Fastest first; each next one is taken where the one before lacks what it needs."""


MUCH = 0.9
"""A merge that keeps less of the squared norm is worth a warning."""

Energy = tuple[float, float]
"""The squared norm that a cut rank kept, and the one that was asked for."""


@dataclass(frozen=True)
class Result:
    """What a backend returns.

    modules:  the merged factors, by module.
    energy:   for each module whose rank was cut, what was kept; where the sources were cut instead, before
              they were merged, of their weighted deltas together.
    repeated: modules in which singular values repeat, so that the basis they are merged in is one of many.
    """

    modules: dict[str, Factors]
    energy: dict[str, Energy]
    repeated: tuple[str, ...] = ()

    def kept_energy(self) -> float:
        """Share of the squared norm kept, over all modules whose rank was cut; 1 where none was."""
        total = sum(asked for _, asked in self.energy.values())
        return sum(kept for kept, _ in self.energy.values()) / total if total else 1.0

    def kept_by_module(self) -> dict[str, float]:
        """Share of the squared norm kept, for each module whose rank was cut."""
        return {name: kept / asked if asked else 1.0 for name, (kept, asked) in sorted(self.energy.items())}

    def notes(self) -> list[str]:
        """What a user should know of the result."""
        notes = []
        kept = self.kept_energy()
        if kept < MUCH:
            shares = self.kept_by_module()
            least = min(shares, key=shares.__getitem__)
            notes.append(
                f"only {kept:.1%} of the squared norm is kept ({shares[least]:.1%} in {least}); "
                "a larger rank keeps more"
            )
        if self.repeated:
            notes.append(
                f"singular values repeat in {listed(self.repeated[:3])}"
                f"{f' and {len(self.repeated) - 3} more modules' if len(self.repeated) > 3 else ''}: "
                "the basis they are merged in is one of many, and so is the result"
            )
        return notes


class Backend(Protocol):
    """Follows a plan.  All backends give the same bits in ``factors`` space."""

    name: str

    def merge(self, plan: MergePlan, progress: Progress) -> Result:
        """The merged factors of every module of the plan, each with scaling 1."""
        ...


@dataclass(frozen=True, eq=False)
class Slot:
    """Where a server keeps the factors of one module, on the backend's device.

    a: ``[max_rank, in]``, b: ``[out, max_rank]``; float32, float16 or bfloat16, of any strides.  The rows of
    ``a`` and the columns of ``b`` beyond the rank of what is written become zero.

    begin_a, begin_b: the row and the column of the merged factors at which the slot begins, where it takes a
    part of them: a server's shard.  So far as the slot reaches beyond the factors, it becomes zero.
    """

    a: torch.Tensor
    b: torch.Tensor
    begin_a: tuple[int, int] = field(default=(0, 0), kw_only=True)
    begin_b: tuple[int, int] = field(default=(0, 0), kw_only=True)


@runtime_checkable
class SlotBackend(Backend, Protocol):
    """A backend that merges on a device, straight into a server's adapter slots."""

    device: torch.device

    def reserve(self, nbytes: int, reason: str = "") -> None:
        """Take that much device memory for sources, and what intermediates need, now and for good.

        reason: where that number comes from; told to whoever asks for a merge that does not fit.
        """
        ...

    def adopt(self, adapter: Adapter) -> Adapter:
        """The same adapter in one page-locked buffer, ready for the device; keep it instead of the other."""
        ...

    def check(self, plan: MergePlan) -> Result:
        """Bring the plan's sources to the device, try the merge and throw the result away.

        Returns the result without its modules.  Raises PlanError where the
        result overflows the dtype of the plan or the sources do not fit into the reserved memory.  Where it
        does not raise, and ``compile`` does not, ``write`` cannot fail.
        """
        ...

    def compile(self, plan: MergePlan, slots: Mapping[str, Slot], empty: Sequence[Slot] = ()) -> None:
        """Compile whatever ``write`` would launch for these and ``check`` has not, and launch nothing."""
        ...

    def write(self, plan: MergePlan, slots: Mapping[str, Slot], empty: Sequence[Slot] = ()) -> None:
        """Merge modules of the plan into slots, by module name, and fill the empty ones with zeros.

        The result is rounded to the dtype of the plan first, then to that of the slot.  The work is ordered
        on the current stream; where nothing is decomposed, the call returns before the device has finished.
        """
        ...


@functools.cache
def load_backend(name: str) -> Backend:
    """The backend of that name; ``auto`` takes the fastest that this machine has and logs which.

    Raises BackendError where the name is unknown or what it needs is not installed.
    """
    if name == "auto":
        # What needs a device is no candidate without one; torch calls ROCm's devices cuda too.
        for candidate in AUTO if torch.cuda.is_available() else AUTO[1:]:
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
