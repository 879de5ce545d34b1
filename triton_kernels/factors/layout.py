"""A plan as arrays: all that a launch needs to know except where things lie on the device."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import DTypeLike, NDArray

from merged_lora.plan import (
    AgreeingMean,
    All,
    Blend,
    FactorModule,
    Keep,
    Largest,
    MergePlan,
    Module,
    Random,
    Sum,
)
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
from merged_lora.triton_kernels.transfer import Integers

Floats = NDArray[np.float32]

UNLIMITED = -1  # as a count: every entry is kept
LAUNCHED = (All, Largest, Random), (Sum, AgreeingMean)
"""Keep rules and blends that the kernel of ``kernels/combine.py`` does itself."""


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
    """Whether a module is merged by the kernel of ``kernels/combine.py``, with all its like in one launch."""
    return isinstance(module, FactorModule) and all(
        job.rule.consists_of(*LAUNCHED) for job in (module.a, module.b)
    )


def lay_out(plan: MergePlan, packed: Sequence[Packed]) -> Layout:
    """The layout of those of a plan's modules that one launch merges.  packed: of its sources."""
    pairs = {name: module for name, module in plan.modules.items() if is_launched(module)}
    jobs = [job for module in pairs.values() for job in (module.a, module.b)]
    keeps = [keep for job in jobs for keep in job.rule.keeps]
    kept_counts, shares, keys, rescales = zip(*map(_row, keeps), strict=True) if keeps else ((),) * 4
    tensor = np.repeat(np.arange(len(jobs)), [len(job.inputs) for job in jobs])
    source = np.array([i for module in pairs.values() for _ in "ab" for i in module.present], np.int64)
    rounds = np.array([KINDS[job.dtype] for job in jobs], np.int64)

    def table(values: Sequence[float], dtype: DTypeLike, missing: Any) -> Any:
        made = np.empty((len(jobs), len(packed)), dtype)
        made[:] = missing
        made[tensor, source] = values
        return made

    counts = table(kept_counts, np.int64, UNLIMITED)
    shapes = np.array([job.inputs[0].shape for job in jobs], np.int64).reshape(-1, 2)
    places = []
    for i, one in enumerate(packed):
        mine = tensor[source == i]
        rows = np.array([one.index.get(name, -1) for name in pairs], np.int64)[mine // 2]
        sizes, kept = shapes[mine].prod(1), counts[mine, i]
        searched = (kept > 0) & (kept < sizes)
        places.append(Place(mine, rows, mine % 2, sizes, kept, searched, key=rows.tobytes() + kept.tobytes()))
    blend = jobs[0].rule.blend if jobs else Sum()
    return Layout(
        modules=tuple(pairs),
        shapes=shapes,
        rounds=rounds,
        places=tuple(places),
        weights=table([w for job in jobs for w in job.rule.weights], np.float32, 0),
        kinds=table([KINDS[t.dtype] for job in jobs for t in job.inputs], np.int64, rounds[:, None]),
        counts=counts,
        shares=table(shares, np.int64, 0),
        rescales=table(rescales, np.float32, 0),
        keys=table(keys, np.uint64, 0).view(np.int64),
        keep=keep_word(keeps),
        rule=blend_word(blend),
        weighted=isinstance(blend, AgreeingMean) and blend.weighted,
    )


def _row(keep: Keep) -> tuple[int, int, int, float]:
    """Count, share, key and rescale of a keep rule of LAUNCHED."""
    match keep:
        case All():
            return UNLIMITED, 0, 0, 1.0
        case Largest(count):
            return count, 0, 0, 1.0
        case Random(share, key):
            return UNLIMITED, share, key, _rescale_of(share)
    raise TypeError(f"the kernel has no rule for {keep}")


@functools.lru_cache(64)
def _rescale_of(share: int) -> float:
    return Random(share, 0).rescale


def keep_word(keeps: Collection[Keep]) -> int:
    """The word of ``combine.Variant`` for how entries are kept."""
    if any(isinstance(keep, Random) for keep in keeps):
        return int(KEEP_RANDOM.value)
    return int((KEEP_LARGEST if any(isinstance(keep, Largest) for keep in keeps) else KEEP_ALL).value)


def blend_word(blend: Blend) -> int:
    """The word of ``combine.Variant`` for how entries are blended."""
    match blend:
        case Sum():
            return int(SUM.value)
        case AgreeingMean(frequency):
            return int((VOTE_FREQUENCY if frequency else VOTE_TOTAL).value)
    raise TypeError(f"the kernel has no blend for {blend}")


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
