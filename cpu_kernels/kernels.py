"""The compiled loops: exact trimming thresholds, and one fused pass over the sources of a tensor.

Thresholds: for each tensor the pair ``(thr, cut)`` that keeps exactly ``count`` entries,

    kept(i)  =  mag(i) > thr  or  (mag(i) == thr and i < cut)

A magnitude is an entry's bit pattern without its sign, which orders like its absolute value.  16-bit
dtypes are counted into 32768 bins in one pass; float32 by its upper 15 bits first, then the lower 16 of
those in the bin that holds the threshold.  A second pass finds the index at which the ties are cut.
``thr`` is told as float32 bits for every dtype: widening keeps the order, and the merge compares there.

The merge works in blocks that stay in the first-level cache; every inner loop is over entries, branch-free,
so that LLVM vectorises it, and every operation rounds to float32 in source order, as ``reference.factors``
does.  Tensors come as addresses: a tuple of arrays would be compiled anew for every count of sources, a row
of addresses is not.  They belong to contiguous tensors that the caller keeps alive.

All of it is one file, because numba's cache on disk watches only the file of the function that is called.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def,assignment"
# numba has no type stubs, and its compiled functions take their types from the call.
import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

BF16, FP16, FP32 = 0, 1, 2
MAGNITUDE = np.uint32(0x7FFFFFFF)
BINS = 32768
BIN_BLOCK = 256
TIE_BLOCK = 1024
INFINITY = 0x7F800000  # as float32 bits: no entry lies above it
BLOCK = 1024  # entries; a multiple of 8, the entries per Philox call
SUM, VOTE_TOTAL, VOTE_FREQUENCY = 0, 1, 2
KEEP_ALL, NO_DRAW = -1, -1
NEGATIVE = np.int32(1 << 16)  # positive entries are counted in the lower half of a word, negative ones above


@intrinsic
def _pointer(typing_context, address):
    def build(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), build


@njit(nogil=True, inline="always")
def words16(address, count):
    """A view of ``count`` 16-bit words at an address."""
    return carray(_pointer(address), count, np.uint16)


@njit(nogil=True, inline="always")
def words32(address, count):
    """A view of ``count`` 32-bit words at an address."""
    return carray(_pointer(address), count, np.uint32)


# Branch-free, so that loops over them vectorise.  float32 counts exponents from 112 steps below float16.
@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def widen16(h):
    """float32 bits of a float16 pattern, exact."""
    sign = np.uint32(h & 0x8000) << np.uint32(16)
    mag = np.uint32((h & 0x7FFF) << 13)
    # The multiplication moves the exponent and normalises what was subnormal.
    finite = np.float32(mag.view(np.float32) * np.float32(2.0**112)).view(np.uint32)
    return sign | (finite if mag < 31 << 23 else mag | np.uint32(0x7F800000))


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def narrow16(bits):
    """float16 pattern of float32 bits, rounded to nearest, ties to even."""
    mag = np.uint32(bits & MAGNITUDE)
    odd = (mag >> np.uint32(13)) & np.uint32(1)
    normal = np.uint32(mag - np.uint32(112 << 23) + np.uint32(0xFFF) + odd) >> np.uint32(13)
    # The last place of 0.5 is worth as much as float16's last subnormal: the addition rounds to it.
    subnormal = np.float32(mag.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
    finite = np.uint32(subnormal if mag < 113 << 23 else normal)
    other = np.uint32(0x7E00 if mag > 0x7F800000 else 0x7C00)
    return np.uint16((bits >> np.uint32(16)) & np.uint32(0x8000) | (finite if mag < 143 << 23 else other))


@njit(nogil=True, cache=True, error_model="numpy")
def load(address, n, kind, bits):
    """``n`` entries at an address as float32 bits."""
    if kind == FP32:
        wide = words32(address, n)
        for i in range(n):
            bits[i] = wide[i]
        return
    data = words16(address, n)
    if kind == BF16:
        for i in range(n):
            bits[i] = np.uint32(data[i]) << np.uint32(16)
    else:
        for i in range(n):
            bits[i] = widen16(data[i])


@njit(nogil=True, cache=True, error_model="numpy")
def store(address, n, kind, bits):
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
            data[i] = narrow16(bits[i])


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


@njit(nogil=True, cache=True, error_model="numpy")
def _keep_largest(bits, n, thr, cut):
    """Zero what is not among the largest; ``cut`` counts from the block's first entry."""
    zero = np.uint32(0)
    if 0 < cut < n:  # the one block of a tensor in which the last tie lies
        for i in range(n):
            mag = bits[i] & MAGNITUDE
            if mag < thr or (mag == thr and i >= cut):
                bits[i] = zero
        return
    least = np.uint32(thr + (cut <= 0))
    for i in range(n):
        bits[i] = bits[i] if bits[i] & MAGNITUDE >= least else zero


