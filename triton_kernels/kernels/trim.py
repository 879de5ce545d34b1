"""Exact trimming thresholds of many tensors in one launch, without sorting or histograms.

The threshold ``(thr, cut)`` of a tensor keeps exactly ``count`` entries: those of the largest magnitudes, and
among equal magnitudes those with the lowest flat index (the trim of TIES, arXiv 2306.01708, made exact):

    kept(i)  =  mag(i) > thr  or  (mag(i) == thr and i < cut)

A magnitude is an entry's word without its sign, an integer that orders like the absolute value.  ``thr`` is
stored as float32 bits whatever the dtype.

The search keeps an interval ``low <= thr <= high`` and the number of entries above it.  A pass counts the
entries at or over three pivots, and the counts select one of the four parts; the search ends at
``low == high``.  The first pivots come from a sample, four standard deviations around the wanted rank: they
nearly always narrow the interval to a few dozen values.  If they do not, the counts show it, and the search
continues in the remaining interval; no result depends on the sample.  A final walk finds the index at which
ties are cut.

One program searches one tensor, and the largest tensors start first.  Tensors of more than ``LARGE`` entries
would take one program too long.  They are cut into spans instead: each pass is a launch that counts all spans
in parallel, and every program replays the earlier passes from their counts, so no program waits for another.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from merged_lora.triton_kernels.transfer import Integers, upload

from .blocks import block_items
from .words import FP16, FP32, GROUP, INFINITY, MAGNITUDE, WARPS, pointer, widen

BLOCK = 4096  # entries of a tensor that are read at a time
SAMPLE = 4096  # entries that determine the first pivots, in runs of RUN
RUN: tl.constexpr = tl.constexpr(64)
MARGIN: tl.constexpr = tl.constexpr(128)  # ranks in the sample: 4 standard deviations of sqrt(SAMPLE) / 2
LARGE = 1 << 19  # largest number of entries that one program searches


@triton.jit
def _load_magnitudes(data, index, end, KIND: tl.constexpr):
    """Magnitudes in the scale of the stored word, int32; 0 from ``end`` on."""
    word = tl.load(data + index, mask=index < end, other=0)
    if KIND == FP32:
        mag = word & MAGNITUDE
    elif KIND == FP16:
        mag = word.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    else:
        mag = word.to(tl.int32) & 0x7FFF
    return mag


@triton.jit
def _find_kth(mags, k, KIND: tl.constexpr):
    """The ``k``-th largest of the magnitudes in a program's registers."""
    # Bit by bit, from the highest: a bit is set if at least k magnitudes reach the value with it.
    bit = 1 << (30 if KIND == FP32 else 14)
    value = 0
    while bit > 0:
        enough = tl.sum((mags >= value + bit).to(tl.int32)) >= k
        value = tl.where(enough, value + bit, value)
        bit = bit // 2
    return value


