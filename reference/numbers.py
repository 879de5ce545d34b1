"""Storage formats as bit patterns: NumPy has no bfloat16, so it travels here as uint16."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.uint32),
    "float16": np.dtype(np.uint16),
    "bfloat16": np.dtype(np.uint16),
}


def widen(bits: Array, dtype: str) -> NDArray[np.float32]:
    """The float32 value of every stored bit pattern (exact)."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.dtype(dtype)).astype(np.float32)


def narrow(values: NDArray[np.float32], dtype: str) -> Array:
    """The bit pattern that stores each float32 value, rounded once, to nearest, ties to even."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(np.dtype(dtype)).view(STORAGE[dtype])
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def magnitudes(bits: Array) -> NDArray[np.uint32]:
    """Every entry's bits without the sign: an integer that orders like its absolute value."""
    mask = np.uint32(0x7FFFFFFF if bits.dtype == np.uint32 else 0x7FFF)
    return bits.astype(np.uint32) & mask
