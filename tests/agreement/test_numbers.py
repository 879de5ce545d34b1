"""Storage formats: widening is exact, narrowing rounds to nearest, ties to even, as torch and the CPU do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels.converting import triton_narrow, triton_widen
from merged_lora.cpu_kernels import kernels as compiled
from merged_lora.factors import WORDS, bits
from merged_lora.reference import numbers as reference

Array = NDArray[Any]
KINDS = {"bfloat16": compiled.BF16, "float16": compiled.FP16, "float32": compiled.FP32}
HALVES = ("bfloat16", "float16")


def compiled_widen(stored: Array, dtype: str) -> Array:
    stored = np.ascontiguousarray(stored)
    wide = np.empty(stored.size, np.uint32)
    compiled.load(stored.ctypes.data, stored.size, KINDS[dtype], wide)
    return wide.view(np.float32)


def compiled_narrow(values: Array, dtype: str) -> Array:
    stored = np.empty(values.size, reference.STORAGE[dtype])
    compiled.store(stored.ctypes.data, values.size, KINDS[dtype], values.view(np.uint32))
    return stored


WIDEN = {"reference": reference.widen, "compiled": compiled_widen, "triton": triton_widen}
NARROW = {"reference": reference.narrow, "compiled": compiled_narrow, "triton": triton_narrow}


def torch_widen(stored: Array, dtype: str) -> Array:
    kind = getattr(torch, dtype)
    return torch.from_numpy(stored.view(f"i{stored.itemsize}")).view(kind).float().numpy()


def torch_narrow(values: Array, dtype: str) -> Array:
    stored = bits(torch.from_numpy(values).to(getattr(torch, dtype)))
    return np.asarray(stored.numpy()).view(reference.STORAGE[dtype])


def patterns(dtype: str) -> Array:
    """All 65,536 patterns of a 16-bit dtype that are numbers, infinity included."""
    stored = np.arange(65536).astype(np.uint16)
    return np.compress(~np.isnan(torch_widen(stored, dtype)), stored)


def rounding_cases(dtype: str) -> Array:
    """Every value of the dtype and every midpoint to the next, each with its neighbours in float32."""
    exact = torch_widen(patterns(dtype), dtype)
    exact = np.unique(np.abs(exact[np.isfinite(exact)]))
    largest = exact[-1].astype(np.float64)
    past = 2 * largest - exact[-2]  # where the next value would be: its midpoint is where overflow begins
    ends = np.append(exact, np.float64(past))
    middles = (ends[1:] / 2 + ends[:-1] / 2).astype(np.float32)
    points = np.concatenate([exact, middles[np.isfinite(middles)]]).astype(np.float32).view(np.uint32)
    near = np.concatenate([points, points + np.uint32(1), points[points > 0] - np.uint32(1)])
    values = near.view(np.float32)
    return np.concatenate([values, -values])


@pytest.mark.parametrize("widen", WIDEN.values(), ids=WIDEN)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_pattern_widens_to_its_value(dtype: str, widen: Any) -> None:
    stored = patterns(dtype)
    expected = torch_widen(stored, dtype)
    assert (widen(stored, dtype).view(np.uint32) == expected.view(np.uint32)).all()


@pytest.mark.parametrize("widen", WIDEN.values(), ids=WIDEN)
@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_no_number_stays_no_number(dtype: str, widen: Any) -> None:
    stored = np.setdiff1d(np.arange(65536).astype(np.uint16), patterns(dtype))
    assert stored.size > 0
    assert np.isnan(widen(stored, dtype)).all()


@pytest.mark.parametrize("narrow", NARROW.values(), ids=NARROW)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_pattern_survives_the_way_there_and_back(dtype: str, narrow: Any) -> None:
    stored = patterns(dtype)
    assert (narrow(torch_widen(stored, dtype), dtype) == stored).all()


@pytest.mark.parametrize("narrow", NARROW.values(), ids=NARROW)
@pytest.mark.parametrize("dtype", HALVES)
def test_values_and_midpoints_and_their_neighbours_round_as_in_torch(dtype: str, narrow: Any) -> None:
    values = rounding_cases(dtype)
    with np.errstate(over="ignore"):
        assert (narrow(values, dtype) == torch_narrow(values, dtype)).all()


@pytest.mark.parametrize("narrow", NARROW.values(), ids=NARROW)
@pytest.mark.parametrize("dtype", HALVES)
def test_random_float32_patterns_round_as_in_torch(dtype: str, narrow: Any) -> None:
    values = np.random.default_rng(0).integers(0, 2**32, 1 << 20, dtype=np.uint32).view(np.float32)
    values = values[~np.isnan(values)]
    assert (narrow(values, dtype) == torch_narrow(values, dtype)).all()


def test_float16_midpoints_go_to_the_even_neighbour() -> None:
    # Spacing is 2^-10 from 1 on, 2^-24 among subnormal numbers; 65504 is the largest, spacing 32.
    middle = np.array([1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 3 * 2**-25, 65520], dtype=np.float32)
    expected = np.array([1, 1 + 2**-9, 0, 2**-23, np.inf]).astype(np.float16).view(np.uint16)
    assert (compiled_narrow(middle, "float16") == expected).all()
    assert (reference.narrow(middle, "float16") == expected).all()


def test_bfloat16_midpoints_go_to_the_even_neighbour() -> None:
    # bfloat16 is the upper half of float32: 0x3F80 is 1, spacing 2^-7.
    middle = np.array([1 + 2**-8, 1 + 3 * 2**-8], dtype=np.float32)
    expected = np.array([0x3F80, 0x3F82], dtype=np.uint16)
    assert (compiled_narrow(middle, "bfloat16") == expected).all()
    assert (reference.narrow(middle, "bfloat16") == expected).all()


@pytest.mark.parametrize("dtype", WORDS, ids=str)
def test_magnitudes_order_like_absolute_values(dtype: torch.dtype) -> None:
    values = torch.cat([torch.randn(4000), torch.zeros(2), -torch.zeros(2), torch.full((3,), 1e-40)]).to(
        dtype
    )
    stored = bits(values).numpy().view(reference.STORAGE[str(dtype).removeprefix("torch.")])
    magnitudes = reference.magnitudes(stored).astype(np.int64)
    absolute = values.abs().double().numpy()
    # np.unique numbers the distinct values in order: the same numbers mean the same order and the same ties.
    assert (
        np.unique(magnitudes, return_inverse=True)[1] == np.unique(absolute, return_inverse=True)[1]
    ).all()
