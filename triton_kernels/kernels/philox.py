"""DARE's random draws inside kernels: Philox4x32-10, eight 16-bit draws from one call.

J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.  Entry ``i`` of a tensor takes
lane ``i % 8`` of counter ``(i // 8, 0, 0, 0)``, as in ``reference.philox``.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
import triton
import triton.language as tl


@triton.jit
def draws(counter, lane, key):
    """The draws, int32 from 0 to 65535, of the entries ``8 * counter + lane``.

    counter, lane: int32, broadcast against each other; lanes are 0 to 7.  A counter of shape ``[n, 1]`` with
        lanes ``[1, 8]`` costs one call of Philox for eight entries.
    key: int64, all 64 bits of it.
    """
    # The counter must be 32 bits wide: for a wider one Triton uses Philox4x64, which gives other numbers.
    w0, w1, w2, w3 = tl.philox(key, counter.to(tl.uint32), 0, 0, 0)
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    half = (16 * (lane & 1)).to(tl.uint32)
    return ((word >> half) & 0xFFFF).to(tl.int32)
