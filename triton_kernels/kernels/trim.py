"""Exact trimming thresholds of many tensors in one launch, without sorting or histograms.

For each tensor the pair ``(thr, cut)`` that keeps exactly ``count`` entries, the largest magnitudes, among
equal ones those with the lowest flat index:

    kept(i)  =  mag(i) > thr  or  (mag(i) == thr and i < cut)

A magnitude is an entry's word without its sign, an integer that orders like the absolute value.  ``thr`` is
told as float32 bits for every dtype.

The search keeps an interval ``low <= thr <= high`` and the number of entries above it.  A pass counts the
entries at or over three pivots, and the counts choose one of the four parts; ``low == high`` ends it.  The
first pivots come from a sample, at four standard deviations around the rank that is looked for: they nearly
always cut the interval to a few dozen values, and when they do not, the counts say so and the search goes on
in what is left.  No answer depends on the sample.  A last walk finds the index at which the ties are cut.

One program searches one tensor, largest first.  Beyond ``LARGE`` entries that would take too long, so such a
tensor is cut into spans, each pass is a launch that counts all spans at a time, and every program replays the
passes before it instead of being told their outcome: no program ever waits for another.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from merged_lora.triton_kernels.tables import Integers, block_items, upload

from .words import FP16, FP32, INFINITY, MAGNITUDE, WARPS, pointer, widen

BLOCK = 4096  # entries of a tensor looked at together
SAMPLE = 4096  # entries that choose the first pivots, in runs of RUN
RUN: tl.constexpr = tl.constexpr(64)
MARGIN: tl.constexpr = tl.constexpr(
    128
)  # ranks within the sample; 4 standard deviations, sqrt(SAMPLE) / 2 each
LARGE = 1 << 19  # entries that one program searches


@triton.jit
def _load_magnitudes(data, index, end, KIND: tl.constexpr):
    """Magnitudes as int32 in the word's own scale; 0 from ``end`` on."""
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
    """The ``k``-th largest of the magnitudes that one program holds, by bits from the highest."""
    bit = 1 << (30 if KIND == FP32 else 14)
    value = 0
    while bit > 0:
        enough = tl.sum((mags >= value + bit).to(tl.int32)) >= k
        value = tl.where(enough, value + bit, value)
        bit = bit // 2
    return value


@triton.jit
def _sample_pivots(data, size, count, KIND: tl.constexpr, SAMPLE: tl.constexpr):
    """Three pivots around the threshold; a tensor that fits into the sample is known exactly."""
    lanes = tl.arange(0, SAMPLE)
    taken = tl.minimum(size, SAMPLE)
    apart = size // (SAMPLE // RUN)
    index = tl.where(size <= SAMPLE, lanes, lanes // RUN * apart + lanes % RUN)
    mags = _load_magnitudes(data, index, size, KIND)
    rank = (count.to(tl.int64) * taken // size).to(tl.int32)
    margin = tl.where(size <= SAMPLE, 0, MARGIN)
    low = _find_kth(mags, tl.minimum(rank + margin, taken), KIND)
    high = _find_kth(mags, tl.maximum(rank - margin, 1), KIND)
    return tl.maximum(low, 1), tl.maximum(low + (high - low + 1) // 2, 1), high + 1


@triton.jit
def _even_pivots(low, high):
    """Three pivots that cut an interval of more than one value into four parts."""
    step = (high - low + 4) // 4
    return low + step, tl.minimum(low + 2 * step, high + 1), tl.minimum(low + 3 * step, high + 1)


@triton.jit
def _count_at(data, start, end, p1, p2, p3, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """How many entries from ``start`` to ``end`` lie at or over each pivot; pivots are at least 1."""
    lanes = tl.arange(0, BLOCK)
    c1 = tl.zeros([BLOCK], tl.uint32)
    c2 = c1
    c3 = c1
    done = 0
    while start + done < end:
        # One subtraction, whose sign is added: half the instructions of a comparison that is added.
        mag = _load_magnitudes(data, start + done + lanes, end, KIND)
        c1 += ((p1 - 1) - mag).to(tl.uint32, bitcast=True) >> 31
        c2 += ((p2 - 1) - mag).to(tl.uint32, bitcast=True) >> 31
        c3 += ((p3 - 1) - mag).to(tl.uint32, bitcast=True) >> 31
        done += BLOCK
    return tl.sum(c1.to(tl.int32)), tl.sum(c2.to(tl.int32)), tl.sum(c3.to(tl.int32))


@triton.jit
def _choose_part(low, high, above, p1, p2, p3, c1, c2, c3, count):
    """The part of the interval that holds the threshold, and how many entries lie above it."""
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
    here = tl.sum((_load_magnitudes(data, lanes, size, KIND) == thr).to(tl.int32))
    while (here < left) & (start < size):  # the bound is never needed; without it a fault would be a hang
        left -= here
        start += BLOCK
        here = tl.sum((_load_magnitudes(data, start + lanes, size, KIND) == thr).to(tl.int32))
    equal = (_load_magnitudes(data, start + lanes, size, KIND) == thr).to(tl.int32)
    return start + 1 + tl.sum((tl.cumsum(equal, 0) < left).to(tl.int32))


@triton.jit
def _store_threshold(target, data, size, low, above, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    cut = _find_cut(data, size, low, count - above, KIND, BLOCK)
    if KIND == FP32:
        thr = low
    elif KIND == FP16:
        thr = widen(low.to(tl.int16).to(tl.float16, bitcast=True), KIND)
    else:
        thr = low << 16
    pair = target.to(tl.pointer_type(tl.int32))
    tl.store(pair, thr)
    tl.store(pair + 1, cut)


@triton.jit
def _read_task(tasks_ptr, task, KIND: tl.constexpr):
    row = tasks_ptr + 4 * task
    data = pointer(tl.load(row), KIND)
    # Whole groups of eight entries are loaded; what fills up the last one is zero.
    size = (tl.load(row + 1).to(tl.int32) + 7) // 8 * 8
    return data, size, tl.load(row + 2).to(tl.int32), tl.load(row + 3)


@triton.jit
def _find_thresholds_kernel(
    tasks_ptr,  # int64 [tasks, 4]: address, entries, count, address of the pair
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
    """The interval that the counts of the first ``passes`` passes leave."""
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
    tasks_ptr,
    counts_ptr,  # int32 [passes, tasks, 3], zero where not counted yet
    span,  # entries
    passes,
    tasks,
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
    """Find ``(thr, cut)`` of every task; one launch per dtype for the tensors of up to ``large`` entries.

    tasks: int64 ``[n, 4]``: address of a tensor (16-byte aligned, filled up with zeros to a multiple of eight
    entries), its entries, how many to keep (from 1 on), and the address of the int32 pair ``(thr, cut)`` to
    write.  kinds: ``[n]``, of ``words``.

    The work is ordered on the current stream.
    """
    order = np.argsort(-tasks[:, 1], kind="stable")
    for kind in np.unique(kinds).tolist():
        here = tasks[order[kinds[order] == kind]]
        big = int((here[:, 1] > large).sum())
        if big:
            _find_in_spans(here[:big], kind, device, large)
        if big < len(here):
            _find_thresholds_kernel[(len(here) - big,)](
                tasks_ptr=_on_device(here[big:], device),
                KIND=kind,
                SAMPLE=SAMPLE,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )


def _find_in_spans(tasks: Integers, kind: int, device: torch.device, large: int) -> None:
    span = max(large // 8, BLOCK)
    spans = block_items(tasks[:, 1], span)
    # A pass leaves a quarter of the interval, rounded up.
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
