"""The one interface of all backends, and the one place that loads a backend by name."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
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
"""Called with the number of modules finished since the last call, from the caller's thread.

The number is 0 where a module takes long and a part of it is done.  While the function runs, the backend
begins nothing, and what it has begun ends by itself within moments.  So it may block to pause a merge, and
make another merge by the same backend meanwhile.  If it raises, the merge stops: the exception is passed on
to the caller of ``merge``, and by then no thread of the backend touches tensors of the merge any more.
"""


def no_progress(count: int) -> None:
    """A :data:`Progress` that ignores the number."""


MODULES = {
    "triton": "merged_lora.triton_kernels.backend",
    "cpu": "merged_lora.cpu_kernels.backend",
    "numpy": "merged_lora.reference.backend",
}
AUTO = ("triton", "cpu", "numpy")
"""Backends from the fastest to the slowest; the first one whose requirements are met is used."""

LOW_ENERGY = 0.9
"""Warn if a merge keeps less than this share of the squared norm."""

DIGITS = 6
"""Decimal places of a module's share of the squared norm."""

Energy = tuple[float, float]
"""The squared norm that is left after the rank was cut, and the squared norm before."""


@dataclass(frozen=True)
class Result:
    """What a backend returns.

    modules:  the merged factors, by module.
    energy:   squared norms before and after the cut, for each module whose rank was cut; if the sources were
              cut before they were merged, those of all their weighted deltas together.
    repeated: modules in which singular values repeat, so that the basis they are merged in is one of many.
    """

    modules: dict[str, Factors]
    energy: dict[str, Energy]
    repeated: tuple[str, ...] = ()

    def kept_energy(self) -> float:
        """Share of the squared norm kept, over all modules whose rank was cut; 1 if none was."""
        total = sum(asked for _, asked in self.energy.values())
        return sum(kept for kept, _ in self.energy.values()) / total if total else 1.0

    def kept_by_module(self) -> dict[str, float]:
        """Share of the squared norm kept for each module whose rank was cut, to ``DIGITS`` decimal places."""
        shares = {name: kept / asked if asked else 1.0 for name, (kept, asked) in self.energy.items()}
        return {name: round(share, DIGITS) for name, share in sorted(shares.items())}

    def notes(self) -> list[str]:
        """Warnings about the result."""
        notes = []
        kept = self.kept_energy()
        if kept < LOW_ENERGY:
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

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile what the usual merges need, so that few requests have to wait for it.

        dtype: dtype of a server's slots; adapters are expected in it and in float32, in which PEFT trains.

        Whatever else a merge needs is compiled when it is first made.
        """
        ...

    def confine(self, threads: int, nice: int) -> None:
        """Merge on so many threads from now on, so that a server's own work is not delayed.

        threads: number of threads, at least 1, with torch limited to one core inside each.  Little more than
            bookkeeping is done in the thread that calls ``merge``.
        nice:    nice value of each thread, 0 to 19; the process's own if that is larger.

        A server calls this once, before its first merge.  A backend whose merges occupy no core, or that is
        not meant for servers, ignores it.  Raises ValueError for numbers outside these ranges.
        """
        ...

    def merge(self, plan: MergePlan, progress: Progress = no_progress) -> Result:
        """The merged factors of every module of the plan, each with scaling 1; see :data:`Progress`."""
        ...

    def make_room(self, progress: Progress) -> None:
        """Make memory ready for a merge like the last ones, while there is none to be made.

        progress: called with 0 now and then; what it raises passes on.

        A server calls this after every merge.  A backend that does not write into new memory ignores it.
        """
        ...


@dataclass(frozen=True, eq=False)
class Slot:
    """The tensors in which a server stores the factors of one module, on the backend's device.

    a:       ``[max_rank, in]``, float32, float16 or bfloat16, of any strides.
    b:       ``[out, max_rank]``, likewise.
    begin_a: row and column of the merged A at which the slot begins, if it takes a part of it: a shard.
    begin_b: the same for B.

    The rows of ``a`` and the columns of ``b`` beyond the rank of what is written become zero, and so does
    everything beyond the end of the factors.
    """

    a: torch.Tensor
    b: torch.Tensor
    begin_a: tuple[int, int] = field(default=(0, 0), kw_only=True)
    begin_b: tuple[int, int] = field(default=(0, 0), kw_only=True)


@dataclass(frozen=True, eq=False)
class StagedMerge:
    """A merge that a device has made and that waits in host memory for its slot.

    host:    all of it in one buffer, uint8 ``[nbytes]``, page-locked for a GPU.
    modules: the factors by module, views of ``host`` in the dtype of the slots.
    result:  what the backend reported, without the modules.

    It refers to no source and to nothing on the device.
    """

    host: torch.Tensor
    modules: Mapping[str, Factors]
    result: Result

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return self.host.nbytes

    @functools.cached_property
    def kind(self) -> str:
        """All but the values: names, shapes, dtypes and places in the buffer."""
        modules = self.modules.items()
        return repr([(name, f.kind, f.a.storage_offset(), f.b.storage_offset()) for name, f in modules])


@runtime_checkable
class SlotBackend(Backend, Protocol):
    """A backend that merges on a device, and fills a server's adapter slots from what it has made.

    A merge is made by :meth:`stage` and compiled for by :meth:`compile`, beside the server's own work.
    :meth:`place` is all that is left for a step of the server.
    """

    device: torch.device

    def reserve(self, nbytes: int, reason: str = "", largest: int | None = None) -> None:
        """Allocate the device memory that merges need, for as long as the backend lives.

        nbytes:  bytes for sources.
        reason:  where that number comes from, for the error message of a merge that does not fit.
        largest: bytes of the largest merge that will be staged; None if that is not known, and memory for
            staged merges is allocated when it is needed.
        """
        ...

    def adopt(self, adapter: Adapter) -> Adapter:
        """The same adapter in one page-locked buffer, to be kept instead of the other; from any thread."""
        ...

    def stage(self, plan: MergePlan, dtype: torch.dtype, progress: Progress = no_progress) -> StagedMerge:
        """Make a merge on the device, beside the current stream's work, and bring it to host memory.

        plan:     the plan of the merge.
        dtype:    of the slots.  The result is rounded to the dtype of the plan first, then to this one.
        progress: see :data:`Progress`.

        Raises PlanError if the result overflows the dtype of the plan, or if the sources do not fit into the
        reserved memory.  If neither this nor ``compile`` raises, ``place`` cannot fail.
        """
        ...

    def compile(self, staged: StagedMerge, slots: Mapping[str, Slot], empty: Sequence[Slot] = ()) -> None:
        """Compile what ``place`` would launch with these arguments; launch nothing."""
        ...

    def place(
        self,
        staged: StagedMerge,
        slots: Mapping[str, Slot],
        empty: Sequence[Slot] = (),
        whole: Collection[str] = (),
    ) -> dict[str, Factors]:
        """Fill slots with modules of a staged merge; returns the factors of others on the device.

        staged: the merge.
        slots:  slots by module name.
        empty:  slots to fill with zeros.
        whole:  names of the modules to return.  Their tensors hold until the next call, for work that is
            queued on the current stream before it.

        All work is queued on the current stream, and the host does not wait for it.  Nothing that ``stage``
        does in another thread delays the call.  It is made by one thread at a time, on one and the same
        stream.
        """
        ...


@functools.cache
def load_backend(name: str) -> Backend:
    """The backend of that name; ``auto`` loads the fastest one that works on this machine and logs its name.

    Raises BackendError if the name is unknown or something that the backend needs is not installed.
    """
    if name == "auto":
        # Without a GPU no backend that needs one is tried; torch calls ROCm devices cuda too.
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
    except (
        ImportError,
        RuntimeError,
    ) as error:  # numba raises RuntimeError if it has no cache folder
        raise BackendError(f"backend {name} cannot be loaded: {error}") from error
    return cast(Backend, module.load())
