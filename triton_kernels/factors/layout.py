"""A plan as arrays: everything that a launch needs, except for addresses on the device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import DTypeLike, NDArray

from merged_lora.plan import (
    SHARES,
    AgreeingMean,
    All,
    FactorModule,
    Keep,
    Largest,
    MergePlan,
    Module,
    Random,
    Sum,
)
from merged_lora.triton_kernels.kernels.combine import COMBINED, COPY, KEEP_ALL, blend_code, keep_code
from merged_lora.triton_kernels.kernels.words import KINDS
from merged_lora.triton_kernels.packed import Packed
from merged_lora.triton_kernels.transfer import Integers

Floats = NDArray[np.float32]

UNLIMITED = -1  # a count of kept entries: all of them


@dataclass(frozen=True, eq=False)
class SourceTensors:
    """The tensors of one source.

    indices: of the tensors in the layout ``[n]``.
    rows: rows of their modules in ``Packed.offsets``, ``[n]``.
    sides: 0 for A and 1 for B, ``[n]``.
    sizes: numbers of entries ``[n]``.
    counts: numbers of entries that are kept, or UNLIMITED, ``[n]``.
    searched: whether a threshold has to be found ``[n]``.
    key: identifies the thresholds of this source: which modules, and how many entries are kept.
    """

    indices: Integers
    rows: Integers
    sides: Integers
    sizes: Integers
    counts: Integers
    searched: NDArray[np.bool_]
    key: bytes


@dataclass(frozen=True, eq=False)
class Layout:
    """The tensors of a plan that one launch merges: A and B of every module, T of them, from N sources.

    modules: names; tensors ``2 i`` and ``2 i + 1`` belong to module ``i``.
    shapes: int64 ``[T, 2]``.
    rounds: dtypes of the results, as in ``words.KINDS``, ``[T]``.
    sources: one per source.
    weights: float32 ``[T, N]``.
    kinds: dtypes of the sources ``[T, N]``; the dtype of the result if a source lacks the tensor.
    counts: numbers of entries that are kept, or UNLIMITED, ``[T, N]``.
    shares: of 65536 draws, int64 ``[T, N]``.
    rescales: float32 ``[T, N]``.
    keys: of Philox, 64 bits in two's complement, ``[T, N]``.
    keep, blend, weighted: as in ``combine.Variant``.
    """

    modules: tuple[str, ...]
    shapes: Integers
    rounds: Integers
    sources: tuple[SourceTensors, ...]
    weights: Floats
    kinds: Integers
    counts: Integers
    shares: Integers
    rescales: Floats
    keys: Integers
    keep: int
    blend: int
    weighted: bool


def is_launched(module: Module) -> TypeGuard[FactorModule]:
    """Whether a module is merged by the kernel of ``kernels/combine.py``, in one launch with all others."""
    return isinstance(module, FactorModule) and all(
        job.rule.consists_of(*COMBINED) for job in (module.a, module.b)
    )


def lay_out(plan: MergePlan, packed: Sequence[Packed]) -> Layout:
    """The layout of the modules of a plan that one launch merges.

    packed: the plan's sources, in order.
    """
    modules = {name: module for name, module in plan.modules.items() if is_launched(module)}
    jobs = [job for module in modules.values() for job in (module.a, module.b)]
    keeps = [keep for job in jobs for keep in job.rule.keeps]
    kept_counts, shares, keys, rescales = zip(*map(_row, keeps), strict=True) if keeps else ((),) * 4
    # For every input of every job, in the same order as ``keeps``: its tensor in the layout and its source.
    tensor = np.repeat(np.arange(len(jobs)), [len(job.inputs) for job in jobs])
    source = np.array([i for module in modules.values() for _ in "ab" for i in module.present], np.int64)
    rounds = np.array([KINDS[job.dtype] for job in jobs], np.int64)

    def table(values: Sequence[float], dtype: DTypeLike, missing: Any) -> Any:
        """The values as ``[T, N]``; they come tensor by tensor, for the sources that have the tensor."""
        array = np.empty((len(jobs), len(packed)), dtype)
        array[:] = missing
        array[tensor, source] = values
        return array

    counts = table(kept_counts, np.int64, UNLIMITED)
    shapes = np.array([job.inputs[0].shape for job in jobs], np.int64).reshape(-1, 2)
    sources = []
    for i, adapter in enumerate(packed):
        # Tensors 2 i and 2 i + 1 belong to module i, so halving an index gives its module.
        tensors = tensor[source == i]
        rows = np.array([adapter.index.get(name, -1) for name in modules], np.int64)[tensors // 2]
        sizes, kept = shapes[tensors].prod(1), counts[tensors, i]
        searched = (kept > 0) & (kept < sizes)
        key = rows.tobytes() + kept.tobytes()
        sources.append(SourceTensors(tensors, rows, tensors % 2, sizes, kept, searched, key))
    blend = jobs[0].rule.blend if jobs else Sum()
    return Layout(
        modules=tuple(modules),
        shapes=shapes,
        rounds=rounds,
        sources=tuple(sources),
        weights=table([w for job in jobs for w in job.rule.weights], np.float32, 0),
        kinds=table([KINDS[t.dtype] for job in jobs for t in job.inputs], np.int64, rounds[:, None]),
        counts=counts,
        shares=table(shares, np.int64, 0),
        rescales=table(rescales, np.float32, 0),
        keys=table(keys, np.uint64, 0).view(np.int64),
        keep=keep_code(keeps),
        blend=blend_code(blend),
        weighted=isinstance(blend, AgreeingMean) and blend.weighted,
    )


def _row(keep: Keep) -> tuple[int, int, int, float]:
    """Count, share, key and rescale of a keep rule of ``combine.COMBINED``."""
    match keep:
        case All():
            return UNLIMITED, SHARES, 0, 1.0  # beside sources that are drawn, all of it is
        case Largest(count):
            return count, 0, 0, 1.0
        case Random(share, key):
            return UNLIMITED, share, key, _rescale_of(share)
    raise TypeError(f"the kernel has no rule for {keep}")


@functools.lru_cache(64)  # a merge has few shares, but a plan thousands of inputs
def _rescale_of(share: int) -> float:
    return Random(share, 0).rescale


def copies(kinds: Integers) -> Layout:
    """The layout of tensors that are copied from one source each.

    kinds: dtypes of the tensors, as in ``words.KINDS``, ``[T]``.
    """
    column = kinds[:, None]
    return Layout(
        modules=(),
        shapes=np.zeros((kinds.size, 2), np.int64),
        rounds=kinds,
        sources=(),
        weights=np.ones_like(column, np.float32),
        kinds=column,
        counts=np.full_like(column, UNLIMITED),
        shares=np.zeros_like(column),
        rescales=np.ones_like(column, np.float32),
        keys=np.zeros_like(column),
        keep=int(KEEP_ALL.value),
        blend=int(COPY.value),
        weighted=False,
    )
