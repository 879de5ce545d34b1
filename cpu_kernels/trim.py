"""Exact top-k thresholds: for each tensor the pair ``(thr, cut)`` that keeps exactly ``count`` entries.

    kept(i)  =  mag(i) > thr  or  (mag(i) == thr and i < cut)

A magnitude is an entry's bit pattern without its sign, which orders like its absolute value.  16-bit
dtypes are counted into 32768 bins in one pass; float32 by its upper 15 bits first, then the lower 16 of
those in the bin that holds the threshold.  A second pass finds the index at which the ties are cut.
``thr`` is told as float32 bits for every dtype: widening keeps the order, and the merge compares there.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def,assignment"
import numpy as np
from numba import njit

from .memory import words16, words32
from .numbers import BF16, FP32, widen16

BINS = 32768
BIN_BLOCK = 256
TIE_BLOCK = 1024
INFINITY = 0x7F800000  # as float32 bits: no entry lies above it


@njit(nogil=True, cache=True, error_model="numpy")
def _find_bin(counts, count):
    """The highest bin from which on at least ``count`` entries lie, and how many of that bin are kept."""
    above = 0
    end = counts.size
    while end > 0:
        block = counts[end - BIN_BLOCK : end]
        here = np.int64(0)
        for i in range(BIN_BLOCK):
            here += np.int64(block[i])
        if above + here >= count:
            break
        above += here
        end -= BIN_BLOCK
    for i in range(end - 1, end - 1 - BIN_BLOCK, -1):
        here = np.int64(counts[i])
        if above + here >= count:
            return i, count - above
        above += here
    return 0, 0


@njit(nogil=True, cache=True, error_model="numpy")
def _find_cut(data, mask, thr, ties):
    """One past the index of the ``ties``-th entry whose magnitude is ``thr``."""
    left = ties
    for start in range(0, data.size, TIE_BLOCK):
        block = data[start : start + TIE_BLOCK]
        found = np.uint16(0)
        for i in range(block.size):
            found = np.uint16(found + np.uint16((block[i] & mask) == thr))
        if found >= left:
            for i in range(block.size):
                left -= (block[i] & mask) == thr
                if left == 0:
                    return start + i + 1
        left -= np.int64(found)
    return data.size


@njit(nogil=True, cache=True, error_model="numpy")
def _trim16(data, count, counts):
    mask = np.uint64(0x7FFF)
    bins = counts[:BINS]
    bins[:] = 0
    for i in range(data.size):
        bins[np.uint64(data[i]) & mask] += np.uint32(1)
    thr, ties = _find_bin(bins, count)
    return thr, _find_cut(data, np.uint16(0x7FFF), np.uint16(thr), ties)


@njit(nogil=True, cache=True, error_model="numpy")
def _trim32(data, count, counts):
    mask = np.uint64(0x7FFFFFFF)
    half = np.uint64(16)
    bins = counts[:BINS]
    bins[:] = 0
    for i in range(data.size):
        bins[(np.uint64(data[i]) & mask) >> half] += np.uint32(1)
    high, left = _find_bin(bins, count)
    counts[:] = 0
    for i in range(data.size):
        mag = np.uint64(data[i]) & mask
        if mag >> half == np.uint64(high):
            counts[mag & np.uint64(0xFFFF)] += np.uint32(1)
    low, ties = _find_bin(counts, left)
    thr = (high << 16) | low
    return thr, _find_cut(data, np.uint32(0x7FFFFFFF), np.uint32(thr), ties)


@njit(nogil=True, cache=True, error_model="numpy")
def find_threshold(address, size, kind, count, bins):
    """``(thr, cut)`` of a tensor; a negative count keeps everything.  bins: scratch, ``2 * BINS`` uint32."""
    if count < 0 or count >= size:
        return 0, size
    if count == 0:
        return INFINITY, 0
    if kind == FP32:
        return _trim32(words32(address, size), count, bins)
    thr, cut = _trim16(words16(address, size), count, bins)
    return thr << 16 if kind == BF16 else np.int64(widen16(thr)), cut
