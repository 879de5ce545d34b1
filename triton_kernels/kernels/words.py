"""Stored words and the float32 values that they represent, inside kernels. Knows nothing of merging.

A word is an entry as it is stored.  bfloat16 is handled as an integer: Triton's interpreter truncates where
the hardware rounds, and trimming compares the words anyway.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
import torch
import triton
import triton.language as tl

BF16: tl.constexpr = tl.constexpr(0)
FP16: tl.constexpr = tl.constexpr(1)
FP32: tl.constexpr = tl.constexpr(2)
MIXED: tl.constexpr = tl.constexpr(3)  # sources of several dtypes, each with a kind of its own
KINDS = {torch.bfloat16: BF16.value, torch.float16: FP16.value, torch.float32: FP32.value}
"""The kind of a dtype, as kernels and tables encode it."""

THREADS = 256  # of every program
WARPS = THREADS // (64 if torch.version.hip else 32)

GROUP: tl.constexpr = tl.constexpr(8)  # entries that share one call of Philox; 16 bytes of a 16-bit dtype
MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # all float32 bits but the sign; they order like |x|
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)  # as float32 bits


@triton.jit
def pointer(address, KIND: tl.constexpr, ALIGNED: tl.constexpr = True):
    """A pointer to the words at an address: float16 as float16, the other dtypes as integers.

    address: int64.
    KIND: dtype of the words.
    ALIGNED: promise the compiler that the address is a multiple of 16 bytes.  The promise has to be made
        here, as the pointer is created: Triton 3.6 forgets hints on the result of a function.
    """
    if KIND == BF16:
        typed = address.to(tl.pointer_type(tl.int16))
    elif KIND == FP16:
        typed = address.to(tl.pointer_type(tl.float16))
    else:
        typed = address.to(tl.pointer_type(tl.int32))
    if ALIGNED:
        typed = tl.multiple_of(typed, 16)
    return typed


@triton.jit
def widen(word, KIND: tl.constexpr):
    """The float32 bits, int32, of loaded words; exact."""
    if KIND == BF16:
        bits = word.to(tl.int32) << 16
    elif KIND == FP16:
        bits = word.to(tl.float32).to(tl.int32, bitcast=True)
    else:
        bits = word
    return bits


@triton.jit
def narrow(x, KIND: tl.constexpr):
    """The words that store float32 values, rounded to nearest, ties to even."""
    if KIND == BF16:
        bits = x.to(tl.uint32, bitcast=True)
        odd = (bits >> 16) & 1
        # Rounding would turn the NaN that NVIDIA GPUs produce, 0x7FFFFFFF, into -0.0.
        rounded = tl.where((bits & MAGNITUDE) > INFINITY, bits, bits + 0x7FFF + odd)
        word = (rounded >> 16).to(tl.uint16).to(tl.int16, bitcast=True)
    elif KIND == FP16:
        word = x.to(tl.float16)
    else:
        word = x.to(tl.int32, bitcast=True)
    return word
