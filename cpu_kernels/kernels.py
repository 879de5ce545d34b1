"""The compiled loops: exact trimming thresholds, and one fused pass over the sources of a tensor.

Thresholds: for each tensor the pair ``(thr, cut)`` that keeps exactly ``count`` entries,

    kept(i)  =  mag(i) > thr  or  (mag(i) == thr and i < cut)

A magnitude is an entry's bit pattern without its sign, which orders like its absolute value.  16-bit
dtypes are counted into 32768 bins in one pass; float32 by its upper 15 bits first, then the lower 16 of
those in the bin that holds the threshold.  A second pass finds the index at which the ties are cut.
``thr`` is given as float32 bits for every dtype: widening keeps the order, and the merge compares there.

The merge works in blocks that stay in the first-level cache; every inner loop is over entries, branch-free,
so that LLVM vectorises it, and every operation rounds to float32 in source order, as ``reference.entries``
does.  Tensors come as addresses: a tuple of arrays would be compiled anew for every count of sources, a row
of addresses is not.  They belong to contiguous tensors that the caller keeps alive.

All of it is one file, because numba's cache on disk watches only the file of the function that is called.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def,assignment,arg-type"
# numba has no type stubs, and its compiled functions take their types from the call.
import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiling import announce, can_cache

CACHED = can_cache()
announce(__name__, CACHED)

BF16, FP16, FP32 = 0, 1, 2
MAGNITUDE = np.uint32(0x7FFFFFFF)
BINS = 32768
BIN_BLOCK = 256
TIE_BLOCK = 1024
INFINITY = 0x7F800000  # as float32 bits: no entry lies above it
BLOCK = 1024  # entries; a multiple of 8, the entries per Philox call
SUM, VOTE_TOTAL, VOTE_FREQUENCY, VOTE_ENERGY = 0, 1, 2, 3
KEEP_ALL, NO_DRAW, UNKNOWN = -1, -1, -1
FEW = 32  # entries of a row that are sorted by insertion alone: counters would cost more
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
@njit(nogil=True, cache=CACHED, error_model="numpy", inline="always")
def widen16(h):
    """float32 bits of a float16 pattern, exact."""
    sign = np.uint32(h & 0x8000) << np.uint32(16)
    mag = np.uint32((h & 0x7FFF) << 13)
    # The multiplication moves the exponent and normalises what was subnormal.
    finite = np.float32(mag.view(np.float32) * np.float32(2.0**112)).view(np.uint32)
    return sign | (finite if mag < 31 << 23 else mag | np.uint32(0x7F800000))


@njit(nogil=True, cache=CACHED, error_model="numpy", inline="always")
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


@njit(nogil=True, cache=CACHED, error_model="numpy")
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


@njit(nogil=True, cache=CACHED, error_model="numpy")
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


@njit(nogil=True, cache=CACHED, error_model="numpy")
def _find_bin(counts, count):
    """The highest bin such that it and those above hold ``count`` entries, and how many of it are kept."""
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


@njit(nogil=True, cache=CACHED, error_model="numpy")
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


@njit(nogil=True, cache=CACHED, error_model="numpy")
def _trim16(data, count, counts):
    mask = np.uint64(0x7FFF)
    bins = counts[:BINS]
    bins[:] = 0
    for i in range(data.size):
        bins[np.uint64(data[i]) & mask] += np.uint32(1)
    thr, ties = _find_bin(bins, count)
    return thr, _find_cut(data, np.uint16(0x7FFF), np.uint16(thr), ties)


@njit(nogil=True, cache=CACHED, error_model="numpy")
def _count_lower(data, wanted, bins):
    """Add the magnitudes whose upper 15 bits are these to the bin of their lower 16."""
    for start in range(0, data.size, 64):
        block = data[start : start + 64]
        met = np.int32(0)
        for i in range(block.size):  # counts without a branch; few blocks hold any
            met += np.int32((block[i] & MAGNITUDE) >> np.uint32(16) == wanted)
        if met:
            for i in range(block.size):
                mag = block[i] & MAGNITUDE
                if mag >> np.uint32(16) == wanted:
                    bins[mag & np.uint32(0xFFFF)] += 1


@njit(nogil=True, cache=CACHED, error_model="numpy")
def _trim32(data, count, counts):
    mask = np.uint64(0x7FFFFFFF)
    half = np.uint64(16)
    bins = counts[:BINS]
    bins[:] = 0
    for i in range(data.size):
        bins[(np.uint64(data[i]) & mask) >> half] += np.uint32(1)
    high, left = _find_bin(bins, count)
    counts[:] = 0
    _count_lower(data, np.uint32(high), counts)
    low, ties = _find_bin(counts, left)
    thr = (high << 16) | low
    return thr, _find_cut(data, np.uint32(0x7FFFFFFF), np.uint32(thr), ties)


@njit(nogil=True, cache=CACHED, error_model="numpy")
def find_threshold(address, size, kind, count, bins):
    """``(thr, cut)`` of a tensor; a negative count keeps everything.

    bins: scratch, ``2 * BINS`` uint32.
    """
    if count < 0 or count > size:
        return 0, size
    if count == 0:
        return INFINITY, 0
    if kind == FP32:
        return _trim32(words32(address, size), count, bins)
    thr, cut = _trim16(words16(address, size), count, bins)
    return thr << 16 if kind == BF16 else np.int64(widen16(thr)), cut


@njit(nogil=True, cache=CACHED, error_model="numpy")
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


@njit(nogil=True, cache=CACHED, error_model="numpy")
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


@njit(nogil=True, cache=CACHED, error_model="numpy")
def _keep_random(x, n, draws, share, rescale):
    """Zero what is drawn at ``share`` or above, rescale the rest."""
    limit = np.int32(share)
    for i in range(n):
        x[i] = x[i] * rescale if np.int32(draws[i]) < limit else np.float32(0)


@njit(nogil=True, cache=CACHED, error_model="numpy")
def combine_tensors(
    items,
    target,
    target_kind,
    size,
    begin,
    first,
    sources,
    address,
    kind,
    weight,
    count,
    share,
    key,
    rescale,
    coefficient,
    blend,
    weighted,
    thresholds,
):
    """Merge the given items, each one whole tensor or a part of one.

    Per item (``items`` indexes these): target address, target_kind, size in entries, flat index of its first
    entry in the whole (a multiple of 8), first row and number of rows in the source tables.  Per source row:
    address, kind, float32 weight, count of the largest entries kept (or KEEP_ALL), share of 65536 (or
    NO_DRAW) and key of the random mask, float32 rescale, float32 coefficient in an energy mean.

    blend:      SUM, VOTE_TOTAL, VOTE_FREQUENCY or VOTE_ENERGY for all items.
    weighted:   whether the vote counts weighted values.
    thresholds: ``(thr, cut)`` per source row, used instead of the counts if it has rows; cut counts from the
                item's first entry.  Those that are UNKNOWN are found by the counts, and written into it.
    """
    bits = np.empty(BLOCK, np.uint32)
    x = bits.view(np.float32)
    draws = np.empty(BLOCK, np.uint16)
    total = np.empty(BLOCK, np.float32)
    positive = np.empty(BLOCK, np.float32)
    negative = np.empty(BLOCK, np.float32)
    counts = np.empty(BLOCK, np.int32)
    pluses = np.empty(BLOCK, np.float32)
    minuses = np.empty(BLOCK, np.float32)
    zero = np.float32(0)
    one = np.float32(1)
    bins = np.zeros(2 * BINS, np.uint32)
    thr = np.empty(sources.max(), np.int64)
    cut = np.empty(sources.max(), np.int64)
    for item in items:
        # Thresholds are found right before they are used, while the tensor is still in the cache.
        for s in range(sources[item]):
            row = first[item] + s
            if thresholds.size and thresholds[row, 0] != UNKNOWN:
                thr[s], cut[s] = thresholds[row, 0], thresholds[row, 1]
            else:
                thr[s], cut[s] = find_threshold(address[row], size[item], kind[row], count[row], bins)
                if thresholds.size:
                    thresholds[row, 0], thresholds[row, 1] = thr[s], cut[s]
        for start in range(0, size[item], BLOCK):
            n = min(BLOCK, size[item] - start)
            total[:n] = zero
            if blend != SUM:
                positive[:n] = zero
                negative[:n] = zero
                counts[:n] = 0
                pluses[:n] = zero
                minuses[:n] = zero
            for s in range(sources[item]):
                row = first[item] + s
                load(address[row] + start * (4 if kind[row] == FP32 else 2), n, kind[row], bits)
                if thr[s] > 0 or cut[s] < size[item]:
                    _keep_largest(bits, n, thr[s], cut[s] - start)
                if share[row] != NO_DRAW:
                    _fill_draws(begin[item] + start, key[row], draws)
                    _keep_random(x, n, draws, share[row], rescale[row])
                w = weight[row]
                if blend == SUM:
                    for i in range(n):
                        total[i] += x[i] * w
                    continue
                if blend == VOTE_ENERGY:
                    _vote_energy(x, n, w, coefficient[row], total, positive, negative, pluses, minuses)
                    continue
                for i in range(n):
                    y = x[i] * w
                    z = y if weighted else x[i]
                    up = z > zero
                    down = z < zero
                    if blend == VOTE_TOTAL:
                        total[i] += z
                    else:
                        total[i] += (one if up else zero) - (one if down else zero)
                    positive[i] += y if up else zero
                    negative[i] += y if down else zero
                    counts[i] += np.int32(up) + (NEGATIVE if down else np.int32(0))
            if blend == VOTE_ENERGY:
                for i in range(n):
                    elected = total[i] >= zero
                    voters = pluses[i] if elected else minuses[i]
                    agreeing = positive[i] if elected else negative[i]
                    total[i] = agreeing / (voters if voters > zero else one)
            elif blend != SUM:
                for i in range(n):
                    # Both sides are read before one is chosen: a choice of addresses would not vectorise.
                    plus, plus_count = positive[i], np.int32(counts[i] & 0xFFFF)
                    minus, minus_count = negative[i], np.int32(counts[i] >> 16)
                    elected = total[i] >= zero
                    voters = plus_count if elected else minus_count
                    total[i] = (plus if elected else minus) / np.float32(max(voters, np.int32(1)))
            width = 4 if target_kind[item] == FP32 else 2
            store(target[item] + start * width, n, target_kind[item], total.view(np.uint32))


@njit(nogil=True, cache=CACHED, error_model="numpy")
def _vote_energy(x, n, w, c, total, positive, negative, pluses, minuses):
    """Add a source of an energy mean: its sign counts unweighted, its value by its coefficient."""
    zero = np.float32(0)
    for i in range(n):
        y = np.float32(x[i] * w) * c
        up = x[i] > zero
        down = x[i] < zero
        total[i] += x[i]
        positive[i] += y if up else zero
        negative[i] += y if down else zero
        pluses[i] += c if up else zero
        minuses[i] += c if down else zero


@njit(nogil=True, cache=CACHED, error_model="numpy")
def concatenate(items, target, target_kind, shape, first, sources, address, kind, rank, weight):
    """Write factors of several sources side by side, those of A multiplied by weights.

    Per item (``items`` indexes these): addresses of A ``[R, columns]`` and B ``[rows, R]`` ``[n, 2]``, their
    kind, rows, columns and R ``[n, 3]``, first row and number of rows in the source tables.  Per source row:
    addresses of A and B ``[m, 2]``, their kinds ``[m, 2]``, rank, float32 weight.
    """
    bits = np.empty(BLOCK, np.uint32)
    x = bits.view(np.float32)
    for item in items:
        rows, columns, total = shape[item]
        to = target_kind[item]
        width = 4 if to == FP32 else 2
        offset = 0
        for row in range(first[item], first[item] + sources[item]):
            own, w = rank[row], weight[row]
            size = own * columns
            for start in range(0, size, BLOCK):
                n = min(BLOCK, size - start)
                load(address[row, 0] + start * (4 if kind[row, 0] == FP32 else 2), n, kind[row, 0], bits)
                for i in range(n):
                    x[i] *= w
                store(target[item, 0] + (offset * columns + start) * width, n, to, bits)
            if kind[row, 1] != to:
                here = 4 if kind[row, 1] == FP32 else 2
                for i in range(rows):
                    for start in range(0, own, BLOCK):
                        n = min(BLOCK, own - start)
                        load(address[row, 1] + (i * own + start) * here, n, kind[row, 1], bits)
                        store(target[item, 1] + (i * total + offset + start) * width, n, to, bits)
            elif to == FP32:
                whole, part = words32(target[item, 1], rows * total), words32(address[row, 1], rows * own)
                for i in range(rows):
                    for j in range(own):
                        whole[i * total + offset + j] = part[i * own + j]
            else:
                wide, piece = words16(target[item, 1], rows * total), words16(address[row, 1], rows * own)
                for i in range(rows):
                    for j in range(own):
                        wide[i * total + offset + j] = piece[i * own + j]
            offset += own


# What follows works on float32 values at an address, in place or into counters, a part of a tensor at a time.
@njit(nogil=True, cache=CACHED, error_model="numpy")
def count_upper(address, size, bins):
    """Add every magnitude to the bin of its upper 15 bits, int64 ``[4, BINS]``: four tables taken in turn.

    Neighbours often share a bin, and a counter that was just written would have to be waited for.
    """
    data = words32(address, size)
    mask = np.uint64(0x7FFFFFFF)
    half = np.uint64(16)
    b0, b1, b2, b3 = bins[0], bins[1], bins[2], bins[3]
    whole = size - size % 4
    for i in range(0, whole, 4):
        b0[(np.uint64(data[i]) & mask) >> half] += 1
        b1[(np.uint64(data[i + 1]) & mask) >> half] += 1
        b2[(np.uint64(data[i + 2]) & mask) >> half] += 1
        b3[(np.uint64(data[i + 3]) & mask) >> half] += 1
    for i in range(whole, size):
        b0[(np.uint64(data[i]) & mask) >> half] += 1


@njit(nogil=True, cache=CACHED, error_model="numpy")
def count_lower(address, size, upper, bins):
    """Add the magnitudes whose upper 15 bits are these to the bin (of 2 * BINS, int64) of their lower 16."""
    _count_lower(words32(address, size), np.uint32(upper), bins)


@njit(nogil=True, cache=CACHED, error_model="numpy")
def find_bin(bins, count):
    """The highest bin such that it and those above hold ``count`` entries, and how many of it are kept."""
    return _find_bin(bins, count)


@njit(nogil=True, cache=CACHED, error_model="numpy")
def find_tie(address, size, thr, ties):
    """One past the index of the ``ties``-th entry of magnitude ``thr``, or -1, and how many were met."""
    data = words32(address, size)
    met = 0
    for i in range(size):
        if data[i] & MAGNITUDE == np.uint32(thr):
            met += 1
            if met == ties:
                return i + 1, met
    return -1, met


@njit(nogil=True, cache=CACHED, error_model="numpy")
def keep_between(address, size, low, low_cut, high, high_cut):
    """Zero what ``(low, low_cut)`` does not keep, and what ``(high, high_cut)`` does."""
    data = words32(address, size)
    for i in range(size):
        mag = np.int64(data[i] & MAGNITUDE)
        inside = mag > low or (mag == low and i < low_cut)
        outlier = mag > high or (mag == high and i < high_cut)
        if not inside or outlier:
            data[i] = np.uint32(0)


@njit(nogil=True, cache=CACHED, error_model="numpy")
def keep_drawn(address, size, begin, share, key):
    """Zero entries at random and rescale the rest; the arguments are those of :func:`keep_graded`."""
    x = words32(address, size).view(np.float32)
    draws = np.empty(BLOCK, np.uint16)
    rescale = np.float32(np.float64(65536) / np.float64(share))
    for start in range(0, size, BLOCK):
        block = x[start : start + BLOCK]
        _fill_draws(begin + start, key, draws)
        _keep_random(block, block.size, draws, share, rescale)


@njit(nogil=True, cache=CACHED, error_model="numpy")
def keep_graded(address, rows, columns, begin, share, spread, key):
    """Zero entries at random, small ones of a row more often, and rescale the rest.

    begin: flat index of the first entry in the whole tensor, a multiple of 8.
    """
    bits = words32(address, rows * columns)
    limits = np.empty(columns, np.int32)  # what a draw must be below to keep the entry of a rank
    rescales = np.empty(columns, np.float32)
    for rank in range(columns):
        limit = np.int64(share)
        if columns > 1:
            limit += (2 * spread * rank + (columns - 1) // 2) // (columns - 1) - spread
        limit = min(max(limit, 1), 65536)
        limits[rank] = limit
        rescales[rank] = np.float32(np.float64(65536) / np.float64(limit))
    # Draws for some rows at a time; the first may begin within a call of Philox, of which there is one for 8.
    step = max(1, BLOCK // columns)
    draws = np.empty(-(-step * columns // 8) * 8 + 8, np.uint16)
    skipped = 0
    order = np.empty(columns, np.uint64)
    scratch = np.empty(columns, np.uint64)
    bucket = np.empty(columns, np.int32)
    ranks = np.empty(columns, np.int32)
    ends = np.empty(max(2048, 2 * columns), np.int32)
    for row in range(rows):
        if row % step == 0:
            first = begin + row * columns
            skipped = first % 8
            _fill_draws(first - skipped, key, draws)
        words = bits[row * columns : (row + 1) * columns]
        values = words.view(np.float32)
        if columns <= FEW or not _spread_row(words, order, bucket, ends[: 2 * columns]):
            _sort_row(words, order, scratch, ends)
        for rank in range(columns):
            ranks[columns - 1 - np.int64(order[rank] & np.uint64(0xFFFFFFFF))] = rank
        start = skipped + row % step * columns
        own = draws[start : start + columns]
        for i in range(columns):  # without a branch, which nobody could predict
            rescaled = values[i] * rescales[ranks[i]]
            values[i] = rescaled if np.int32(own[i]) < limits[ranks[i]] else np.float32(0)


@njit(nogil=True, cache=CACHED, error_model="numpy")
def _sort_key(word, i, n):
    """A number that orders entries by magnitude, smallest first; among equals the highest index first."""
    return np.uint64(word & MAGNITUDE) << np.uint64(32) | np.uint64(n - 1 - i)


@njit(nogil=True, cache=CACHED, error_model="numpy")
def _spread_row(bits, order, bucket, ends):
    """Sort the keys of a row whose magnitudes lie well apart; returns False if they do not.

    Magnitudes are multiplied into about as many buckets as there are entries, and the few of each bucket are
    sorted by insertion.
    """
    n = bits.size
    values = bits.view(np.float32)
    largest = np.zeros(1, np.uint32)
    for i in range(n):
        largest[0] = max(largest[0], bits[i] & MAGNITUDE)
    # Below 2^-100 the quotient might overflow.
    if largest[0] >= np.uint32(INFINITY) or largest[0] < np.uint32(27 << 23):
        return False
    scale = np.float32(ends.size - 1) / largest.view(np.float32)[0]
    for i in range(n):
        bucket[i] = np.int32(np.abs(values[i]) * scale)
    ends[:] = 0
    for i in range(n):
        ends[bucket[i]] += 1
    end = np.int32(0)
    most = np.int32(0)
    for b in range(ends.size):
        count = ends[b]
        ends[b] = end
        end += count
        most = max(most, count)
    if most > 24:
        return False
    for i in range(n):
        at = ends[bucket[i]]
        ends[bucket[i]] = at + 1
        order[at] = _sort_key(bits[i], i, n)
    for j in range(1, n):
        key = order[j]
        at = j
        while at > 0 and order[at - 1] > key:
            order[at] = order[at - 1]
            at -= 1
        order[at] = key
    return True


@njit(nogil=True, cache=CACHED, error_model="numpy")
def _sort_row(bits, order, scratch, bins):
    """Sort the keys of a row by digits of their magnitudes.

    bins: scratch, at least 2048.
    """
    n = bits.size
    if n <= FEW:
        for i in range(n):
            key = _sort_key(bits[i], i, n)
            at = i
            while at > 0 and order[at - 1] > key:
                order[at] = order[at - 1]
                at -= 1
            order[at] = key
        return
    for i in range(n):
        scratch[n - 1 - i] = _sort_key(bits[i], i, n)
    for digit in range(3):
        shift = np.uint64(32 + 11 * digit)
        source = scratch if digit % 2 == 0 else order
        target = order if digit % 2 == 0 else scratch
        bins[:2048] = 0
        for i in range(n):
            bins[(source[i] >> shift) & np.uint64(2047)] += 1
        end = 0
        for b in range(2048):
            end, bins[b] = end + bins[b], end
        for i in range(n):
            b = (source[i] >> shift) & np.uint64(2047)
            target[bins[b]] = source[i]
            bins[b] += 1


@njit(nogil=True, cache=CACHED, error_model="numpy")
def deviations(addresses, size, out):
    """Sum of squared deviations between the sources, entry by entry, into the float32 values at ``out``."""
    result = words32(out, size).view(np.float32)
    mean = np.empty(BLOCK, np.float32)
    count = np.float32(addresses.size)
    for start in range(0, size, BLOCK):
        n = min(BLOCK, size - start)
        mean[:n] = np.float32(0)
        for address in addresses:
            x = words32(address, size).view(np.float32)
            for i in range(n):
                mean[i] += x[start + i]
        for i in range(n):
            mean[i] /= count
            result[start + i] = np.float32(0)
        for address in addresses:
            x = words32(address, size).view(np.float32)
            for i in range(n):
                d = np.float32(x[start + i] - mean[i])
                result[start + i] += d * d


@njit(nogil=True, cache=CACHED, error_model="numpy")
def keep_where(address, size, score, thr, cut):
    """Zero the values at ``address`` whose score, at the same place of ``score``, is not kept."""
    data = words32(address, size)
    scores = words32(score, size)
    for i in range(size):
        mag = np.int64(scores[i] & MAGNITUDE)
        if not (mag > thr or (mag == thr and i < cut)):
            data[i] = np.uint32(0)


@njit(nogil=True, cache=CACHED, error_model="numpy")
def sum_squares(address, size, exponent, bits):
    """Sum of squares in units of ``2 ** (2 * exponent - bits)``, rounded down entry by entry."""
    x = words32(address, size).view(np.float32)
    scale = np.float64(2.0) ** -exponent
    unit = np.float64(2.0) ** bits
    total = np.int64(0)
    for i in range(size):
        value = np.float64(x[i]) * scale
        total += np.int64(value * value * unit)
    return total


@njit(nogil=True, cache=CACHED, error_model="numpy")
def squared_norm(address, size):
    """The sum of squares of float32 values, in float64."""
    x = words32(address, size).view(np.float32)
    parts = np.zeros(BIN_BLOCK, np.float64)  # sums of their own, so that the loop over them vectorises
    for start in range(0, size, BIN_BLOCK):
        block = x[start : start + BIN_BLOCK]
        for i in range(block.size):
            value = np.float64(block[i])
            parts[i] += value * value
    return parts.sum()
