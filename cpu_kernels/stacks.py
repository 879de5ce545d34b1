"""Modules of one kind merged together, so that one call of torch or of a compiled loop does many of them.

All of a stack is merged in the thread that asks for it.  Knows nothing of threads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from merged_lora import bases
from merged_lora.backends import Energy
from merged_lora.factors import Factors
from merged_lora.lowrank import merge_modules
from merged_lora.plan import DeltaModule, EntryModule, OutputModule, Rule, SumModule
from merged_lora.regression import Moments, fitted
from merged_lora.streaming import starting_columns, truncate_tiles

from . import kernels
from .combine import NO_THRESHOLDS, combine_stack
from .pool import Integers, check_exit

M = TypeVar("M", bound=DeltaModule)


@dataclass(frozen=True, eq=False)
class Stack(Generic[M]):
    """Modules of one :func:`kind`, by name."""

    names: tuple[str, ...]
    modules: tuple[M, ...]


@dataclass(frozen=True, eq=False)
class MergedStack:
    """What became of a stack.

    names:    of its modules.
    factors:  one of each.
    energy:   squared norms before and after the cut, if the rank was cut.
    repeated: those of the names whose basis is one of many.
    """

    names: tuple[str, ...]
    factors: Sequence[Factors]
    energy: Sequence[Energy | None]
    repeated: Sequence[str] = ()


def stacked(modules: Mapping[str, M], nbytes: Callable[[M], int], limit: int) -> list[Stack[M]]:
    """All modules in stacks of at most ``limit`` bytes, or of a single module if that has more.

    The largest stacks come first, so that threads which share them end at about the same time.

    nbytes: what a module counts; called for one module of each kind.
    """
    alike: dict[Hashable, dict[str, M]] = {}
    for name, module in modules.items():
        alike.setdefault(kind(module), {})[name] = module
    stacks: list[tuple[int, Stack[M]]] = []
    for members in alike.values():
        names = list(members)
        each = nbytes(members[names[0]])
        most = max(1, limit // each)
        count = -(-len(names) // most)
        # In even parts: a short last one would take about as many calls as the others.
        for i in range(count):
            part = tuple(names[i * len(names) // count : (i + 1) * len(names) // count])
            stacks.append((each * len(part), Stack(part, tuple([members[name] for name in part]))))
    return [stack for _, stack in sorted(stacks, key=lambda pair: pair[0], reverse=True)]


def kind(module: DeltaModule) -> Hashable:
    """What modules of one stack share; weights, counts, keys and tensors may differ."""
    factors = tuple([(f.a.shape, f.a.dtype, f.b.shape, f.b.dtype) for f in module.sources])
    if isinstance(module, SumModule):
        mean = module.mean
        ruled: Hashable = mean and (mean.rule, mean.count), module.flat
    elif isinstance(module, OutputModule):
        ruled = tuple([i.values.numel() for i in module.inputs]), module.shrink
    else:
        ruled = module.basis, _outline(module.rule)
    return factors, ruled, module.rank, module.dtype, module.embedding, module.present


def merge_sums(stack: Stack[SumModule], weights: torch.Tensor | None = None) -> MergedStack:
    """Weighted sums of deltas.

    weights: of the products, float64 ``[modules, sources]``; by default those of the modules.
    """
    merged = merge_modules(stack.modules, weights)
    return MergedStack(stack.names, [m.factors for m in merged], [m.energy for m in merged])


def merge_outputs(stack: Stack[OutputModule]) -> MergedStack:
    """Deltas merged by their outputs."""
    first = stack.modules[0]
    moments = [
        Moments(
            *(torch.stack(parts) for parts in zip(*((i.values, i.vectors, i.rest) for i in own), strict=True))
        )
        for own in zip(*(module.inputs for module in stack.modules), strict=True)
    ]
    weights = torch.tensor([module.weights for module in stack.modules], dtype=torch.float64)
    a, b, cut = fitted(*_stacked(stack), moments, weights, first.shrink, first.rank)
    return _merged(stack, a, b, cut)


def coordinates_of(stack: Stack[EntryModule]) -> bases.Coordinates:
    """The deltas in the basis that they are merged in; the coordinates are contiguous."""
    first = stack.modules[0]
    assert first.basis is not None
    found = bases.coordinates_in(first.basis, *_stacked(stack), first.rank)
    return dataclasses.replace(found, values=tuple([x.contiguous() for x in found.values]))


def merge_coordinates(
    stack: Stack[EntryModule], coordinates: bases.Coordinates, thresholds: Integers = NO_THRESHOLDS
) -> MergedStack:
    """Deltas merged on their coordinates in a shared basis.

    thresholds: of :func:`merged_lora.cpu_kernels.combine.combine_stack`.
    """
    first = stack.modules[0]
    rules = [module.rule for module in stack.modules]
    merged = torch.empty_like(coordinates.values[0])
    combine_stack(coordinates.values, rules, merged, thresholds)
    weights = torch.tensor([rule.weights for rule in rules])
    done = _merged(stack, *bases.placed(coordinates, merged, weights, first.rank))
    again = [name for name, x in zip(stack.names, coordinates.repeated.tolist(), strict=True) if x]
    return dataclasses.replace(done, repeated=again)


def merge_deltas(stack: Stack[EntryModule], space: torch.Tensor) -> MergedStack:
    """Deltas merged entry by entry, all of them in memory.

    space: float32, at least :func:`entry_bytes` of all modules, to be used again: memory that is asked of the
        system for every stack would take as long to be filled with zeros as the products take.
    """
    first = stack.modules[0]
    a, b, scalings = _stacked(stack)
    shape = len(stack.modules), *first.entries
    size = shape[0] * shape[1] * shape[2]
    *values, merged = space[: size * (len(a) + 1)].view(-1, *shape).unbind(0)
    for x, y, s, target in zip(a, b, scalings.float().unbind(1), values, strict=True):
        torch.bmm(y.float() * s[:, None, None], x.float(), out=target)  # [M, out, in]
    combine_stack(values, [module.rule for module in stack.modules], merged)
    start = starting_columns(a, b, scalings, first.rank)
    return _merged(stack, *truncate_tiles(WholeDeltas(merged), start, first.rank))


class WholeDeltas:
    """Merged deltas float32 ``[modules, out, in]`` in memory, as :class:`merged_lora.streaming.Tiles`."""

    def __init__(self, merged: torch.Tensor) -> None:
        self._merged = merged

    def times(self, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`merged_lora.streaming.Tiles`."""
        check_exit()
        norms = [kernels.squared_norm(x.data_ptr(), x.numel()) for x in self._merged.unbind(0)]
        # MKL is fastest with the few columns first: for some shapes the other order takes twice as long.
        product = torch.bmm(right.mT.contiguous(), self._merged.mT).mT
        return product, torch.tensor(norms, dtype=torch.float64)

    def transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        """See :class:`merged_lora.streaming.Tiles`."""
        check_exit()
        return torch.bmm(self._merged.mT, left)


