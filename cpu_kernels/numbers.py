"""Storage formats in compiled code: 16-bit patterns to float32 bits and back, as ``reference.numbers`` does."""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"
import numpy as np
from numba import njit

from .memory import words16, words32

BF16, FP16, FP32 = 0, 1, 2
MAGNITUDE = np.uint32(0x7FFFFFFF)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def widen16(h):
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
def narrow16(bits):
    """float16 pattern of float32 bits, rounded to nearest, ties to even."""
    sign = np.uint16((bits >> np.uint32(16)) & np.uint32(0x8000))
    mag = bits & MAGNITUDE
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
