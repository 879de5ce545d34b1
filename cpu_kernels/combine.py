"""One fused pass over the sources of a tensor: keep, weight, vote, average, store.

Works in blocks that stay in the first-level cache; every inner loop is over entries, branch-free, so that
LLVM vectorises it, and every operation rounds to float32 in source order, as ``reference.factors`` does.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"
import numpy as np
from numba import njit

from .memory import words16, words32

BLOCK = 1024  # entries; a multiple of 8, the entries per Philox call

BF16, FP16, FP32 = 0, 1, 2
SUM, VOTE_TOTAL, VOTE_FREQUENCY = 0, 1, 2
NO_DRAW = -1
NEGATIVE = np.int32(1 << 16)  # positive entries are counted in the lower half of a word, negative ones above


@njit(nogil=True, cache=True, error_model="numpy")
def _fill_draws(first, key, out):
    """16-bit draws of the entries from ``first`` on, a multiple of 8: Philox4x32-10, see reference.philox."""
    mask = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    words = out.view(np.uint32)
    key0 = np.uint64(key) & mask
    key1 = np.uint64(key) >> half
    base = first // 8
    for group in range(words.size // 4):
        c0 = np.uint64(base + group) & mask
        c1 = np.uint64(0)
        c2 = np.uint64(0)
        c3 = np.uint64(0)
        k0 = key0
        k1 = key1
        for _ in range(10):
            p0 = np.uint64(0xD2511F53) * c0
            p1 = np.uint64(0xCD9E8D57) * c2
            c0 = (p1 >> half) ^ c1 ^ k0
            c1 = p1 & mask
            c2 = (p0 >> half) ^ c3 ^ k1
            c3 = p0 & mask
            k0 = (k0 + np.uint64(0x9E3779B9)) & mask
            k1 = (k1 + np.uint64(0xBB67AE85)) & mask
        words[4 * group] = np.uint32(c0)
        words[4 * group + 1] = np.uint32(c1)
        words[4 * group + 2] = np.uint32(c2)
        words[4 * group + 3] = np.uint32(c3)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _widen16(h):
    """float32 bits of a float16 pattern, exact."""
    sign = np.uint32(h & 0x8000) << np.uint32(16)
    exponent = np.uint32(h >> 10) & np.uint32(0x1F)
    fraction = np.uint32(h) & np.uint32(0x3FF)
    if exponent == 0:
        if fraction == 0:
            return sign
        shift = np.uint32(0)
        while fraction & np.uint32(0x400) == 0:
            fraction <<= np.uint32(1)
            shift += np.uint32(1)
        return (
            sign
            | ((np.uint32(113) - shift) << np.uint32(23))
            | ((fraction & np.uint32(0x3FF)) << np.uint32(13))
        )
    if exponent == 31:
        return sign | np.uint32(0x7F800000) | (fraction << np.uint32(13))
    return sign | ((exponent + np.uint32(112)) << np.uint32(23)) | (fraction << np.uint32(13))


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _narrow16(bits):
    """float16 pattern of float32 bits, rounded to nearest, ties to even."""
    sign = np.uint16((bits >> np.uint32(16)) & np.uint32(0x8000))
    mag = bits & np.uint32(0x7FFFFFFF)
    if mag > np.uint32(0x7F800000):
        return sign | np.uint16(0x7E00)
    if mag >= np.uint32(0x477FF000):  # rounds past the largest float16
        return sign | np.uint16(0x7C00)
    if mag < np.uint32(0x33000001):  # rounds to zero
        return sign
    exponent = np.int64(mag >> np.uint32(23)) - 127
    fraction = np.uint64(mag & np.uint32(0x7FFFFF)) | np.uint64(0x800000)
    drop = np.uint64(13) if exponent >= -14 else np.uint64(-1 - exponent)
    kept = fraction >> drop
    rest = fraction & ((np.uint64(1) << drop) - np.uint64(1))
    tie = np.uint64(1) << (drop - np.uint64(1))
    if rest > tie or (rest == tie and kept & np.uint64(1)):
        kept += np.uint64(1)
    if exponent >= -14:
        kept += np.uint64(exponent + 14) << np.uint64(10)
    return sign | np.uint16(kept)


@njit(nogil=True, cache=True, error_model="numpy")
def _load(address, n, kind, magnitudes, bits, mag):
    """``n`` entries of a source as float32 bits; their magnitudes into ``mag`` where asked for."""
    if kind == FP32:
        wide = words32(address, n)
        for i in range(n):
            bits[i] = wide[i]
        if magnitudes:
            for i in range(n):
                mag[i] = np.int32(wide[i] & np.uint32(0x7FFFFFFF))
        return
    data = words16(address, n)
    if magnitudes:
        for i in range(n):
            mag[i] = np.int32(data[i]) & np.int32(0x7FFF)
    if kind == BF16:
        for i in range(n):
            bits[i] = np.uint32(data[i]) << np.uint32(16)
    else:
        for i in range(n):
            bits[i] = _widen16(data[i])


@njit(nogil=True, cache=True, error_model="numpy")
def _keep_largest(x, mag, n, thr, cut):
    """Zero what is not among the largest; ``cut`` counts from the block's first entry."""
    if 0 < cut < n:  # the one block of a tensor in which the last tie lies
        for i in range(n):
            if mag[i] < thr or (mag[i] == thr and i >= cut):
                x[i] = np.float32(0)
        return
    least = np.int32(thr + (cut <= 0))
    for i in range(n):
        x[i] = x[i] if mag[i] >= least else np.float32(0)


