"""The backend ``triton``: what is on the device, which stream work is queued on, and what comes back."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import triton

from merged_lora.adapters import Adapter
from merged_lora.backends import Progress, Result, Slot, no_progress
from merged_lora.errors import BackendError
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
from merged_lora.triton_kernels.factors.launch import upload_launches
from merged_lora.triton_kernels.factors.layout import Layout, lay_out
from merged_lora.triton_kernels.factors.slots import Targets, draft_copies, draft_merge, draft_zeros
from merged_lora.triton_kernels.factors.writer import LayoutWriter, Written

from .packed import ALIGNMENT, DeviceSources, Resident
from .transfer import padded
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


class TritonBackend:
    """Merges on a GPU, or under Triton's interpreter; a :class:`merged_lora.backends.SlotBackend`.

    Sources stay on the device from merge to merge, together with the trimming thresholds found for them.  All
    work is queued on a stream of the backend's own.
    """

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = _new_stream(device)
        self._sources = DeviceSources(device)
        self._writer = LayoutWriter(device)
        self._prepared: weakref.WeakKeyDictionary[MergePlan, Prepared] = weakref.WeakKeyDictionary()
        self._spare: torch.Tensor | None = None
        self._turn = threading.Lock()

    def reserve(self, nbytes: int, reason: str = "") -> None:
        """See :class:`merged_lora.backends.SlotBackend`."""
        with self._turn, self._own_stream():
            self._sources.reserve(nbytes, reason)
            self._writer.reserve()
            self._spare = self._intermediates()

    def adopt(self, adapter: Adapter) -> Adapter:
        """See :class:`merged_lora.backends.SlotBackend`."""
        with self._turn:
            return self._sources.adopt(adapter)

    def load_sources(self, plan: MergePlan) -> list[Resident]:
        """Load a plan's sources ahead of its merge, in order with the current stream's work.

        Merges load what is missing by themselves; benchmarks call this to time the upload alone.
        """
        with self._turn, self._own_stream(in_order=True):
            return self._sources.load(plan.sources)

    def warm_up(self, dtype: torch.dtype) -> None:
        """See :class:`merged_lora.backends.Backend`."""
        warm_up(self, dtype)

    def confine(self, threads: int, nice: int) -> None:
        """See :class:`merged_lora.backends.Backend`; does nothing, because the work is done by the GPU."""

    def merge(self, plan: MergePlan, progress: Progress = no_progress) -> Result:
        """See :class:`merged_lora.backends.Backend`; the result is in host memory.

        Progress is called once, at the end, when nothing is queued any more.
        """
        with self._turn, self._own_stream():
            buffer = torch.empty(_result_bytes(plan), dtype=torch.uint8, device=self.device)
            slots = {name: Slot(a, b) for name, a, b in _result_views(buffer, plan)}
            diagnostics = self._write(plan, Targets(slots, []))
            host = buffer.cpu()
            modules = {
                name: Factors(a, b, 1.0, plan.modules[name].embedding)
                for name, a, b in _result_views(host, plan)
            }
            result = diagnostics.result(modules)
        progress(len(modules))
        return result

    def check(self, plan: MergePlan) -> Result:
        """See :class:`merged_lora.backends.SlotBackend`, beside the current stream's work."""
        with self._turn, self._own_stream():
            residents, prepared = self._prepare(plan)
            diagnostics = Diagnostics()
            verdicts: list[tuple[Sequence[str], torch.Tensor]] = []
            if prepared.layout.modules:
                verdicts.append((prepared.layout.modules, self._writer.check(prepared.layout, residents)))
            with self._lending(prepared.groups):
                thresholds = self._model_thresholds(plan, prepared, residents)
                for group in prepared.groups:
                    verdicts.append((group.names, _check_group(group, residents, thresholds, diagnostics)))
            for names, overflows in verdicts:
                for name, overflowed in zip(names, overflows.tolist(), strict=True):
                    if overflowed:
                        raise overflow(plan.spec, name)
            return diagnostics.result({})

    def compile(self, plan: MergePlan, slots: Mapping[str, Slot], empty: Sequence[Slot] = ()) -> None:
        """See :class:`merged_lora.backends.SlotBackend`."""
        with self._turn, self._own_stream():
            _, prepared = self._prepare(plan)
            layout = prepared.layout
            addresses = np.zeros(layout.weights.shape, np.int64)
            chosen, to_merge = Targets(slots, empty).chosen(layout)
            drafts = draft_merge(layout, chosen, to_merge, addresses, addresses)
            for group in (group.only(slots) for group in prepared.groups):
                results = [r for module in group.modules for r in module.results]
                outlines = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in results]
                drafts += draft_copies(outlines, [slots[name] for name in group.names])
            drafts += draft_zeros(empty)
            for launch in upload_launches(drafts, self.device):
                launch.compile()

    def write(self, plan: MergePlan, slots: Mapping[str, Slot], empty: Sequence[Slot] = ()) -> None:
        """See :class:`merged_lora.backends.SlotBackend`.

        The tables of the launches stay on the device and serve again as long as nothing moves.
        """
        with self._turn, self._own_stream(in_order=True):
            self._write(plan, Targets(slots, empty), keep=True)

    def _write(self, plan: MergePlan, targets: Targets, keep: bool = False) -> Diagnostics:
        """Merge into slots; returns diagnostics that are still on the device.

        keep: keep the tables of launches for the next write.
        """
        residents, prepared = self._prepare(plan)
        written = prepared.written if keep else None
        for launch in self._writer.launches(prepared.layout, residents, targets, written):
            launch.run()
        diagnostics = Diagnostics()
        groups = [group.only(targets.slots) for group in prepared.groups]
        groups = [group for group in groups if group.names]
        with self._lending(groups):
            thresholds = self._model_thresholds(plan, prepared, residents)
            for group in groups:
                self._write_group(group, residents, thresholds, targets.slots, diagnostics)
        return diagnostics

    def _prepare(self, plan: MergePlan) -> tuple[list[Resident], Prepared]:
        """The plan's sources on the device, and what follows from the plan."""
        residents = self._sources.load(plan.sources)
        prepared = self._prepared.get(plan)
        if prepared is None:
            prepared = Prepared(lay_out(plan, [resident.packed for resident in residents]), grouped(plan))
            self._prepared[plan] = prepared
        return residents, prepared

    def _write_group(
        self,
        group: Group,
        residents: Sequence[Resident],
        thresholds: ModelThresholds,
        slots: Mapping[str, Slot],
        diagnostics: Diagnostics,
    ) -> None:
        """Merge a group into its slots."""
        # A function of its own, so that a group's intermediates are freed before the next group is merged.
        merged = merge_group(group, _stacks(group, residents), thresholds)
        sources = [x for pair in zip(merged.a, merged.b, strict=True) for x in pair]
        drafts = draft_copies(sources, [slots[name] for name in group.names])
        for launch in upload_launches(drafts, self.device):
            launch.run()
        diagnostics.add(group.names, merged)

    def _model_thresholds(
        self, plan: MergePlan, prepared: Prepared, residents: Sequence[Resident]
    ) -> ModelThresholds:
        """Thresholds over the whole model, found once for each plan."""
        if plan.counts is not None and not prepared.thresholds:
            prepared.thresholds.update(
                model_thresholds(plan, prepared.groups, lambda group: _stacks(group, residents))
            )
        return prepared.thresholds

    def _intermediates(self) -> torch.Tensor:
        return torch.empty(WORKSPACE + RESULTS, dtype=torch.uint8, device=self.device)

    @contextlib.contextmanager
    def _lending(self, groups: Sequence[Group]) -> Iterator[None]:
        """Return the memory reserved for intermediates to torch's allocator while groups are merged.

        The allocator then serves them from it, instead of asking the device, and afterwards the memory is
        free to be reserved again.
        """
        lent = self._spare is not None and len(groups) > 0
        if lent:
            self._spare = None
        try:
            yield
        finally:
            if lent:
                self._spare = self._intermediates()

    @contextlib.contextmanager
    def _own_stream(self, in_order: bool = False) -> Iterator[None]:
        """Queue work on the backend's own stream, the only one that touches the backend's device memory.

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
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _check_group(
    group: Group, residents: Sequence[Resident], thresholds: ModelThresholds, diagnostics: Diagnostics
) -> torch.Tensor:
    """Whether the result of each module of a group overflows, bool ``[modules]`` on the device."""
    # A function of its own, so that a group's intermediates are freed before the next group is merged.
    merged = merge_group(group, _stacks(group, residents), thresholds)
    a, b = (x.isfinite().flatten(1).all(1) for x in (merged.a, merged.b))
    diagnostics.add(group.names, merged)
    return ~(a & b)


def _stacks(group: Group, residents: Sequence[Resident]) -> Stacks:
    """A and B of every source of a group, each ``[modules, rows, columns]``."""
    a, b = (tuple(residents[i].stack(group.names, side) for i in group.modules[0].present) for side in (0, 1))
    return a, b


def _result_bytes(plan: MergePlan) -> int:
    """Bytes of a buffer for all results of a plan."""
    results = [result for module in plan.modules.values() for result in module.results]
    return sum(padded(rows * columns * dtype.itemsize, ALIGNMENT) for (rows, columns), dtype in results)


def _result_views(buffer: torch.Tensor, plan: MergePlan) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, A and B of every result, as views of a buffer of :func:`_result_bytes`."""
    start = 0
    for name, module in plan.modules.items():
        pair = []
        for shape, dtype in module.results:
            nbytes = shape[0] * shape[1] * dtype.itemsize
            pair.append(buffer[start : start + nbytes].view(dtype).view(shape))
            start += padded(nbytes, ALIGNMENT)
        yield name, pair[0], pair[1]
