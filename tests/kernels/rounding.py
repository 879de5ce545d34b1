"""``tl.fma`` under Triton's interpreter: rounded once, as by GPUs, or twice, as before Triton 3.9."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

Array = NDArray[np.float32]

ORIGINAL = InterpreterBuilder.create_fma


def multiply_and_add(x: Array, y: Array, z: Array) -> Array:
    """``x y + z`` of float32, rounded twice."""
    return x * y + z


def fuse(x: Array, y: Array, z: Array) -> Array:
    """``x y + z`` of float32, rounded once.

    The product is exact in float64.  The sum is rounded to odd (S. Boldo and G. Melquiond, "Emulation of FMA
    and correctly rounded sums", IEEE Transactions on Computers 57, 2008), so that rounding it again to
    float32 gives what one rounding would.
    """
    product, added = x.astype(np.float64) * y, z.astype(np.float64)
    total = product + added
    back = total - product
    error = (product - (total - back)) + (added - back)  # exact (D. Knuth's TwoSum)
    even = (np.ascontiguousarray(total).view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.copysign(np.inf, error))
    return np.where(np.isfinite(total) & (error != 0) & even, odd, total).astype(np.float32)


def interpreted(x: Array, y: Array, z: Array) -> Array:
    """``x y + z`` as the interpreter comes with it."""
    handles = (TensorHandle(a, tl.float32) for a in (x, y, z))
    result: Array = ORIGINAL(InterpreterBuilder(), *handles).data
    return result


def rounds_once() -> bool:
    """Whether the interpreter comes with a fused ``tl.fma``."""
    x = np.full(1, 1 + 2**-23, np.float32)
    return bool(interpreted(x, x, -x * x)[0] != 0)  # exactly 2^-46; 0 if the product is rounded


def replace_fma(patch: Any, function: Any) -> None:
    """Make the interpreter compute ``tl.fma`` by a function on arrays; ``patch`` sets attributes."""

    def create_fma(self: InterpreterBuilder, x: Any, y: Any, z: Any) -> TensorHandle:
        assert z.data.dtype == np.float32
        return TensorHandle(function(x.data, y.data, z.data), z.dtype.scalar)

    patch(InterpreterBuilder, "create_fma", create_fma)