def entry_bytes(module: EntryModule) -> int:
    """Bytes of the deltas of every source, of their merge and of a score."""
    rows, columns = module.entries
    return 4 * (len(module.sources) + 2) * rows * columns


def coordinate_bytes(module: EntryModule) -> int:
    """Bytes of coordinates, of the bases, and of float64 copies of the factors and of one source's values."""
    (rows, columns), (out, in_) = module.entries, module.sources[0].shape
    total = sum(f.rank for f in module.sources)
    return 4 * rows * columns * (len(module.sources) + 2) + 8 * (out + in_) * (total + rows)


def vector_bytes(module: DeltaModule) -> int:
    """Bytes of two float64 copies of the factors and, of a module merged by outputs, of its eigenvectors."""
    inputs = module.inputs if isinstance(module, OutputModule) else ()
    copies = 16 * sum(f.a.numel() + f.b.numel() for f in module.sources)
    return copies + 8 * sum(i.vectors.numel() for i in inputs)


def _stacked(
    stack: Stack[EntryModule] | Stack[OutputModule],
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """A and B of every source, ``[modules, .., ..]``, and the scalings, float64 ``[modules, sources]``."""
    sources = list(zip(*(module.sources for module in stack.modules), strict=True))
    a = [torch.stack([f.a for f in own]) for own in sources]
    b = [torch.stack([f.b for f in own]) for own in sources]
    return a, b, torch.tensor([module.scalings for module in stack.modules], dtype=torch.float64)


def _merged(
    stack: Stack[EntryModule] | Stack[OutputModule],
    a: torch.Tensor,
    b: torch.Tensor,
    cut: torch.Tensor | None,
) -> MergedStack:
    """Stacked factors ``[modules, .., ..]`` and their norms ``[modules, 2]``, taken apart."""
    first = stack.modules[0]
    parts = zip(*(x.to(first.dtype).contiguous().unbind(0) for x in (a, b)), strict=True)
    factors = [Factors(x, y, 1.0, first.embedding) for x, y in parts]
    energy = [None] * len(factors) if cut is None else [(kept, asked) for kept, asked in cut.tolist()]
    return MergedStack(stack.names, factors, energy)


def _outline(rule: Rule) -> Hashable:
    """A rule by its kinds: how many entries are kept, weights and keys may differ within a stack."""
    return tuple([type(keep) for keep in rule.keeps]), rule.blend
