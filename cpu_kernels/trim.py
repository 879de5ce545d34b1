"""Exact top-k thresholds: for each tensor the pair ``(thr, cut)`` that keeps exactly ``count`` entries.

    kept(i)  =  mag(i) > thr  or  (mag(i) == thr and i < cut)

A magnitude is an entry's bit pattern without its sign, which orders like its absolute value.  16-bit
dtypes are counted into 32768 bins in one pass; float32 by its upper 15 bits first, then the lower 16 of
those in the bin that holds the threshold.  A second pass finds the index at which the ties are cut.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"
import numpy as np
from numba import njit

from .memory import words16, words32

BINS = 32768
LANES = 4  # neighbouring entries often share a bin; counting them in four tables avoids waiting on a store
TIE_BLOCK = 1024


@njit(nogil=True, cache=True, error_model="numpy")
def _find_bin(counts, bins, count):
    """The highest bin from which on at least ``count`` entries lie, and how many of that bin are kept."""
    above = 0
    for b in range(bins - 1, -1, -1):
        here = 0
        for lane in range(LANES):
            here += np.int64(counts[lane, b])
        if above + here >= count:
            return b, count - above
        above += here
    return 0, 0


@njit(nogil=True, cache=True, error_model="numpy")
def _find_cut(data, mask, thr, ties):
    """One past the index of the ``ties``-th entry whose magnitude is ``thr``."""
    left = ties
    at = 0
    size = data.size
    while at < size:
        end = min(at + TIE_BLOCK, size)
        found = 0
        for i in range(at, end):
            found += (data[i] & mask) == thr
        if found >= left:
            break
        left -= found
        at = end
    for i in range(at, size):
        if (data[i] & mask) == thr:
            left -= 1
            if left == 0:
                return i + 1
    return size


@njit(nogil=True, cache=True, error_model="numpy")
def _trim16(data, count, counts):
    mask = np.uint16(0x7FFF)
    counts[:, :BINS] = 0
    size = data.size
    whole = size - size % LANES
    for i in range(0, whole, LANES):
        counts[0, data[i] & mask] += 1
        counts[1, data[i + 1] & mask] += 1
        counts[2, data[i + 2] & mask] += 1
        counts[3, data[i + 3] & mask] += 1
    for i in range(whole, size):
        counts[0, data[i] & mask] += 1
    thr, ties = _find_bin(counts, BINS, count)
    return thr, _find_cut(data, mask, np.uint16(thr), ties)


@njit(nogil=True, cache=True, error_model="numpy")
def _trim32(data, count, counts):
    mask = np.uint32(0x7FFFFFFF)
    counts[:, :BINS] = 0
    for i in range(data.size):
        counts[i & 3, (data[i] & mask) >> 16] += 1
    high, left = _find_bin(counts, BINS, count)
    counts[:, :] = 0
    for i in range(data.size):
        mag = data[i] & mask
        if mag >> 16 == high:
            counts[i & 3, mag & 0xFFFF] += 1
    low, ties = _find_bin(counts, 65536, left)
    thr = (high << 16) | low
    return thr, _find_cut(data, mask, np.uint32(thr), ties)


@njit(nogil=True, cache=True, error_model="numpy")
def trim_tensors(items, address, size, wide, count, thr, cut):
    """Fill ``thr`` and ``cut`` of the given items.

    items: indices into the tables, ``[m]``.  The tables have one entry per (tensor, source), flat: address,
    size and count int64; wide: whether float32; thr uint32; cut int64.  A negative count keeps everything.
    """
    counts = np.zeros((LANES, 2 * BINS), np.uint32)
    for item in items:
        if count[item] < 0 or count[item] >= size[item]:
            thr[item], cut[item] = 0, size[item]
        elif count[item] == 0:
            thr[item], cut[item] = 0xFFFFFFFF, 0
        elif wide[item]:
            thr[item], cut[item] = _trim32(words32(address[item], size[item]), count[item], counts)
        else:
            thr[item], cut[item] = _trim16(words16(address[item], size[item]), count[item], counts)
