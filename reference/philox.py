"""Philox4x32-10, the counter-based random numbers of DARE's masks (Salmon et al. 2011).

One call makes eight 16-bit draws: entry ``i`` of a tensor takes lane ``i % 8`` of counter ``i // 8``, so
its draw depends on its flat index alone, not on how the work is cut into blocks or shards.
"""

import numpy as np
from numpy.typing import NDArray

_MULTIPLY = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counters: NDArray[np.uint64], key: int) -> NDArray[np.uint32]:
    """Four 32-bit words for each counter of four words, ``[n, 4]`` to ``[n, 4]``, under a 64-bit key."""
    c0, c1, c2, c3 = counters.T
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        product0, product1 = _MULTIPLY[0] * c0, _MULTIPLY[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def draws(count: int, key: int) -> NDArray[np.uint16]:
    """The 16-bit draws of entries 0 to ``count - 1``; the counters are ``(i // 8, 0, 0, 0)``."""
    counters = np.zeros((-(-count // 8), 4), dtype=np.uint64)
    counters[:, 0] = np.arange(len(counters))
    words = philox4x32(counters, key)
    halves = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=2)
    return halves.reshape(-1)[:count].astype(np.uint16)
