"""The backend ``triton``: what is on the device, which stream work is queued on, and what comes back."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import triton

from merged_lora.adapters import Adapter
from merged_lora.backends import Progress, Result, Slot, StagedMerge, no_progress
from merged_lora.errors import BackendError, PlanError
from merged_lora.factors import Factors
from merged_lora.plan import MergePlan, overflow
from merged_lora.triton_kernels.batched.diagnostics import Diagnostics
from merged_lora.triton_kernels.batched.entries import Threshold
from merged_lora.triton_kernels.batched.groups import (
    RESULTS,
    Group,
    ModelThresholds,
    Stacks,
    grouped,
    merge_group,
    model_thresholds,
)
from merged_lora.triton_kernels.batched.lowrank import WORKSPACE
from merged_lora.triton_kernels.factors.kept import Written
from merged_lora.triton_kernels.factors.launch import upload_launches
from merged_lora.triton_kernels.factors.layout import Layout, lay_out
from merged_lora.triton_kernels.factors.slots import Targets, draft_copies
from merged_lora.triton_kernels.factors.writer import LayoutWriter

from .packed import DeviceSources, Resident
from .placing import Placer
from .results import Outline
from .transfer import host_memory
from .warm_up import warm_up


@dataclass(frozen=True, eq=False)
class Prepared:
    """What follows from a plan alone, and the writes made by it; kept as long as the plan is.

    layout: the modules that one launch merges.
    groups: all other modules.
    thresholds: of modules whose entries are counted over the whole model, once they are found.
    written: launches that may serve again.
    """

    layout: Layout
    groups: tuple[Group, ...]
    thresholds: dict[str, list[tuple[Threshold, ...]]] = field(default_factory=dict)
    written: list[Written] = field(default_factory=list)

    @property
    def parts(self) -> list[tuple[str, ...]]:
        """Names of the modules that are merged together."""
        parts = [self.layout.modules, *(group.names for group in self.groups)]
        return [names for names in parts if names]


class TritonBackend:
    """Merges on a GPU, or under Triton's interpreter; a :class:`merged_lora.backends.SlotBackend`.

    Merges are made on a stream of the backend's own, by one thread at a time, which holds a lock for one
    part of a merge: the modules of one launch, or one group.  Everything that they need on the device is
    used on that stream alone: sources, which stay there from merge to merge together with the trimming
    thresholds found for them, tables, intermediates and results.  Between two parts nothing but the sources
    counts, and even those may be evicted by another merge; then they are uploaded again.

    Placing shares none of that; see ``placing.py``.
    """

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = _new_stream(device)
        self._sources = DeviceSources(device)
        self._writer = LayoutWriter(device)
        self._placer = Placer(device)
        self._prepared: weakref.WeakKeyDictionary[MergePlan, Prepared] = weakref.WeakKeyDictionary()
        self._spare: torch.Tensor | None = None
        self._results: torch.Tensor | None = None
        self._turn = threading.Lock()

    def reserve(self, nbytes: int, reason: str = "", largest: int | None = None) -> None:
        """See :class:`merged_lora.backends.SlotBackend`."""
        # What is made in inference mode could not be changed outside of it, and that is each thread's own.
        with self._turn, self._own_stream(), torch.inference_mode(False):
            self._sources.reserve(nbytes, reason)
            self._spare = self._intermediates()
            if largest is not None:
                self._results = torch.empty(largest, dtype=torch.uint8, device=self.device)
                self._placer.reserve(largest)

    def adopt(self, adapter: Adapter) -> Adapter:
        """See :class:`merged_lora.backends.SlotBackend`."""
        return self._sources.adopt(adapter)

    def load_sources(self, plan: MergePlan) -> list[Resident]:
        """Load a plan's sources ahead of its merge, in order with the current stream's work.

        Merges load what is missing by themselves; benchmarks call this to time the upload alone.
        """
        with self._turn, self._own_stream(in_order=True):
            return self._sources.load(plan.sources)

    def warm_up(self, dtype: torch.dtype) -> None:
        """See :class:`merged_lora.backends.Backend`."""
        with self._own_stream():  # in a thread that waits for its end, as places want one stream at a time
            warm_up(self, dtype)

    def confine(self, threads: int, nice: int) -> None:
        """See :class:`merged_lora.backends.Backend`; does nothing, because the work is done by the GPU."""

    def make_room(self, progress: Progress) -> None:
        """See :class:`merged_lora.backends.Backend`; does nothing, because page-locked memory is kept."""

    def merge(self, plan: MergePlan, progress: Progress = no_progress) -> Result:
        """See :class:`merged_lora.backends.Backend`; the result is in host memory."""
        outline = Outline(plan, self._prepare(plan).parts, None)
        host = torch.empty(outline.nbytes, dtype=torch.uint8)
        found = self._make(plan, outline, host, progress, check=False)
        made = outline.modules(host, list(plan.modules))
        return Result(made, found.energy, found.repeated)

    def stage(self, plan: MergePlan, dtype: torch.dtype, progress: Progress = no_progress) -> StagedMerge:
        """See :class:`merged_lora.backends.SlotBackend`."""
        outline = Outline(plan, self._prepare(plan).parts, dtype)
        if self._results is not None and outline.nbytes > self._results.numel():
            raise PlanError(
                f"this merge takes {outline.nbytes / 2**30:.3g} GiB, more than the "
                f"{self._results.numel() / 2**30:.3g} GiB of device memory that are reserved for one"
            )
        host = host_memory(outline.nbytes, self.device)
        found = self._make(plan, outline, host, progress, check=True)
        return StagedMerge(host, outline.modules(host, list(plan.modules)), found)

    def compile(self, staged: StagedMerge, slots: Mapping[str, Slot], empty: Sequence[Slot] = ()) -> None:
        """See :class:`merged_lora.backends.SlotBackend`."""
        with self._own_stream():
            self._placer.compile(staged, Targets(slots, empty))

    def place(
        self,
        staged: StagedMerge,
        slots: Mapping[str, Slot],
        empty: Sequence[Slot] = (),
        whole: Collection[str] = (),
    ) -> dict[str, Factors]:
        """See :class:`merged_lora.backends.SlotBackend`; takes no lock."""
        return self._placer.place(staged, Targets(slots, empty), whole)

    def write(self, plan: MergePlan, slots: Mapping[str, Slot], empty: Sequence[Slot] = ()) -> None:
        """Merge modules of a plan straight into slots, in order with the current stream's work.

        plan: a plan whose result does not overflow.
        slots: slots by module name.
        empty: slots to fill with zeros.

        The bits are those of a merge that is staged and placed.  A server does not call this: it may have to
        upload sources, and waits for the device if something is decomposed.  Otherwise the call returns
        before the device is done.  The tables of the launches stay on the device and serve again as long as
        nothing moves.
        """
        prepared = self._prepare(plan)
        targets = Targets(slots, empty)
        diagnostics = Diagnostics()
        with self._turn, self._own_stream(in_order=True):
            residents = self._sources.load(plan.sources)
            for launch in self._writer.launches(prepared.layout, residents, targets, prepared.written):
                launch.run()
            groups = [group for group in (group.only(slots) for group in prepared.groups) if group.names]
            if groups:
                with self._lending():
                    thresholds = self._model_thresholds(plan, prepared, residents)
                    for group in groups:
                        self._write_group(group, residents, thresholds, slots, diagnostics)

    def _make(
        self, plan: MergePlan, outline: Outline, host: torch.Tensor, progress: Progress, check: bool
    ) -> Result:
        """Merge into host memory; returns the result without its modules.

        outline: of the results in host memory.
        check: raise PlanError if the result overflows the dtype of the plan.
        """
        prepared = self._prepare(plan)
        diagnostics = Diagnostics()
        if plan.counts is not None and not prepared.thresholds:
            with self._turn, self._own_stream(), self._lending():
                self._model_thresholds(plan, prepared, self._sources.load(plan.sources))
            progress(0)
        for names in prepared.parts:
            # Each part is complete in host memory before anyone hears of it, and what it had on the device
            # may be overwritten by another merge, or be abandoned.
            with self._turn, self._own_stream():
                residents = self._sources.load(plan.sources)
                where = outline.part(names)
                results = self._memory_for(where.stop - where.start)
                slots = {n: Slot(f.a, f.b) for n, f in outline.modules(results, names, where.start).items()}
                if names == prepared.layout.modules:
                    overflows = self._make_layout(prepared.layout, residents, slots, check)
                else:
                    group = next(group for group in prepared.groups if group.names == names)
                    with self._lending():
                        overflows = self._write_group(
                            group, residents, prepared.thresholds, slots, diagnostics
                        )
                host[where].copy_(results, non_blocking=True)
                flags = overflows.tolist() if check and overflows is not None else [False] * len(names)
            for name, overflowed in zip(names, flags, strict=True):
                if overflowed:
                    raise overflow(plan.spec, name)
            progress(len(names))
        with self._turn, self._own_stream():
            return diagnostics.result({})

    def _make_layout(
        self, layout: Layout, residents: Sequence[Resident], slots: Mapping[str, Slot], check: bool
    ) -> torch.Tensor | None:
        """Merge a layout's modules into slots; returns whether each overflows, bool on the device.

        check: whether that is asked for; None is returned if not.
        """
        overflows = self._writer.check(layout, residents) if check else None
        for launch in self._writer.launches(layout, residents, Targets(slots, [])):
            launch.run()
        return overflows

    def _write_group(
        self,
        group: Group,
        residents: Sequence[Resident],
        thresholds: ModelThresholds,
        slots: Mapping[str, Slot],
        diagnostics: Diagnostics,
    ) -> torch.Tensor:
        """Merge a group into its slots; returns whether each module overflows, bool on the device."""
        # A function of its own, so that a group's intermediates are freed before the next group is merged.
        merged = merge_group(group, _stacks(group, residents), thresholds)
        sources = [x for pair in zip(merged.a, merged.b, strict=True) for x in pair]
        drafts = draft_copies(sources, [slots[name] for name in group.names])
        for launch in upload_launches(drafts, self.device):
            launch.run()
        diagnostics.add(group.names, merged)
        a, b = (x.isfinite().flatten(1).all(1) for x in (merged.a, merged.b))
        return ~(a & b)

    def _prepare(self, plan: MergePlan) -> Prepared:
        """What follows from the plan; nothing of it is on the device."""
        with self._turn:
            prepared = self._prepared.get(plan)
            if prepared is None:
                packed = [self._sources.pack(source) for source in plan.sources]
                prepared = self._prepared[plan] = Prepared(lay_out(plan, packed), grouped(plan))
            return prepared

    def _model_thresholds(
        self, plan: MergePlan, prepared: Prepared, residents: Sequence[Resident]
    ) -> ModelThresholds:
        """Thresholds over the whole model, found once for each plan."""
        if plan.counts is not None and not prepared.thresholds:
            prepared.thresholds.update(
                model_thresholds(plan, prepared.groups, lambda group: _stacks(group, residents))
            )
        return prepared.thresholds

    def _memory_for(self, nbytes: int) -> torch.Tensor:
        """Device memory for the results of one part of a merge, of any content."""
        if self._results is not None and nbytes <= self._results.numel():
            return self._results[:nbytes]
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _intermediates(self) -> torch.Tensor:
        return torch.empty(WORKSPACE + RESULTS, dtype=torch.uint8, device=self.device)

    @contextlib.contextmanager
    def _lending(self) -> Iterator[None]:
        """Return the memory reserved for intermediates to torch's allocator while groups are merged.

        The allocator then serves them from it, instead of asking the device, and afterwards the memory is
        free to be reserved again.
        """
        lent = self._spare is not None
        if lent:
            self._spare = None
        try:
            yield
        finally:
            if lent:
                self._spare = self._intermediates()

    @contextlib.contextmanager
    def _own_stream(self, in_order: bool = False) -> Iterator[None]:
        """Queue work on the backend's own stream, the only one that touches what merges are made in.

        in_order: after the work queued on the current stream and before the work that follows there.
            Otherwise in parallel to it, and the host waits for the end.
        """
        if self._stream is None:
            yield
            return
        main = torch.cuda.current_stream(self.device)
        if in_order:
            self._stream.wait_stream(main)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            if in_order:
                main.wait_stream(self._stream)
            else:
                self._stream.synchronize()


def load() -> TritonBackend:
    """The backend on the current CUDA or ROCm device, or under the interpreter.

    Raises BackendError if there is neither.
    """
    if triton.knobs.runtime.interpret:
        return TritonBackend(torch.device("cpu"))
    if not torch.cuda.is_available():
        raise BackendError(
            "backend triton needs a CUDA or ROCm device; "
            "with TRITON_INTERPRET=1 in the environment it runs without one, very slowly"
        )
    return TritonBackend(torch.device("cuda", torch.cuda.current_device()))


def _new_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream of the lowest priority that the device has; None if it has no streams.

    In CUDA and ROCm that is 0 for torch, the priority of the default stream as well: a merge never overtakes
    the work of a server, and shares the device with it.
    """
    if device.type != "cuda":
        return None
    lowest, _ = torch.cuda.Stream.priority_range()  # type: ignore[call-arg]  # a static method
    return torch.cuda.Stream(device, priority=lowest)  # type: ignore[no-untyped-call]


def _stacks(group: Group, residents: Sequence[Resident]) -> Stacks:
    """A and B of every source of a group, each ``[modules, rows, columns]``."""
    a, b = (tuple(residents[i].stack(group.names, side) for i in group.modules[0].present) for side in (0, 1))
    return a, b
