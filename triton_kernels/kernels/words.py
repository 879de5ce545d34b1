"""Stored words and the float32 values they stand for, inside kernels. Knows nothing of merging.

bfloat16 travels as an integer: Triton's interpreter truncates where the hardware rounds, and trimming looks
at the words anyway.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
import torch
import triton
import triton.language as tl

BF16: tl.constexpr = tl.constexpr(0)
FP16: tl.constexpr = tl.constexpr(1)
FP32: tl.constexpr = tl.constexpr(2)
MIXED: tl.constexpr = tl.constexpr(3)  # every source says for itself
KINDS = {torch.bfloat16: BF16.value, torch.float16: FP16.value, torch.float32: FP32.value}

THREADS = 256  # of every program
WARPS = THREADS // (64 if torch.version.hip else 32)

MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)


@triton.jit
def pointer(address, KIND: tl.constexpr, ALIGNED: tl.constexpr = True):
    """A pointer to the words at an address; float16 as float16, the others as integers.

    ALIGNED promises the compiler a multiple of 16 bytes; it must do so here, where the pointer is made:
    Triton 3.6 forgets what is said of a function's result.
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
    """float32 bits (int32) of loaded words, exact."""
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
        # A NaN as NVIDIA makes it, 0x7FFFFFFF, would be rounded to -0.0.
        rounded = tl.where((bits & MAGNITUDE) > INFINITY, bits, bits + 0x7FFF + odd)
        word = (rounded >> 16).to(tl.uint16).to(tl.int16, bitcast=True)
    elif KIND == FP16:
        word = x.to(tl.float16)
    else:
        word = x.to(tl.int32, bitcast=True)
    return word
