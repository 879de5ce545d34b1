"""From jobs and rules to tables of addresses for the compiled loops."""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from merged_lora.backends import Progress
from merged_lora.factors import Factors
from merged_lora.lru import Lru
from merged_lora.plan import (
    AgreeingMean,
    All,
    Blend,
    EnergyMean,
    FactorJob,
    Keep,
    Largest,
    LargestInModel,
    Module,
    Random,
    Rule,
    Sum,
    SumModule,
)

from . import kernels
from .entries import addresses, energies_of, find_in, keep_entries
from .pool import Integers, Pool, check_exit
from .room import Room

FUSED = (All, Largest, LargestInModel, Random), (Sum, AgreeingMean)
"""Keep rules and blends that ``combine_tensors`` does itself, for any mix of them."""
KINDS = {torch.bfloat16: kernels.BF16, torch.float16: kernels.FP16, torch.float32: kernels.FP32}
_unflattened: Any = torch._C._nn.unflatten_dense_tensors
"""Views of a flat tensor in the shapes of others, made by one call."""
KNOWN = 32
"""Number of merges whose thresholds are kept; those of 500 modules of four sources take 64 KB."""
NO_THRESHOLDS = np.zeros((0, 2), np.int64)


@dataclass(frozen=True, eq=False)
class Table:
    """Tensors to be combined, as the compiled loop takes them.

    tensors:   all of them, which are kept alive because the loop only knows their addresses.
    arguments: of ``combine_tensors``, after the items.
    """

    tensors: Sequence[torch.Tensor]
    arguments: tuple[Any, ...]

    def combine(self, items: Integers) -> None:
        """Write the outputs of these indices."""
        kernels.combine_tensors(items, *self.arguments)


class KnownThresholds:
    """Thresholds that earlier merges found: those of other weights on the same sources need the same ones."""

    def __init__(self) -> None:
        self._known: Lru[Hashable, Integers] = Lru()
        self._lock = threading.Lock()

    def use(self, key: Hashable, rows: int) -> Integers:
        """A copy of the thresholds under a key ``[rows, 2]``; all UNKNOWN if there are none."""
        with self._lock:
            known = self._known.use(key)
        return np.full((rows, 2), kernels.UNKNOWN) if known is None else known.copy()

    def add(self, key: Hashable, thresholds: Integers) -> None:
        """Store the thresholds of a whole merge; nobody may change them any more."""
        with self._lock:
            self._known.add(key, thresholds, KNOWN)


def combine(
    pool: Pool,
    room: Room,
    jobs: Sequence[FactorJob],
    progress: Progress,
    known: KnownThresholds | None = None,
    sources: Hashable = None,
) -> list[torch.Tensor]:
    """The merged tensor of every job, all of one strategy.

    room:     has memory for them.
    progress: called with the number of tensors finished since the last call.
    known:    thresholds of earlier merges.
    sources:  names the content and the order of all inputs, for ``known``.
    """
    if not jobs:
        return []
    outputs = _new_tensors(room, [(job.inputs[0], job.dtype) for job in jobs])
    cost = np.array([t.numel() for t in outputs]) * np.array([len(job.inputs) for job in jobs])
    if _fused([job.rule for job in jobs]):
        inputs = [tensor.contiguous() for job in jobs for tensor in job.inputs]
        rules, thresholds = [job.rule for job in jobs], NO_THRESHOLDS
        counts = tuple([c for rule in rules for keep in rule.keeps for c in keep.counts]) if known else ()
        if known is not None and len(counts) == len(inputs):
            thresholds = known.use((sources, counts), len(inputs))
        pool.run(cost, _table(inputs, outputs, rules, [1.0] * len(inputs), thresholds).combine, progress)
        if known is not None and thresholds.size:
            known.add((sources, counts), thresholds)
    else:

        def work(batch: Integers) -> None:
            for i in batch.tolist():
                job, target = jobs[i], outputs[i]
                copies = [x.to(torch.float32, copy=True).contiguous()[None] for x in job.inputs]
                combine_stack(copies, [job.rule], target[None])

        pool.run(cost, work, progress)
    return outputs


