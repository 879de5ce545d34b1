"""Storage formats in compiled code: 16-bit patterns to float32 bits and back, as ``reference.numbers`` says.

numba's cache watches only the file of the function that is called: after an edit here or in ``memory.py``,
run ``make clean``, or the other files keep what they had compiled.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"
import numpy as np
from numba import njit

from .memory import words16, words32

BF16, FP16, FP32 = 0, 1, 2
MAGNITUDE = np.uint32(0x7FFFFFFF)


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