@njit(nogil=True, cache=True, error_model="numpy")
def _keep_random(x, n, draws, share, rescale):
    """Zero what is drawn at ``share`` or above, rescale the rest."""
    limit = np.int32(share)
    for i in range(n):
        x[i] = x[i] * rescale if np.int32(draws[i]) < limit else np.float32(0)


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
    count,
    share,
    key,
    rescale,
    rule,
    weighted,
):
    """Merge the given items, each one whole tensor.

    Per item (``items`` indexes these): target address, target_kind, size in entries, first row and number of
    rows in the source tables.  Per source row: address, kind, float32 weight, count of the largest entries
    kept (or KEEP_ALL), share of 65536 (or NO_DRAW) and key of the random mask, float32 rescale.
    rule: SUM, VOTE_TOTAL or VOTE_FREQUENCY for all items; weighted: whether the vote counts weighted values.
    """
    bits = np.empty(BLOCK, np.uint32)
    x = bits.view(np.float32)
    draws = np.empty(BLOCK, np.uint16)
    total = np.empty(BLOCK, np.float32)
    positive = np.empty(BLOCK, np.float32)
    negative = np.empty(BLOCK, np.float32)
    counts = np.empty(BLOCK, np.int32)
    zero = np.float32(0)
    one = np.float32(1)
    bins = np.zeros(2 * BINS, np.uint32)
    thr = np.empty(sources.max(), np.int64)
    cut = np.empty(sources.max(), np.int64)
    for item in items:
        # Thresholds are found right before they are used, while the tensor is still in the cache.
        for s in range(sources[item]):
            row = first[item] + s
            thr[s], cut[s] = find_threshold(address[row], size[item], kind[row], count[row], bins)
        for start in range(0, size[item], BLOCK):
            n = min(BLOCK, size[item] - start)
            total[:n] = zero
            if rule != SUM:
                positive[:n] = zero
                negative[:n] = zero
                counts[:n] = 0
            for s in range(sources[item]):
                row = first[item] + s
                load(address[row] + start * (4 if kind[row] == FP32 else 2), n, kind[row], bits)
                if thr[s] > 0 or cut[s] < size[item]:
                    _keep_largest(bits, n, thr[s], cut[s] - start)
                if share[row] != NO_DRAW:
                    _fill_draws(start, key[row], draws)
                    _keep_random(x, n, draws, share[row], rescale[row])
                w = weight[row]
                if rule == SUM:
                    for i in range(n):
                        total[i] += x[i] * w
                    continue
                for i in range(n):
                    y = x[i] * w
                    z = y if weighted else x[i]
                    up = z > zero
                    down = z < zero
                    if rule == VOTE_TOTAL:
                        total[i] += z
                    else:
                        total[i] += (one if up else zero) - (one if down else zero)
                    positive[i] += y if up else zero
                    negative[i] += y if down else zero
                    counts[i] += np.int32(up) + (NEGATIVE if down else np.int32(0))
            if rule != SUM:
                for i in range(n):
                    # Both sides are read before one is chosen: a choice of addresses would not vectorise.
                    plus, pluses = positive[i], np.int32(counts[i] & 0xFFFF)
                    minus, minuses = negative[i], np.int32(counts[i] >> 16)
                    elected = total[i] >= zero
                    voters = pluses if elected else minuses
                    total[i] = (plus if elected else minus) / np.float32(max(voters, np.int32(1)))
            width = 4 if target_kind[item] == FP32 else 2
            store(target[item] + start * width, n, target_kind[item], total.view(np.uint32))