def concatenate(pool: Pool, room: Room, modules: Sequence[SumModule], progress: Progress) -> list[Factors]:
    """The factors of weighted sums of deltas whose rank is the sum of ranks, in the order of the modules.

    room:     has memory for them.
    progress: called with the number of modules finished since the last call.

    As ``lowrank.concatenated``, by one compiled loop for all modules.
    """
    made = _new_pairs(room, modules)
    sources = [f for module in modules for f in module.sources]
    inputs = [(f.a.contiguous(), f.b.contiguous()) for f in sources]
    counts = np.array([len(module.sources) for module in modules])
    table = (
        np.array([(a.data_ptr(), b.data_ptr()) for a, b in made]),
        np.array([KINDS[module.dtype] for module in modules]),
        np.array([(*module.sources[0].shape, module.rank) for module in modules]),
        np.cumsum(counts) - counts,
        counts,
        np.array([(a.data_ptr(), b.data_ptr()) for a, b in inputs]),
        np.array([(KINDS[a.dtype], KINDS[b.dtype]) for a, b in inputs]),
        np.array([f.rank for f in sources]),
        np.array([w for module in modules for w in module.weights], np.float32),
    )
    cost = np.array([a.numel() + b.numel() for a, b in made])
    pool.run(cost, lambda items: kernels.concatenate(items, *table), progress)
    return [Factors(*pair, 1.0, module.embedding) for pair, module in zip(made, modules, strict=True)]


def combine_stack(
    values: Sequence[torch.Tensor],
    rules: Sequence[Rule],
    target: torch.Tensor,
    thresholds: Integers = NO_THRESHOLDS,
) -> None:
    """Combine values of modules of one shape, in this thread.

    values:     of every source float32 ``[modules, rows, columns]``, contiguous; may be overwritten.
    rules:      one per module, of one strategy.
    target:     gets the result, ``[modules, rows, columns]``, contiguous.
    thresholds: ``(value, cut)`` of every source of every module ``[modules * sources, 2]``, used instead of
        the counts.
    """
    coefficients = [1.0] * (len(rules) * len(values))
    if not _fused(rules):
        if thresholds.size:
            raise TypeError("given thresholds need rules that the compiled loops know")
        coefficients, kept = [], []
        buffer = torch.empty(values[0][0].numel())
        for index, rule in enumerate(rules):
            check_exit()
            own = [x[index] for x in values]
            keep_entries(own, 0, rule.keeps, find_in(own, rule.keeps, buffer), buffer)
            coefficients += energies_of(own) if isinstance(rule.blend, EnergyMean) else [1.0] * len(own)
            kept.append(Rule(rule.weights, (All(),) * len(own), rule.blend))
        rules = kept
    inputs = [x for own in zip(*(x.unbind(0) for x in values), strict=True) for x in own]
    table = _table(inputs, target.unbind(0), rules, coefficients, thresholds)
    table.combine(np.arange(len(rules)))


def _fused(rules: Sequence[Rule]) -> bool:
    """Whether the compiled loop does all of these rules itself."""
    keeps, blends = FUSED
    kinds = {type(keep) for rule in rules for keep in rule.keeps}
    return kinds.issubset(keeps) and {type(rule.blend) for rule in rules}.issubset(blends)


def _table(
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    rules: Sequence[Rule],
    coefficients: Sequence[float],
    thresholds: Integers = NO_THRESHOLDS,
) -> Table:
    """The table of outputs with a rule each, for rules in FUSED or inputs whose entries are kept already.

    inputs:       of all outputs, one after the other; contiguous, as are the outputs.
    coefficients: of an energy mean, one for every input.
    thresholds:   as in :func:`combine_stack`.
    """
    counts = np.array([len(rule.weights) for rule in rules])
    size = np.array([t.numel() for t in outputs])
    arguments = (
        addresses(outputs),
        np.array([KINDS[t.dtype] for t in outputs]),
        size,
        np.zeros_like(size),
        np.cumsum(counts) - counts,
        counts,
        addresses(inputs),
        np.array([KINDS[t.dtype] for t in inputs]),
        *source_tables(rules, coefficients),
        thresholds,
    )
    return Table([*inputs, *outputs], arguments)


