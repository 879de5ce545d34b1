"""The backend ``triton``: what is on the device, what goes to which stream, and what comes back."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import triton

from merged_lora.adapters import Adapter
from merged_lora.backends import Progress, Result, Slot
from merged_lora.errors import BackendError
from merged_lora.factors import Factors
from merged_lora.plan import MergePlan, overflow
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
from merged_lora.triton_kernels.batched.lowrank import WORKSPACE, MergedStack
from merged_lora.triton_kernels.factors.launch import (
    EVERYTHING,
    NOTHING,
    Draft,
    Launch,
    draft_launches,
    find_pairs,
    pair_addresses,
    raised_flags,
    source_addresses,
    upload_launches,
)
from merged_lora.triton_kernels.factors.layout import Layout, copies, lay_out
from merged_lora.triton_kernels.kernels.words import KINDS

from .packed import DeviceSources, Resident, padded
from .tables import Integers, Part, Ring, target_rows
from .warm_up import warm_up

TABLES = 16 << 20  # bytes of tables kept on the device; some 60 merges of rank 16 into a slot of an 8B model


@dataclass(frozen=True, eq=False)
class Targets:
    """What a merge is written to: slots by module, and slots that become zero."""

    slots: Mapping[str, Slot]
    empty: Sequence[Slot]

    @property
    def all(self) -> list[Slot]:
        """Every slot, those that become zero last."""
        return [*self.slots.values(), *self.empty]


@dataclass(frozen=True, eq=False)
class Written:
    """The launches of a write, with their tables in a part of the ring.

    They are good for the same slots at the same addresses, as long as the sources and their thresholds are
    where they were: a source that has been evicted and brought back is another resident.  Slots and residents
    are held weakly, because memory hangs on them.
    """

    names: Sequence[str]
    slots: Sequence[weakref.ref[Slot]]
    addresses: Sequence[int]
    residents: Sequence[weakref.ref[Resident]]
    pairs: Sequence[torch.Tensor | None]
    part: Part
    launches: Sequence[Launch]

    def good(
        self, targets: Targets, residents: Sequence[Resident], pairs: Sequence[torch.Tensor | None]
    ) -> bool:
        """Whether the tables say what they would say if they were made now."""
        return (
            self.names == list(targets.slots)
            and self.addresses == _addresses(targets.all)
            and all(mine() is one for mine, one in zip(self.slots, targets.all, strict=True))
            and all(mine() is one for mine, one in zip(self.residents, residents, strict=True))
            and all(mine is one for mine, one in zip(self.pairs, pairs, strict=True))
        )


@dataclass(frozen=True, eq=False)
class Prepared:
    """What follows from a plan alone, and what it was written by last; kept as long as the plan is."""

    layout: Layout
    groups: tuple[Group, ...]
    known: dict[str, list[tuple[Threshold, ...]]] = field(default_factory=dict)
    written: list[Written] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Told:
    """What is to be told of merged modules, still on the device: see :class:`merged_lora.backends.Result`."""

    energy: dict[str, torch.Tensor] = field(default_factory=dict)
    repeated: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, group: Group, merged: MergedStack) -> None:
        """Note what a group has to tell."""
        if merged.energy is not None:
            self.energy.update(zip(group.names, merged.energy, strict=True))
        if merged.repeated is not None:
            self.repeated.update(zip(group.names, merged.repeated, strict=True))

    def result(self, modules: dict[str, Factors]) -> Result:
        """All of it, brought to the host."""
        pairs = torch.stack(list(self.energy.values())).tolist() if self.energy else []
        open_bases = torch.stack(list(self.repeated.values())).tolist() if self.repeated else []
        energy = {name: (kept, asked) for name, (kept, asked) in zip(self.energy, pairs, strict=True)}
        repeated = tuple(name for name, one in zip(self.repeated, open_bases, strict=True) if one)
        return Result(modules, energy, repeated)


class TritonBackend:
    """Merges on a GPU, or under Triton's interpreter; a :class:`merged_lora.backends.SlotBackend`.

    Sources stay on the device from merge to merge, and with them the trimming thresholds found so far.  All
    work goes to a stream of the backend's own.
    """

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = _new_stream(device)
        self._sources = DeviceSources(device)
        self._tables = Ring(TABLES, device)
        self._prepared: weakref.WeakKeyDictionary[MergePlan, Prepared] = weakref.WeakKeyDictionary()
        self._constants = torch.tensor([EVERYTHING, NOTHING], dtype=torch.int32).to(device)
        self._spare: torch.Tensor | None = None
        self._turn = threading.Lock()

    def reserve(self, nbytes: int, reason: str = "") -> None:
        """See :class:`merged_lora.backends.SlotBackend`."""
        with self._turn, self._apart():
            self._sources.reserve(nbytes, reason)
            self._tables.reserve()
            self._spare = self._intermediates()

    def adopt(self, adapter: Adapter) -> Adapter:
        """See :class:`merged_lora.backends.SlotBackend`."""
        with self._turn:
            return self._sources.adopt(adapter)

    def bring(self, plan: MergePlan) -> list[Resident]:
        """A plan's sources, brought to the device in order with the current stream's work."""
        with self._turn, self._apart(in_order=True):
            return self._sources.load(plan.sources)

    def warm_up(self, dtype: torch.dtype) -> None:
        """See :class:`merged_lora.backends.Backend`."""
        warm_up(self, dtype)

    def merge(self, plan: MergePlan, progress: Progress) -> Result:
        """See :class:`merged_lora.backends.Backend`; the result lies in host memory."""
        with self._turn, self._apart():
            buffer = torch.empty(_length(plan), dtype=torch.uint8, device=self.device)
            slots = {name: Slot(a, b) for name, a, b in _views(buffer, plan)}
            told = self._write(plan, Targets(slots, []))
            host = buffer.cpu()
            modules = {
                name: Factors(a, b, 1.0, plan.modules[name].embedding) for name, a, b in _views(host, plan)
            }
            result = told.result(modules)
        progress(len(modules))
        return result

    def check(self, plan: MergePlan) -> Result:
        """See :class:`merged_lora.backends.SlotBackend`; on a GPU beside the work of the current stream."""
        with self._turn, self._apart():
            residents, prepared = self._bring(plan)
            layout = prepared.layout
            told = Told()
            verdicts: list[tuple[Sequence[str], torch.Tensor]] = []
            if layout.modules:
                nowhere = [torch.empty(shape, device="meta") for shape in layout.shapes.tolist()]
                rows = target_rows(nowhere, layout.shapes)
                pairs = pair_addresses(layout, find_pairs(layout, residents, self.device), self._constants)
                sources = source_addresses(layout, residents)
                drafts = draft_launches(
                    layout, _every(nowhere), sources, pairs, rows, layout.rounds, check=True
                )
                launches = upload_launches(drafts, self.device)
                for one in launches:
                    one.run()
                verdicts.append((layout.modules, raised_flags(launches).view(-1, 2).amax(1) > 0))
            with self._lending(prepared.groups):
                known = self._known(plan, prepared, residents)
                for group in prepared.groups:
                    verdicts.append((group.names, self._try(group, residents, known, told)))
            for names, wrong in verdicts:
                for name, is_wrong in zip(names, wrong.tolist(), strict=True):
                    if is_wrong:
                        raise overflow(plan.spec, name)
            return told.result({})

    def compile(self, plan: MergePlan, slots: Mapping[str, Slot], empty: Sequence[Slot] = ()) -> None:
        """See :class:`merged_lora.backends.SlotBackend`."""
        with self._turn, self._apart():
            _, prepared = self._bring(plan)
            layout = prepared.layout
            here, chosen = _chosen(layout, slots)
            nothing = np.zeros(layout.weights.shape, np.int64)
            rows, kinds = _rows(chosen, layout.shapes[here]), _kinds(_tensors(chosen))
            drafts = draft_launches(layout, here, nothing, nothing, rows, kinds)
            for group in (whole.only(slots) for whole in prepared.groups):
                results = [r for module in group.modules for r in module.results]
                outlines = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in results]
                drafts += _copies(outlines, [slots[name] for name in group.names])
            drafts += _copies(_zeros(empty), empty)
            for one in upload_launches(drafts, self.device):
                one.compile()

    def write(self, plan: MergePlan, slots: Mapping[str, Slot], empty: Sequence[Slot] = ()) -> None:
        """See :class:`merged_lora.backends.SlotBackend`.

        The tables of the launches stay on the device, and are used again where nothing has moved.
        """
        with self._turn, self._apart(in_order=True):
            self._write(plan, Targets(slots, empty), keep=True)

    def _write(self, plan: MergePlan, targets: Targets, keep: bool = False) -> Told:
        """Merge into slots; what is to be told of the modules stays on the device."""
        residents, prepared = self._bring(plan)
        for one in self._launches(prepared, residents, targets, keep):
            one.run()
        told = Told()
        groups = [group for group in (whole.only(targets.slots) for whole in prepared.groups) if group.names]
        with self._lending(groups):
            known = self._known(plan, prepared, residents)
            for group in groups:
                self._fill(group, residents, known, targets.slots, told)
        return told

    def _launches(
        self, prepared: Prepared, residents: Sequence[Resident], targets: Targets, keep: bool
    ) -> Sequence[Launch]:
        """What merges modules that need no group, and fills empty slots with zeros.

        keep: for the next time, where there is room for their tables.
        """
        layout = prepared.layout
        here, chosen = _chosen(layout, targets.slots)
        pairs = find_pairs(layout, residents, self.device) if chosen else []
        prepared.written[:] = [written for written in prepared.written if written.part.held]
        for written in prepared.written:
            if written.good(targets, residents, pairs):
                return written.launches
        drafts = self._drafts(layout, residents, here, pairs, chosen)
        drafts += _copies(_zeros(targets.empty), targets.empty)
        part: Part | None = None

        def take(nbytes: int) -> torch.Tensor:
            nonlocal part
            part = self._tables.take(nbytes) if keep else None
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device) if part is None else part.buffer

        launches = upload_launches(drafts, self.device, take)
        if part is not None:
            prepared.written.append(
                Written(
                    names=list(targets.slots),
                    slots=[weakref.ref(slot) for slot in targets.all],
                    addresses=_addresses(targets.all),
                    residents=[weakref.ref(resident) for resident in residents],
                    pairs=pairs,
                    part=part,
                    launches=launches,
                )
            )
        return launches

    def _bring(self, plan: MergePlan) -> tuple[list[Resident], Prepared]:
        """The plan's sources on the device, and what follows from the plan."""
        residents = self._sources.load(plan.sources)
        prepared = self._prepared.get(plan)
        if prepared is None:
            prepared = Prepared(lay_out(plan, [resident.packed for resident in residents]), grouped(plan))
            self._prepared[plan] = prepared
        return residents, prepared

    def _drafts(
        self,
        layout: Layout,
        residents: Sequence[Resident],
        chosen: Integers,
        pairs: Sequence[torch.Tensor | None],
        slots: Sequence[Slot],
    ) -> list[Draft]:
        """What merges the chosen tensors of a layout into these slots."""
        if not slots:
            return []
        sources = source_addresses(layout, residents), pair_addresses(layout, pairs, self._constants)
        rows = _rows(slots, layout.shapes[chosen])
        return draft_launches(layout, chosen, *sources, rows, _kinds(_tensors(slots)))

    # In functions of their own, so that what a group takes is free before the next one is merged.

    def _fill(
        self,
        group: Group,
        residents: Sequence[Resident],
        known: ModelThresholds,
        slots: Mapping[str, Slot],
        told: Told,
    ) -> None:
        """Merge a group into its slots."""
        merged = merge_group(group, _stacks(group, residents), known)
        sources = [x for pair in zip(merged.a, merged.b, strict=True) for x in pair]
        copies = _copies(sources, [slots[name] for name in group.names])
        for one in upload_launches(copies, self.device):
            one.run()
        told.add(group, merged)

    def _try(
        self, group: Group, residents: Sequence[Resident], known: ModelThresholds, told: Told
    ) -> torch.Tensor:
        """Merge a group: for each module whether the result overflows."""
        merged = merge_group(group, _stacks(group, residents), known)
        a, b = (x.isfinite().flatten(1).all(1) for x in (merged.a, merged.b))
        told.add(group, merged)
        return ~(a & b)

    def _known(self, plan: MergePlan, prepared: Prepared, residents: Sequence[Resident]) -> ModelThresholds:
        """Thresholds of the whole model, found once for each plan."""
        if plan.counts is not None and not prepared.known:
            prepared.known.update(
                model_thresholds(plan, prepared.groups, lambda group: _stacks(group, residents))
            )
        return prepared.known

    def _intermediates(self) -> torch.Tensor:
        return torch.empty(WORKSPACE + RESULTS, dtype=torch.uint8, device=self.device)

    @contextlib.contextmanager
    def _lending(self, groups: Sequence[Group]) -> Iterator[None]:
        """Lend what was reserved for intermediates to torch's allocator while groups are merged.

        So it asks the device for none, and finds the memory whole again afterwards.
        """
        reserved = self._spare is not None and len(groups) > 0
        if reserved:
            self._spare = None
        try:
            yield
        finally:
            if reserved:
                self._spare = self._intermediates()

    @contextlib.contextmanager
    def _apart(self, in_order: bool = False) -> Iterator[None]:
        """Do everything on the backend's own stream, which alone touches what it keeps on the device.

        in_order: after what is queued on the current stream and before what will be; else beside it, and the
        host waits at the end.
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
    """The backend on the current CUDA or ROCm device, or under the interpreter; else raises BackendError."""
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


def _views(buffer: torch.Tensor, plan: MergePlan) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """A and B of every result, one after the other in a buffer of :func:`_length` bytes."""
    start = 0
    for name, module in plan.modules.items():
        pair = []
        for shape, dtype in module.results:
            nbytes = shape[0] * shape[1] * dtype.itemsize
            pair.append(buffer[start : start + nbytes].view(dtype).view(shape))
            start += padded(nbytes)
        yield name, pair[0], pair[1]


def _length(plan: MergePlan) -> int:
    results = [result for module in plan.modules.values() for result in module.results]
    return sum(padded(rows * columns * dtype.itemsize) for (rows, columns), dtype in results)


def _chosen(layout: Layout, slots: Mapping[str, Slot]) -> tuple[Integers, list[Slot]]:
    """The tensors of a layout that have a slot, and where they go, a slot for two tensors."""
    here = [i for i, name in enumerate(layout.modules) if name in slots]
    numbers = np.array([2 * i + side for i in here for side in (0, 1)], np.int64)
    return numbers, [slots[layout.modules[i]] for i in here]


def _copies(sources: Sequence[torch.Tensor], slots: Sequence[Slot]) -> list[Draft]:
    """What copies tensors, A and B for each slot, into the slots, and zeros where they end."""
    targets = _tensors(slots)
    layout = copies(_kinds(sources))
    shapes = np.array([t.shape for t in sources], np.int64).reshape(-1, 2)
    addresses = np.array([t.data_ptr() for t in sources], np.int64).reshape(-1, 1)
    rows, kinds = _rows(slots, shapes), _kinds(targets)
    return draft_launches(layout, _every(targets), addresses, np.zeros_like(addresses), rows, kinds)


def _every(tensors: Sequence[torch.Tensor]) -> Integers:
    return np.arange(len(tensors))


def _rows(slots: Sequence[Slot], sources: Integers) -> Integers:
    """The rows of the table of tensors for the slots' tensors."""
    begins = np.array([begin for slot in slots for begin in (slot.begin_a, slot.begin_b)], np.int64)
    return target_rows(_tensors(slots), sources, begins.reshape(-1, 2))


def _zeros(slots: Sequence[Slot]) -> list[torch.Tensor]:
    """A tensor of nothing for each of the slots' tensors."""
    return [torch.empty(0, 0, dtype=t.dtype) for t in _tensors(slots)]


def _tensors(slots: Iterable[Slot]) -> list[torch.Tensor]:
    return [tensor for slot in slots for tensor in (slot.a, slot.b)]


def _addresses(slots: Sequence[Slot]) -> list[int]:
    return [tensor.data_ptr() for tensor in _tensors(slots)]


def _kinds(tensors: Sequence[torch.Tensor]) -> Integers:
    return np.array([KINDS[t.dtype] for t in tensors], np.int64)


def _stacks(group: Group, residents: Sequence[Resident]) -> Stacks:
    a, b = (tuple(residents[i].stack(group.names, side) for i in group.modules[0].present) for side in (0, 1))
    return a, b