@njit(nogil=True, cache=True, error_model="numpy")
def _store(address, n, kind, bits):
    """Round ``n`` float32 values once, to nearest, ties to even, and write them."""
    if kind == FP32:
        wide = words32(address, n)
        for i in range(n):
            wide[i] = bits[i]
        return
    data = words16(address, n)
    if kind == BF16:
        for i in range(n):
            odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
            data[i] = np.uint16((bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    else:
        for i in range(n):
            data[i] = _narrow16(bits[i])


@njit(nogil=True, cache=True, error_model="numpy")
def combine_tensors(
    items,
    target,
    target_kind,
    size,
    first,
    sources,
    address,
    kind,
    weight,
    thr,
    cut,
    share,
    key,
    rescale,
    rule,
    weighted,
):
    """Merge the given items, each one whole tensor.

    Per item (``items`` indexes these): target address, target_kind, size in entries, first row and number of
    rows in the source tables.  Per source row: address, kind, float32 weight, thr and cut from
    ``trim_tensors`` (thr 0 and cut >= size keep everything), share of 65536 and key of the random mask
    (share NO_DRAW draws nothing), float32 rescale.  rule: SUM, VOTE_TOTAL or VOTE_FREQUENCY for all items.
    """
    bits = np.empty(BLOCK, np.uint32)
    x = bits.view(np.float32)
    mag = np.empty(BLOCK, np.int32)
    mask = np.empty(BLOCK, np.uint16)
    y = np.empty(BLOCK, np.float32)
    total = np.empty(BLOCK, np.float32)
    positive = np.empty(BLOCK, np.float32)
    negative = np.empty(BLOCK, np.float32)
    counts = np.empty(BLOCK, np.int32)
    zero = np.float32(0)
    one = np.float32(1)
    for item in items:
        for start in range(0, size[item], BLOCK):
            n = min(BLOCK, size[item] - start)
            total[:n] = zero
            if rule != SUM:
                positive[:n] = zero
                negative[:n] = zero
                counts[:n] = 0
            for row in range(first[item], first[item] + sources[item]):
                trims = thr[row] > 0 or cut[row] < size[item]
                _load(address[row] + start * (4 if kind[row] == FP32 else 2), n, kind[row], trims, bits, mag)
                if trims:
                    _keep_largest(x, mag, n, thr[row], cut[row] - start)
                if share[row] != NO_DRAW:
                    _fill_draws(start, key[row], mask)
                    factor = rescale[row]
                    limit = share[row]
                    for i in range(n):
                        x[i] = x[i] * factor if np.int64(mask[i]) < limit else zero
                w = weight[row]
                for i in range(n):
                    y[i] = x[i] * w
                if rule == SUM:
                    for i in range(n):
                        total[i] += y[i]
                    continue
                if weighted:
                    x[:n] = y[:n]
                if rule == VOTE_TOTAL:
                    for i in range(n):
                        total[i] += x[i]
                else:
                    for i in range(n):
                        total[i] += (one if x[i] > zero else zero) - (one if x[i] < zero else zero)
                for i in range(n):
                    positive[i] += y[i] if x[i] > zero else zero
                    negative[i] += y[i] if x[i] < zero else zero
                    counts[i] += (np.int32(1) if x[i] > zero else np.int32(0)) + (
                        NEGATIVE if x[i] < zero else np.int32(0)
                    )
            if rule != SUM:
                for i in range(n):
                    agreeing = positive[i] if total[i] >= zero else negative[i]
                    count = counts[i] & np.int32(0xFFFF) if total[i] >= zero else counts[i] >> np.int32(16)
                    total[i] = agreeing / np.float32(max(count, np.int32(1)))
            width = 4 if target_kind[item] == FP32 else 2
            _store(target[item] + start * width, n, target_kind[item], total.view(np.uint32))
