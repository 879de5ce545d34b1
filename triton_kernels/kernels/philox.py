"""DARE's random draws inside kernels: Philox4x32-10 (Salmon et al. 2011), eight 16-bit draws from one call.

Entry ``i`` of a tensor takes lane ``i % 8`` of counter ``(i // 8, 0, 0, 0)``, as ``reference.philox`` says.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
import triton
import triton.language as tl


@triton.jit
def draws(counter, lane, key):
    """The draws (int32, 0 to 65535) of the entries ``8 * counter + lane`` under a 64-bit key.

    counter: int32, lane: int32 from 0 to 7, broadcast against each other.  A counter that stands for eight
    lanes (``[n, 1]`` with ``[1, 8]``) is one call for the eight.
    """
    # The counter must be 32 bits wide: for a wider one Triton draws from Philox4x64, another stream.
    w0, w1, w2, w3 = tl.philox(key, counter.to(tl.uint32), 0, 0, 0)
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    half = (16 * (lane & 1)).to(tl.uint32)
    return ((word >> half) & 0xFFFF).to(tl.int32)
