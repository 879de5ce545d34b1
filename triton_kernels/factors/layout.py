"""A plan as arrays: all that a launch needs to know except where things lie on the device."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import DTypeLike, NDArray

from merged_lora.plan import FactorModule, Keep, MergePlan, Module, Vote
from merged_lora.triton_kernels.kernels.combine import (
    COPY,
    KEEP_ALL,
    KEEP_LARGEST,
    KEEP_RANDOM,
    SUM,
    VOTE_FREQUENCY,
    VOTE_TOTAL,
)
from merged_lora.triton_kernels.kernels.words import KINDS
from merged_lora.triton_kernels.packed import Packed
from merged_lora.triton_kernels.tables import Integers

Floats = NDArray[np.float32]

UNLIMITED = -1  # as a count: every entry is kept


@dataclass(frozen=True, eq=False)
class Place:
    """Where one source's tensors stand: in the layout ``[n]``, and as row and side of its packed modules.

    sizes, counts: entries of each, and how many are kept.  searched: whether that takes a threshold.
    key: tells what thresholds of that source belong to: which modules, and how many entries they keep.
    """

    tensors: Integers
    rows: Integers
    sides: Integers
    sizes: Integers
    counts: Integers
    searched: NDArray[np.bool_]
    key: bytes


@dataclass(frozen=True, eq=False)
class Layout:
    """The tensors of a plan that one launch merges: A and B of every module, T of them, from N sources.

    modules: names; tensors ``2 i`` and ``2 i + 1`` belong to module ``i``.  shapes: int64 ``[T, 2]``.
    rounds: kind of the result ``[T]``.  places: one per source.
    weights, rescales: float32 ``[T, N]``.  kinds: ``[T, N]``; that of the result where a tensor is lacking.
    counts: entries kept, or UNLIMITED.  shares, keys: int64 ``[T, N]``; keys are 64 bits in two's complement.
    keep, rule, weighted: as in ``combine.Variant``.
    """

    modules: tuple[str, ...]
    shapes: Integers
    rounds: Integers
    places: tuple[Place, ...]
    weights: Floats
    kinds: Integers
    counts: Integers
    shares: Integers
    rescales: Floats
    keys: Integers
    keep: int
    rule: int
    weighted: bool


def is_launched(module: Module) -> TypeGuard[FactorModule]:
    """Whether a module is merged by the kernel of ``combine.py``, with all its like in one launch."""
    return isinstance(module, FactorModule) and module.a.rule.simple and module.b.rule.simple


def lay_out(plan: MergePlan, packed: Sequence[Packed]) -> Layout:
    """The layout of those of a plan's modules that one launch merges.  packed: of its sources."""
    pairs = {name: module for name, module in plan.modules.items() if is_launched(module)}
    jobs = [job for module in pairs.values() for job in (module.a, module.b)]
    keeps = [keep for job in jobs for keep in job.rule.keeps]
    tensor = np.repeat(np.arange(len(jobs)), [len(job.inputs) for job in jobs])
    source = np.array([i for module in pairs.values() for _ in "ab" for i in module.present], np.int64)
    rounds = np.array([KINDS[job.dtype] for job in jobs], np.int64)

    def table(values: Sequence[float], dtype: DTypeLike, missing: Any) -> Any:
        made = np.empty((len(jobs), len(packed)), dtype)
        made[:] = missing
        made[tensor, source] = values
        return made

    counts = table([UNLIMITED if k.count is None else k.count for k in keeps], np.int64, UNLIMITED)
    shapes = np.array([job.inputs[0].shape for job in jobs], np.int64).reshape(-1, 2)
    places = []
    for i, one in enumerate(packed):
        mine = tensor[source == i]
        rows = np.array([one.index.get(name, -1) for name in pairs], np.int64)[mine // 2]
        sizes, kept = shapes[mine].prod(1), counts[mine, i]
        searched = (kept > 0) & (kept < sizes)
        places.append(Place(mine, rows, mine % 2, sizes, kept, searched, key=rows.tobytes() + kept.tobytes()))
    rescales = {share: keep.rescale for share, keep in {keep.share: keep for keep in keeps}.items()}
    vote = jobs[0].rule.vote if jobs else None
    return Layout(
        modules=tuple(pairs),
        shapes=shapes,
        rounds=rounds,
        places=tuple(places),
        weights=table([w for job in jobs for w in job.rule.weights], np.float32, 0),
        kinds=table([KINDS[t.dtype] for job in jobs for t in job.inputs], np.int64, rounds[:, None]),
        counts=counts,
        shares=table([k.share or 0 for k in keeps], np.int64, 0),
        rescales=table([rescales[k.share] for k in keeps], np.float32, 0),
        keys=table([k.key or 0 for k in keeps], np.uint64, 0).view(np.int64),
        keep=keep_rule(keeps),
        rule=blend_rule(vote),
        weighted=vote is not None and vote.weighted,
    )


def keep_rule(keeps: Collection[Keep]) -> int:
    """The word of ``combine.Variant`` for how entries are kept."""
    if any(keep.share is not None for keep in keeps):
        return int(KEEP_RANDOM.value)
    return int((KEEP_ALL if all(keep.count is None for keep in keeps) else KEEP_LARGEST).value)


def blend_rule(vote: Vote | None) -> int:
    """The word of ``combine.Variant`` for how entries are blended."""
    if vote is None:
        return int(SUM.value)
    return int((VOTE_FREQUENCY if vote.frequency else VOTE_TOTAL).value)


def copies(kinds: Integers) -> Layout:
    """The layout of tensors of one source each ``[T]`` that are copied, not merged."""
    one = kinds[:, None]
    return Layout(
        modules=(),
        shapes=np.zeros((kinds.size, 2), np.int64),
        rounds=kinds,
        places=(),
        weights=np.ones_like(one, np.float32),
        kinds=one,
        counts=np.full_like(one, UNLIMITED),
        shares=np.zeros_like(one),
        rescales=np.ones_like(one, np.float32),
        keys=np.zeros_like(one),
        keep=int(KEEP_ALL.value),
        rule=int(COPY.value),
        weighted=False,
    )
