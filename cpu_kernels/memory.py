"""Device helpers: read and write tensors by address, so that one compiled loop serves any number of sources.

A tuple of arrays would be compiled anew for every count of sources; a row of addresses is not.  Addresses
come from contiguous tensors that the caller keeps alive.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"
# numba has no type stubs, and its compiled functions take their types from the call.
import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic


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
