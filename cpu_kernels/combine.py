"""One fused pass over the sources of a tensor: keep, weight, vote, average, store.

Works in blocks that stay in the first-level cache; every inner loop is over entries, branch-free, so that
LLVM vectorises it, and every operation rounds to float32 in source order, as ``reference.factors`` does.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"
import numpy as np
from numba import njit

from .numbers import FP32, MAGNITUDE, load, store
from .trim import BINS, find_threshold

BLOCK = 1024  # entries; a multiple of 8, the entries per Philox call

SUM, VOTE_TOTAL, VOTE_FREQUENCY = 0, 1, 2
KEEP_ALL, NO_DRAW = -1, -1
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
