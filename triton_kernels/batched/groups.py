"""Modules of one kind merged together, for merges that no single launch does.

Factors are given as stacks, which are views of packed sources, and the result is a stack, too.  Knows nothing
of slots.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from merged_lora import bases
from merged_lora.plan import (
    EntryModule,
    FactorModule,
    Graded,
    MergePlan,
    Module,
    OutputModule,
    Random,
    Rule,
    SumModule,
)
from merged_lora.regression import Moments, fitted
from merged_lora.streaming import OVERSAMPLING, starting_columns, truncate_tiles
from merged_lora.triton_kernels.factors.layout import is_launched
from merged_lora.triton_kernels.kernels.words import INFINITY

from . import entries, lowrank
from .entries import Threshold
from .fused_tiles import FUSED, SAMPLE_BYTES, TritonTiles
from .lowrank import WORKSPACE, MergedStack
from .tiles import ROW_STEP, TILE_BYTES, TorchTiles, count_bins, last_bin, lower_bits, upper_bits

RESULTS = 64 << 20  # bytes of merged factors that wait for their slots at the same time
TEMPORARIES = 12  # peak temporaries of ``entries.combine``, as a multiple of its input size

Stacks = tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]
"""A and B of each source, ``[modules, rank_i, in]`` and ``[modules, out, rank_i]``."""
ModelThresholds = Mapping[str, list[tuple[Threshold, ...]]]
"""By module name, the thresholds of each source if entries are counted over the whole model."""


@dataclass(frozen=True, eq=False)
class Group:
    """Modules of one kind that are merged together: a single one, or up to RESULTS bytes of results."""

    names: tuple[str, ...]
    modules: tuple[Module, ...]

    def only(self, names: Collection[str]) -> Group:
        """The group of those modules that have one of these names."""
        chosen = {name: m for name, m in zip(self.names, self.modules, strict=True) if name in names}
        return Group(tuple(chosen), tuple(chosen.values()))


def grouped(plan: MergePlan) -> tuple[Group, ...]:
    """The modules of a plan that are merged in groups."""
    kinds: dict[Hashable, dict[str, Module]] = {}
    for name, module in plan.modules.items():
        if not is_launched(module):
            kinds.setdefault(kind(module), {})[name] = module
    return tuple(part for group in kinds.values() for part in _parts(group))


def kind(module: Module) -> Hashable:
    """The properties that modules merged together share; weights, keys and tensors may differ."""
    if isinstance(module, SumModule):
        return lowrank.kind(module)
    if isinstance(module, FactorModule):
        inputs = (*module.a.inputs, *module.b.inputs)
        ruled: tuple[Hashable, ...] = (_outline(module.a.rule), _outline(module.b.rule))
        factors = tuple((x.shape, x.dtype) for x in inputs)
    else:
        if isinstance(module, OutputModule):
            counts = tuple(inputs.values.numel() for inputs in module.inputs)
            ruled = (counts, module.shrink, module.rank, module.dtype)
        else:
            ruled = (_outline(module.rule), module.basis, module.rank, module.dtype)
        factors = tuple((x.shape, x.dtype) for f in module.sources for x in (f.a, f.b))
    return factors, module.present, ruled, module.embedding


def merge_group(group: Group, stacks: Stacks, thresholds: ModelThresholds) -> MergedStack:
    """The merged factors of a group.

    stacks: factors of its sources.
    thresholds: of :func:`model_thresholds`.
    """
    first = group.modules[0]
    a, b = stacks
    if isinstance(first, SumModule):
        on_device = _weights(group, a[0].device)
        return lowrank.merge_stack(
            lowrank.Stack(a, b, on_device, first.rank, first.mean, first.dtype, first.flat)
        )
    parts = [_merge_part(part, _sliced(stacks, where), thresholds) for where, part in _chunks(group)]
    energies = [part.energy for part in parts if part.energy is not None]
    repeated = [part.repeated for part in parts if part.repeated is not None]
    return MergedStack(
        torch.cat([part.a for part in parts]),
        torch.cat([part.b for part in parts]),
        torch.cat(energies) if energies else None,
        torch.cat(repeated) if repeated else None,
    )


def model_thresholds(
    plan: MergePlan, groups: Sequence[Group], stacks: Callable[[Group], Stacks]
) -> dict[str, list[tuple[Threshold, ...]]]:
    """The thresholds of each module if entries are counted over the whole model; otherwise none.

    stacks: returns the factors of a group's sources.
    """
    if plan.counts is None:
        return {}
    modules = {name: m for name, m in plan.modules.items() if isinstance(m, EntryModule)}

    def magnitudes() -> Iterator[tuple[tuple[str, ...], int, torch.Tensor]]:
        """Names of modules, index of a source, and its magnitudes ``[modules, entries]``, for all of both."""
        for group in groups:
            for where, part in _chunks(group):
                coordinates = _coordinates(part, _sliced(stacks(group), where))
                for source, x in zip(group.modules[0].present, coordinates.values, strict=True):
                    yield part.names, source, entries.magnitudes(x)

    last = _last_kept(lambda: ((i, x) for _, i, x in magnitudes()), plan.counts)
    ties: dict[tuple[str, int], torch.Tensor] = {}
    for names, source, mags in magnitudes():
        for name, row in zip(names, mags, strict=True):
            ties[name, source] = (row == last[source][0]).nonzero()[:, 0]
    found: dict[str, list[tuple[Threshold, ...]]] = {}
    wanted = [ties_kept for _, ties_kept in last]
    for name, module in modules.items():  # in the order of the plan, which is the order of the indices
        found[name] = []
        for source in module.present:
            indices = ties[name, source]
            kept = min(wanted[source], indices.numel())
            cut = int(indices[kept - 1]) + 1 if kept else 0
            wanted[source] -= kept
            threshold = [torch.tensor([x], device=indices.device) for x in (last[source][0], cut)]
            found[name].append((Threshold(*threshold),))
    return found


def _last_kept(
    magnitudes: Callable[[], Iterator[tuple[int, torch.Tensor]]], wanted: Sequence[int]
) -> list[tuple[int, int]]:
    """For each source the bits of the smallest kept magnitude, and how many entries that equal it are kept.

    magnitudes: iterates over all magnitudes, with the index of their source.
    wanted: number of entries kept of each source.
    """

    def counted(to_bin: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> dict[int, torch.Tensor]:
        """The number of magnitudes in each bin, by source.

        to_bin: one function per source.
        """
        totals: dict[int, torch.Tensor] = {}
        for source, mags in magnitudes():
            counts = count_bins(mags.reshape(1, -1), to_bin[source])
            totals[source] = totals[source] + counts if source in totals else counts
        return totals

    upper = counted([upper_bits] * len(wanted))
    counts = {i: upper[i].new_tensor([min(wanted[i], int(upper[i].sum()))]) for i in upper}
    first = {i: last_bin(upper[i], counts[i]) for i in upper}
    lower = counted([lower_bits(first[i][0]) if i in first else upper_bits for i in range(len(wanted))])
    found = []
    for i, count in enumerate(wanted):
        if i not in upper or count == 0:
            found.append((INFINITY.value, 0))
            continue
        bins, left = first[i]
        low, left = last_bin(lower[i], left)
        found.append((int(bins) << 16 | int(low), int(left)))
    return found


def _merge_part(group: Group, stacks: Stacks, thresholds: ModelThresholds) -> MergedStack:
    """The merged factors of a part of a group, whose intermediates fit into the workspace."""
    first = group.modules[0]
    a, b = stacks
    if isinstance(first, FactorModule):
        modules = [m for m in group.modules if isinstance(m, FactorModule)]
        new_a = entries.combine([x.float() for x in a], [m.a.rule for m in modules])
        new_b = entries.combine([x.float() for x in b], [m.b.rule for m in modules])
        return MergedStack(new_a.to(first.a.dtype), new_b.to(first.b.dtype), None)
    if isinstance(first, OutputModule):
        device = a[0].device
        given = _scalings(group, device), _moments(group, device), _weights(group, device)
        new_a, new_b, cut = fitted(a, b, *given, first.shrink, first.rank)
        return MergedStack(new_a.to(first.dtype), new_b.to(first.dtype), cut)
    assert isinstance(first, EntryModule)
    ruled = _rules(group)
    repeated: torch.Tensor | None = None
    energy: torch.Tensor | None
    if first.basis is None:
        scalings = _scalings(group, a[0].device)
        kind_of_tiles = TritonTiles if ruled[0].consists_of(*FUSED) else TorchTiles
        tiles = kind_of_tiles(a, b, scalings.float(), ruled)
        new_a, new_b, energy = truncate_tiles(tiles, starting_columns(a, b, scalings, first.rank), first.rank)
    else:
        coordinates = _coordinates(group, stacks)
        found = _stacked([thresholds[name] for name in group.names]) if thresholds else None
        merged = entries.combine(coordinates.values, ruled, found)
        weights = torch.tensor([rule.weights for rule in ruled])
        new_a, new_b, energy = bases.placed(coordinates, merged, weights, first.rank)
        repeated = coordinates.repeated
    return MergedStack(new_a.to(first.dtype), new_b.to(first.dtype), energy, repeated)


def _coordinates(group: Group, stacks: Stacks) -> bases.Coordinates:
    """The deltas of a group in the basis that its modules are merged in."""
    first = group.modules[0]
    assert isinstance(first, EntryModule)
    assert first.basis is not None
    a, b = stacks
    return bases.coordinates_in(first.basis, a, b, _scalings(group, a[0].device), first.rank)


def _rules(group: Group) -> list[Rule]:
    return [m.rule for m in group.modules if isinstance(m, EntryModule)]


def _scalings(group: Group, device: torch.device) -> torch.Tensor:
    """Scalings of the sources, float64 ``[modules, sources]``."""
    table = [m.scalings for m in group.modules if isinstance(m, EntryModule | OutputModule)]
    return torch.tensor(table, dtype=torch.float64).to(device, non_blocking=True)


def _weights(group: Group, device: torch.device) -> torch.Tensor:
    """Weights of the sources, float64 ``[modules, sources]``."""
    table = [m.weights for m in group.modules if isinstance(m, SumModule | OutputModule)]
    return torch.tensor(table, dtype=torch.float64).to(device, non_blocking=True)


def _moments(group: Group, device: torch.device) -> list[Moments]:
    """The inputs of each source, copied to the device."""
    members = [m.inputs for m in group.modules if isinstance(m, OutputModule)]
    return [
        Moments(
            torch.stack([inputs.values for inputs in own]).to(device),
            torch.stack([inputs.vectors for inputs in own]).to(device),
            torch.stack([inputs.rest for inputs in own]).to(device),
        )
        for own in zip(*members, strict=True)
    ]


def _stacked(rows: Sequence[list[tuple[Threshold, ...]]]) -> list[tuple[Threshold, ...]]:
    """Thresholds of one module each, combined into thresholds of all modules."""
    return [
        (Threshold(torch.cat([x.value for (x,) in column]), torch.cat([x.cut for (x,) in column])),)
        for column in zip(*rows, strict=True)
    ]


def _outline(rule: Rule) -> Hashable:
    """A rule without weights and keys, which may differ between the modules of a group."""
    keeps = tuple(replace(keep, key=0) if isinstance(keep, Random | Graded) else keep for keep in rule.keeps)
    return keeps, rule.blend


def _parts(modules: Mapping[str, Module]) -> Iterator[Group]:
    """Modules of one kind, divided into groups of a bounded size."""
    names = list(modules)
    (a, b) = modules[names[0]].results
    each = sum(rows * columns * dtype.itemsize for (rows, columns), dtype in (a, b))
    step = max(1, RESULTS // each)
    for start in range(0, len(names), step):
        part = names[start : start + step]
        yield Group(tuple(part), tuple(modules[name] for name in part))


def _chunks(group: Group) -> Iterator[tuple[slice, Group]]:
    """Parts of a group whose intermediates take WORKSPACE bytes, unless a single module needs more."""
    first = group.modules[0]
    (_, columns), (rows, _) = (shape for shape, _ in first.results)
    space = WORKSPACE
    if isinstance(first, FactorModule):
        size = 4 * max(x.numel() for x in (*first.a.inputs, *first.b.inputs)) * len(first.present)
        each = TEMPORARIES * size
    elif isinstance(first, OutputModule):
        total, pairs = sum(f.rank for f in first.sources), sum(i.values.numel() for i in first.inputs)
        each = 8 * (columns * (4 * total + 2 * pairs) + rows * 2 * total + 8 * (total + pairs) ** 2)
    else:
        assert isinstance(first, EntryModule)
        total = sum(f.rank for f in first.sources)
        sources = len(first.present)
        if first.basis is None:
            # Copies of the factors in float32 and float64, and four float64 copies of orthonormal columns.
            vectors = (rows + columns) * (12 * total + 32 * (first.rank + OVERSAMPLING))
            each = sources * max(SAMPLE_BYTES, TEMPORARIES * 4 * ROW_STEP * columns) + vectors
            space -= TEMPORARIES * TILE_BYTES
        else:
            entries = first.entries[0] * first.entries[1]
            each = TEMPORARIES * 4 * entries * sources + 16 * (rows + columns) * (total + first.rank)
    step = max(1, space // each)
    for start in range(0, len(group.names), step):
        where = slice(start, start + step)
        yield where, Group(group.names[where], group.modules[where])


def _sliced(stacks: Stacks, where: slice) -> Stacks:
    """The stacks of some modules."""
    a, b = (tuple(x[where] for x in side) for side in stacks)
    return a, b