def source_tables(rules: Sequence[Rule], coefficients: Sequence[float]) -> tuple[Any, ...]:
    """The arguments of ``combine_tensors`` from ``weight`` to ``weighted``, for rules of one strategy."""
    blend = rules[0].blend
    return (
        np.array([w for rule in rules for w in rule.weights], np.float32),
        *_keep_tables([keep for rule in rules for keep in rule.keeps]),
        np.array(coefficients, np.float32),
        blend_code(blend),
        isinstance(blend, AgreeingMean) and blend.weighted,
    )


def _keep_tables(keeps: Sequence[Keep]) -> tuple[Any, ...]:
    """Count, share, key and rescale of every keep rule."""
    # A merge has hundreds of rules and nearly always of one kind, which then need not be looked at.
    kinds = {type(keep) for keep in keeps}
    if kinds <= {All, LargestInModel} or kinds == {Largest}:
        counts = [keep.count for keep in keeps if isinstance(keep, Largest)] or [kernels.KEEP_ALL] * len(
            keeps
        )
        nothing, ones = np.zeros(len(keeps), np.uint64), np.ones(len(keeps), np.float32)
        return np.array(counts), np.full(len(keeps), kernels.NO_DRAW), nothing, ones
    counts, shares, keys, rescales = (list(column) for column in zip(*map(_row, keeps), strict=True))
    return np.array(counts), np.array(shares), np.array(keys, np.uint64), np.array(rescales, np.float32)


def _row(keep: Keep) -> tuple[int, int, int, float]:
    """Count, share, key and rescale of a keep rule that ``combine_tensors`` knows."""
    match keep:
        case All() | LargestInModel():  # thresholds are given for the latter
            return kernels.KEEP_ALL, kernels.NO_DRAW, 0, 1.0
        case Largest(count):
            return count, kernels.NO_DRAW, 0, 1.0
        case Random(share, key):
            return kernels.KEEP_ALL, share, key, keep.rescale
    raise TypeError(f"the compiled loops have no rule for {keep}")


def blend_code(blend: Blend) -> int:
    """The code of ``combine_tensors`` for how entries are blended."""
    match blend:
        case Sum():
            return kernels.SUM
        case EnergyMean():
            return kernels.VOTE_ENERGY
        case AgreeingMean(frequency):
            return kernels.VOTE_FREQUENCY if frequency else kernels.VOTE_TOTAL


def _new_pairs(room: Room, modules: Sequence[Module]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The factors of the results of modules without values, those of a dtype as parts of one buffer."""
    places: dict[tuple[tuple[int, ...], torch.dtype], list[tuple[int, int]]] = {}
    for i, module in enumerate(modules):
        for side, kind in enumerate(module.results):
            places.setdefault(kind, []).append((i, side))
    made: dict[tuple[int, int], torch.Tensor] = {}
    for dtype in dict.fromkeys(dtype for _, dtype in places):
        alike = {shape: indices for (shape, of), indices in places.items() if of == dtype}
        sizes = [len(indices) * math.prod(shape) for shape, indices in alike.items()]
        buffers = room.take(sum(sizes), dtype).split_with_sizes(sizes)
        for (shape, indices), buffer in zip(alike.items(), buffers, strict=True):
            made |= dict(zip(indices, buffer.view(-1, *shape).unbind(0), strict=True))
    return [(made[i, 0], made[i, 1]) for i in range(len(modules))]


def _new_tensors(room: Room, kinds: Sequence[tuple[torch.Tensor, torch.dtype]]) -> list[torch.Tensor]:
    """Tensors without values, each of the shape of another one and of a dtype.

    One call of torch makes all tensors of a dtype, as parts of one buffer.  A call for each would take much
    longer, and wait for the interpreter's lock each time if another thread runs a model.
    """
    like: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor, dtype in kinds:
        like.setdefault(dtype, []).append(tensor)
    made = {
        dtype: iter(_unflattened(room.take(sum(x.numel() for x in each), dtype), each))
        for dtype, each in like.items()
    }
    return [next(made[dtype]) for _, dtype in kinds]
