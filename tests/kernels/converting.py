"""The kernels' own widening and narrowing, as functions on arrays."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from merged_lora.triton_kernels.backend import load
from merged_lora.triton_kernels.kernels.words import KINDS, narrow, widen

Array = NDArray[Any]
SIZE = 1 << 16


@triton.jit
def _widen_kernel(stored_ptr, out_ptr, KIND: tl.constexpr, SIZE: tl.constexpr):
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + index, widen(tl.load(stored_ptr + index), KIND))


@triton.jit
def _narrow_kernel(values_ptr, out_ptr, KIND: tl.constexpr, SIZE: tl.constexpr):
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + index, narrow(tl.load(values_ptr + index), KIND))


def triton_widen(stored: Array, dtype: str) -> Array:
    """The float32 value of every stored 16-bit pattern."""
    words = torch.from_numpy(_filled(stored).view(np.int16))
    given = words.view(torch.float16) if dtype == "float16" else words  # as the kernels load them
    out = torch.empty(words.numel(), dtype=torch.int32, device=load().device)
    _widen_kernel[(words.numel() // SIZE,)](given.to(out.device), out, KINDS[getattr(torch, dtype)], SIZE)
    return out.cpu().numpy().view(np.float32)[: stored.size]


def triton_narrow(values: Array, dtype: str) -> Array:
    """The 16-bit pattern that stores every float32 value."""
    given = torch.from_numpy(_filled(values))
    kind = torch.float16 if dtype == "float16" else torch.int16
    out = torch.empty(given.numel(), dtype=kind, device=load().device)
    _narrow_kernel[(given.numel() // SIZE,)](given.to(out.device), out, KINDS[getattr(torch, dtype)], SIZE)
    return out.cpu().view(torch.int16).numpy().view(np.uint16)[: values.size]


def _filled(array: Array) -> Array:
    """The array, with zeros up to a multiple of SIZE."""
    filled = np.zeros(-(-array.size // SIZE) * SIZE, array.dtype)
    filled[: array.size] = array
    return filled
