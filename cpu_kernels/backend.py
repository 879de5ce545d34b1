"""The backend ``cpu``: the compiled loops on every core, and torch's linear algebra between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from queue import SimpleQueue

import numpy as np
import torch

from merged_lora.backends import Energy, Progress, Result, no_progress
from merged_lora.bases import Coordinates
from merged_lora.factors import Factors
from merged_lora.lowrank import inner_of, weights_of
from merged_lora.plan import EntryModule, FactorModule, MergePlan, OutputModule, SumModule
from merged_lora.streaming import starting_columns, truncate_tiles

from .combine import KnownThresholds, combine, concatenate
from .pool import Item, Made, Pool, batches
from .room import Room
from .stacks import (
    M,
    MergedStack,
    Stack,
    coordinate_bytes,
    coordinates_of,
    entry_bytes,
    merge_coordinates,
    merge_deltas,
    merge_outputs,
    merge_sums,
    stacked,
    vector_bytes,
)
from .thresholds import Visit, find_thresholds
from .tiles import NumbaTiles
from .warm_up import warm_up

STACK_BYTES = 4 << 20  # of coordinates and their bases, or of float64 factors, that one thread merges
WHOLE_BYTES = 32 << 20  # of deltas that one thread forms
TOGETHER_BYTES = 16 << 20  # of deltas that are merged between two calls of progress, or a single module
KEPT_BYTES = 256 << 20  # of deltas, or of coordinates, that are in memory at the same time


CoordinateParts = Callable[[], Iterator[list[tuple[Stack[EntryModule], Coordinates]]]]
"""Goes through all stacks of a merge with their coordinates, some at a time."""


class CpuBackend:
    """Merges in compiled loops over tensors or tiles of them, on a pool of threads."""

    name = "cpu"

    def __init__(self) -> None:
        self._pool = Pool()
        self._known = KnownThresholds()
        self._room = Room()

    def confine(self, threads: int, nice: int) -> None:
        """See :class:`merged_lora.backends.Backend`; ends the threads that there were, and starts others."""
        if threads < 1:
            raise ValueError(f"the number of threads must be at least 1, got {threads}")
        if not 0 <= nice <= 19:
            raise ValueError(f"the nice value must be 0 to 19, got {nice}")
        self._pool = Pool(threads, nice)

    def warm_up(self, dtype: torch.dtype) -> None:
        """See :class:`merged_lora.backends.Backend`."""
        warm_up(self)

    def merge(self, plan: MergePlan, progress: Progress = no_progress) -> Result:
        """See :class:`merged_lora.backends.Backend`."""
        with self._pool.lasting():
            return _Merge(plan, progress, self._pool, self._known, self._room).result()

    def make_room(self, progress: Progress) -> None:
        """See :class:`merged_lora.backends.Backend`."""
        self._room.make_ready(progress)


class _Merge:
    """A merge that is being made; what there is of its result."""

    def __init__(
        self, plan: MergePlan, progress: Progress, pool: Pool, known: KnownThresholds, room: Room
    ) -> None:
        self._plan, self._progress, self._pool = plan, progress, pool
        self._known, self._room = known, room
        self._modules: dict[str, Factors] = {}
        self._energy: dict[str, Energy] = {}
        self._repeated: set[str] = set()

    def result(self) -> Result:
        """Merge all modules, in whichever order is fastest; the result has them in that of the plan."""
        names = list(self._plan.modules)
        self._merge_factors()
        self._merge_sums({name: m for name, m in self._plan.modules.items() if isinstance(m, SumModule)})
        outputs = {name: m for name, m in self._plan.modules.items() if isinstance(m, OutputModule)}
        self._each(merge_outputs, stacked(outputs, vector_bytes, STACK_BYTES))
        entries = {name: m for name, m in self._plan.modules.items() if isinstance(m, EntryModule)}
        self._merge_deltas({name: m for name, m in entries.items() if m.basis is None})
        self._merge_coordinates({name: m for name, m in entries.items() if m.basis is not None})
        return Result(
            {name: self._modules[name] for name in names},
            {name: self._energy[name] for name in names if name in self._energy},
            tuple([name for name in names if name in self._repeated]),
        )

    def _merge_factors(self) -> None:
        factors = {name: m for name, m in self._plan.modules.items() if isinstance(m, FactorModule)}
        jobs = [job for m in factors.values() for job in (m.a, m.b)]
        # The inputs of the jobs: the chosen modules of the sources.
        inputs = (tuple(source.key for source in self._plan.sources), tuple(factors))
        merged = combine(self._pool, self._room, jobs, _halved(self._progress), self._known, inputs)
        for (name, module), a, b in zip(factors.items(), merged[::2], merged[1::2], strict=True):
            self._modules[name] = Factors(a, b, 1.0, module.embedding)

    def _merge_sums(self, modules: Mapping[str, SumModule]) -> None:
        """Modules that are weighted sums of deltas."""
        whole = {name: m for name, m in modules.items() if m.is_concatenated and m.mean is None}
        if whole:
            made = concatenate(self._pool, self._room, list(whole.values()), self._progress)
            self._modules.update(zip(whole, made, strict=True))
            modules = {name: module for name, module in modules.items() if name not in whole}
        stacks = stacked(modules, vector_bytes, STACK_BYTES)
        if not any(module.mean for module in modules.values()):
            self._each(merge_sums, stacks)
            return
        grams = self._spread(lambda stack: inner_of(stack.modules), stacks, lambda _: self._progress(0))
        found = weights_of([stack.modules for stack in stacks], grams)
        weights = dict(zip(stacks, found, strict=True))
        self._each(lambda stack: merge_sums(stack, weights[stack]), stacks)

    def _merge_deltas(self, modules: Mapping[str, EntryModule]) -> None:
        """Modules whose deltas are merged entry by entry."""
        limit = min(WHOLE_BYTES, KEPT_BYTES // self._pool.cores)
        small = {name: m for name, m in modules.items() if entry_bytes(m) <= limit}
        spaces = threading.local()

        def merge(stack: Stack[EntryModule]) -> MergedStack:
            if not hasattr(spaces, "own"):
                spaces.own = torch.empty(limit // 4)
            return merge_deltas(stack, spaces.own)

        self._each(merge, stacked(small, entry_bytes, min(TOGETHER_BYTES, limit)))
        for name, module in modules.items():
            if name not in small:
                self._merge_tiles(name, module)
                self._progress(1)

    def _merge_tiles(self, name: str, module: EntryModule) -> None:
        """A module whose deltas are merged a few rows at a time, by all threads together."""
        a, b = [f.a[None] for f in module.sources], [f.b[None] for f in module.sources]
        start = starting_columns(a, b, torch.tensor([module.scalings], dtype=torch.float64), module.rank)
        tiles = NumbaTiles(module, self._pool, self._progress)
        new_a, new_b, cut = truncate_tiles(tiles, start, module.rank)
        pair = [x[0].to(module.dtype).contiguous() for x in (new_a, new_b)]
        self._modules[name] = Factors(pair[0], pair[1], 1.0, module.embedding)
        kept, asked = cut[0].tolist()
        self._energy[name] = kept, asked

    def _merge_coordinates(self, modules: Mapping[str, EntryModule]) -> None:
        """Modules merged on their coordinates in a shared basis."""
        stacks = stacked(modules, coordinate_bytes, STACK_BYTES)
        if self._plan.counts is None:
            self._each(lambda stack: merge_coordinates(stack, coordinates_of(stack)), stacks)
            return
        parts = self._coordinate_parts(stacks)
        found = self._model_thresholds(self._plan.counts, parts)

        def merge(pair: tuple[Stack[EntryModule], Coordinates]) -> MergedStack:
            stack, coordinates = pair
            thresholds = np.array([each for name in stack.names for each in found[name]], np.int64)
            return merge_coordinates(stack, coordinates, thresholds)

        for part in parts():
            for merged in self._spread(merge, part, lambda pair: self._progress(len(pair[0].names))):
                self._add(merged)

    def _coordinate_parts(self, stacks: Sequence[Stack[EntryModule]]) -> CoordinateParts:
        """Goes through all stacks with their coordinates, which are kept after the first time if they fit."""
        sizes = [sum(map(coordinate_bytes, stack.modules)) for stack in stacks]
        parts = list(batches(list(zip(stacks, sizes, strict=True)), lambda pair: pair[1], KEPT_BYTES))
        kept: list[list[tuple[Stack[EntryModule], Coordinates]]] = []

        def through() -> Iterator[list[tuple[Stack[EntryModule], Coordinates]]]:
            if kept:
                yield from kept
                return
            for part in parts:
                own = [stack for stack, _ in part]
                made = self._spread(coordinates_of, own, lambda _: self._progress(0))
                pairs = list(zip(own, made, strict=True))
                if len(parts) == 1:
                    kept.append(pairs)
                yield pairs

        return through

    def _model_thresholds(
        self, counts: Sequence[int], parts: CoordinateParts
    ) -> dict[str, list[tuple[int, int]]]:
        """Thresholds of every source by module, of entries that are counted over the whole model."""
        sizes = [0] * len(counts)
        starts: dict[str, list[int]] = {}
        for name, module in self._plan.modules.items():
            assert isinstance(module, EntryModule)
            starts[name] = [sizes[i] for i in module.present]
            for i in module.present:
                sizes[i] += module.entries[0] * module.entries[1]
        free: SimpleQueue[int] = SimpleQueue()
        for core in range(self._pool.cores):
            free.put(core)

        def scan(visit: Visit, begins: Collection[int] | None) -> None:
            def visit_stack(pair: tuple[Stack[EntryModule], Coordinates]) -> None:
                stack, coordinates = pair
                core = free.get()
                for at, values in enumerate(coordinates.values):
                    source = stack.modules[0].present[at]
                    for x, name in zip(values.unbind(0), stack.names, strict=True):
                        begin = starts[name][at]
                        if begins is None or begin in begins:
                            visit(core, source, x.data_ptr(), x.numel(), begin)
                free.put(core)

            for part in parts():
                self._pool.each(visit_stack, part, lambda _: self._progress(0))

        found = find_thresholds(scan, self._pool.cores, list(enumerate(counts)), sizes)
        return {
            name: [
                (found[i].value, found[i].cut - begin)
                for i, begin in zip(self._plan.modules[name].present, begins, strict=True)
            ]
            for name, begins in starts.items()
        }

    def _each(self, merge: Callable[[Stack[M]], MergedStack], stacks: Sequence[Stack[M]]) -> None:
        """Merge stacks by a function, each on one core or in turn."""
        for merged in self._spread(merge, stacks, lambda stack: self._progress(len(stack.names))):
            self._add(merged)

    def _spread(
        self, function: Callable[[Item], Made], items: Sequence[Item], finished: Callable[[Item], object]
    ) -> list[Made]:
        """The results of a function for items, each on one core, or in turn with torch on all of them.

        finished: called with every item that is done.
        """
        # The large products of few modules torch spreads better itself.
        if self._pool.confined or len(items) >= self._pool.cores:
            return self._pool.each(function, items, finished)
        made = []
        for item in items:
            made.append(function(item))
            finished(item)
        return made

    def _add(self, stack: MergedStack) -> None:
        for name, factors, energy in zip(stack.names, stack.factors, stack.energy, strict=True):
            self._modules[name] = factors
            if energy is not None:
                self._energy[name] = energy
        self._repeated.update(stack.repeated)


def load() -> CpuBackend:
    """The backend; numba keeps its compiled loops on disk, so only the first use ever waits for them."""
    return CpuBackend()


def _halved(progress: Progress) -> Progress:
    """Progress in modules, from progress in tensors: two make a module."""
    done = 0

    def report(tensors: int) -> None:
        nonlocal done
        before, done = done, done + tensors
        progress(done // 2 - before // 2)

    return report