@triton.jit
def _sample_pivots(data, size, count, KIND: tl.constexpr, SAMPLE: tl.constexpr):
    """Three pivots around the threshold, which is found exactly if the whole tensor fits into the sample."""
    lanes = tl.arange(0, SAMPLE)
    sampled = tl.minimum(size, SAMPLE)
    distance = size // (SAMPLE // RUN)  # from one run to the next
    index = tl.where(size <= SAMPLE, lanes, lanes // RUN * distance + lanes % RUN)
    mags = _load_magnitudes(data, index, size, KIND)
    rank = (count.to(tl.int64) * sampled // size).to(tl.int32)
    margin = tl.where(size <= SAMPLE, 0, MARGIN)
    low = _find_kth(mags, tl.minimum(rank + margin, sampled), KIND)
    high = _find_kth(mags, tl.maximum(rank - margin, 1), KIND)
    return tl.maximum(low, 1), tl.maximum(low + (high - low + 1) // 2, 1), high + 1


@triton.jit
def _even_pivots(low, high):
    """Three pivots that divide an interval of more than one value into four parts."""
    step = (high - low + 4) // 4
    return low + step, tl.minimum(low + 2 * step, high + 1), tl.minimum(low + 3 * step, high + 1)


@triton.jit
def _count_at(data, start, end, p1, p2, p3, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The number of entries from ``start`` to ``end`` at or over each pivot; pivots are at least 1."""
    lanes = tl.arange(0, BLOCK)
    c1 = tl.zeros([BLOCK], tl.uint32)
    c2 = c1
    c3 = c1
    done = 0
    while start + done < end:
        # The sign of a subtraction takes half the instructions of a comparison whose result is added. Zeros
        # beyond the end are never counted, because pivots are at least 1.
        mag = _load_magnitudes(data, start + done + lanes, end, KIND)
        c1 += ((p1 - 1) - mag).to(tl.uint32, bitcast=True) >> 31
        c2 += ((p2 - 1) - mag).to(tl.uint32, bitcast=True) >> 31
        c3 += ((p3 - 1) - mag).to(tl.uint32, bitcast=True) >> 31
        done += BLOCK
    return tl.sum(c1.to(tl.int32)), tl.sum(c2.to(tl.int32)), tl.sum(c3.to(tl.int32))


@triton.jit
def _choose_part(low, high, above, p1, p2, p3, c1, c2, c3, count):
    """The part of the interval that contains the threshold, and the number of entries above that part."""
    next_low = tl.where(c3 >= count, p3, tl.where(c2 >= count, p2, tl.where(c1 >= count, p1, low)))
    next_high = tl.where(c3 >= count, high, tl.where(c2 >= count, p3, tl.where(c1 >= count, p2, p1)) - 1)
    next_above = tl.where(c3 >= count, above, tl.where(c2 >= count, c3, tl.where(c1 >= count, c2, c1)))
    return next_low, next_high, next_above


@triton.jit
def _find_cut(data, size, thr, ties, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """One past the index of the ``ties``-th entry whose magnitude is ``thr``."""
    lanes = tl.arange(0, BLOCK)
    start = 0
    left = ties
    found = tl.sum((_load_magnitudes(data, lanes, size, KIND) == thr).to(tl.int32))
    while (found < left) & (start < size):  # the bound is never reached; without it a bug would be a hang
        left -= found
        start += BLOCK
        found = tl.sum((_load_magnitudes(data, start + lanes, size, KIND) == thr).to(tl.int32))
    equal = (_load_magnitudes(data, start + lanes, size, KIND) == thr).to(tl.int32)
    return start + 1 + tl.sum((tl.cumsum(equal, 0) < left).to(tl.int32))


@triton.jit
def _store_threshold(target, data, size, low, above, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Find the cut for a threshold of ``low``, and store both at the address ``target``."""
    cut = _find_cut(data, size, low, count - above, KIND, BLOCK)
    if KIND == FP32:
        thr = low
    elif KIND == FP16:
        thr = widen(low.to(tl.int16).to(tl.float16, bitcast=True), KIND)
    else:
        thr = low << 16
    threshold = target.to(tl.pointer_type(tl.int32))
    tl.store(threshold, thr)
    tl.store(threshold + 1, cut)


@triton.jit
def _read_task(tasks_ptr, task, KIND: tl.constexpr):
    """A task's tensor, padded number of entries, count to keep, and the address of its threshold."""
    row = tasks_ptr + 4 * task
    data = pointer(tl.load(row), KIND)
    # Whole groups of eight entries are loaded; the last one is padded with zeros.
    size = (tl.load(row + 1).to(tl.int32) + (GROUP - 1)) // GROUP * GROUP
    return data, size, tl.load(row + 2).to(tl.int32), tl.load(row + 3)


@triton.jit
def _find_thresholds_kernel(
    tasks_ptr,  # int64 [tasks, 4]: address, entries, count, address of the threshold
    KIND: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    data, size, count, target = _read_task(tasks_ptr, tl.program_id(0), KIND)
    low = 0
    high = INFINITY if KIND == FP32 else 0x7FFF
    above = 0
    p1, p2, p3 = _sample_pivots(data, size, count, KIND, SAMPLE)
    while low < high:
        c1, c2, c3 = _count_at(data, 0, size, p1, p2, p3, KIND, BLOCK)
        low, high, above = _choose_part(low, high, above, p1, p2, p3, c1, c2, c3, count)
        p1, p2, p3 = _even_pivots(low, high)
    _store_threshold(target, data, size, low, above, count, KIND, BLOCK)


@triton.jit
def _replay(counts_ptr, task, passes, tasks, count, KIND: tl.constexpr):
    """The interval that is left after the first ``passes`` passes, from their counts."""
    low = 0
    high = INFINITY if KIND == FP32 else 0x7FFF
    above = 0
    done = 0
    while done < passes:
        p1, p2, p3 = _even_pivots(low, high)
        row = counts_ptr + 3 * (done * tasks + task)
        if low < high:
            low, high, above = _choose_part(
                low, high, above, p1, p2, p3, tl.load(row), tl.load(row + 1), tl.load(row + 2), count
            )
        done += 1
    return low, high, above


@triton.jit(do_not_specialize=["passes", "tasks"])
def _count_spans_kernel(
    spans_ptr,  # int32 [spans, 2]: task, first entry
    tasks_ptr,  # as in _find_thresholds_kernel
    counts_ptr,  # int32 [passes, tasks, 3]: entries at or over each pivot; zeros for the passes to come
    span,  # entries of a span
    passes,  # made so far
    tasks,  # number of tasks
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    item = spans_ptr + 2 * tl.program_id(0)
    task = tl.load(item)
    start = tl.multiple_of(tl.load(item + 1), 16)
    data, size, count, _ = _read_task(tasks_ptr, task, KIND)
    low, high, _ = _replay(counts_ptr, task, passes, tasks, count, KIND)
    if low < high:
        p1, p2, p3 = _even_pivots(low, high)
        end = tl.minimum(start + span, size)
        c1, c2, c3 = _count_at(data, start, end, p1, p2, p3, KIND, BLOCK)
        row = counts_ptr + 3 * (passes * tasks + task)
        tl.atomic_add(row, c1, sem="relaxed")
        tl.atomic_add(row + 1, c2, sem="relaxed")
        tl.atomic_add(row + 2, c3, sem="relaxed")


@triton.jit(do_not_specialize=["passes", "tasks"])
def _finish_spans_kernel(tasks_ptr, counts_ptr, passes, tasks, KIND: tl.constexpr, BLOCK: tl.constexpr):
    task = tl.program_id(0)
    data, size, count, target = _read_task(tasks_ptr, task, KIND)
    low, _, above = _replay(counts_ptr, task, passes, tasks, count, KIND)
    _store_threshold(target, data, size, low, above, count, KIND, BLOCK)


def find_thresholds(tasks: Integers, kinds: Integers, device: torch.device, large: int = LARGE) -> None:
    """Find and store the threshold of every task, on the current stream.

    tasks: int64 ``[n, 4]``: address of a tensor (16-byte aligned, padded with zeros to a multiple of eight
        entries), its number of entries, how many to keep (at least 1), and the address at which to store the
        int32 threshold ``(thr, cut)``.
    kinds: dtypes of the tensors ``[n]``, as in ``words.KINDS``.
    large: tensors of more entries than this are searched in spans, all others of a dtype in one launch.
    """
    order = np.argsort(-tasks[:, 1], kind="stable")
    for kind in np.unique(kinds).tolist():
        ordered = tasks[order[kinds[order] == kind]]
        big = int((ordered[:, 1] > large).sum())
        if big:
            _find_in_spans(ordered[:big], kind, device, large)
        if big < len(ordered):
            _find_thresholds_kernel[(len(ordered) - big,)](
                tasks_ptr=_on_device(ordered[big:], device),
                KIND=kind,
                SAMPLE=SAMPLE,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )


def _find_in_spans(tasks: Integers, kind: int, device: torch.device, large: int) -> None:
    span = max(large // 8, BLOCK)
    spans = block_items(tasks[:, 1], span)
    # A pass leaves a quarter of the interval, rounded up, so two of the 31 or 15 bits of a magnitude.
    passes = 16 if kind == FP32.value else 8
    shared = {
        "tasks_ptr": _on_device(tasks, device),
        "counts_ptr": torch.zeros(passes, len(tasks), 3, dtype=torch.int32, device=device),
        "tasks": len(tasks),
        "KIND": kind,
        "BLOCK": BLOCK,
        "num_warps": WARPS,
    }
    spans_on_device = _on_device(spans, device)
    for done in range(passes):
        _count_spans_kernel[(len(spans),)](spans_ptr=spans_on_device, span=span, passes=done, **shared)
    _finish_spans_kernel[(len(tasks),)](passes=passes, **shared)


def _on_device(rows: NDArray[Any], device: torch.device) -> torch.Tensor:
    return upload([rows], device)[0]
