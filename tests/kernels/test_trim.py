"""Thresholds keep exactly the entries that sorting keeps, whatever the sample and the spans say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from agreement.comparing import FAMILIES, entries
from merged_lora.factors import DTYPES, WORDS
from merged_lora.reference.backend import to_bits
from merged_lora.reference.entries import largest
from merged_lora.reference.numbers import widen
from merged_lora.triton_kernels.backend import load
from merged_lora.triton_kernels.kernels.trim import BLOCK, LARGE, SAMPLE, find_thresholds
from merged_lora.triton_kernels.kernels.words import KINDS

SIZES = (1, 15, 16, 17, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5)
SMALL_SPANS = BLOCK
"""As the size from which on tensors are cut into spans."""


def kept_by_threshold(
    tensors: list[torch.Tensor], counts: list[int], large: int = LARGE
) -> list[NDArray[np.bool_]]:
    """Which entries of each tensor lie inside its threshold, all found together."""
    device = load().device
    padded = [torch.zeros(-(-t.numel() // 64) * 64, dtype=t.dtype, device=device) for t in tensors]
    for there, here in zip(padded, tensors, strict=True):
        there[: here.numel()] = here
    pairs = torch.full((len(tensors), 2), -1, dtype=torch.int32, device=device)
    rows = [
        (t.data_ptr(), here.numel(), count, pairs.data_ptr() + 8 * i)
        for i, (t, here, count) in enumerate(zip(padded, tensors, counts, strict=True))
    ]
    kinds = np.array([KINDS[t.dtype] for t in tensors])
    find_thresholds(np.array(rows, np.int64), kinds, device, large)
    kept = []
    for tensor, (thr, cut) in zip(tensors, pairs.tolist(), strict=True):
        magnitude = tensor.float().view(torch.int32).numpy() & 0x7FFFFFFF
        index = np.arange(magnitude.size)
        kept.append((magnitude > thr) | ((magnitude == thr) & (index < cut)))
    return kept


def kept_by_sorting(tensor: torch.Tensor, count: int) -> NDArray[np.bool_]:
    """The same by the reference."""
    return np.asarray(largest(widen(*to_bits(tensor)), count))


def assert_exact(tensors: list[torch.Tensor], counts: list[int], large: int = LARGE) -> None:
    for tensor, count, got in zip(tensors, counts, kept_by_threshold(tensors, counts, large), strict=True):
        assert got.sum() == count
        assert np.array_equal(got, kept_by_sorting(tensor, count)), (tensor.dtype, tensor.numel(), count)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exactly_the_largest_entries_are_kept(dtype: torch.dtype, family: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors, counts = [], []
    for size in SIZES:
        for share in (0.0, 0.2, 0.5, 1.0):
            tensors.append(entries(family, size, dtype, generator))
            counts.append(max(1, int(share * size)))
    assert_exact(tensors, counts)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["normal", "few values", "signed zeros", "all exponents"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_cut_into_spans_keep_the_same(dtype: torch.dtype, family: str) -> None:
    generator = torch.Generator().manual_seed(1)
    cases = ((SMALL_SPANS + 1, 1), (2 * SMALL_SPANS, 2000), (3 * SMALL_SPANS + 5, 3 * SMALL_SPANS))
    tensors = [entries(family, size, dtype, generator) for size, _ in cases]
    assert_exact(tensors, [count for _, count in cases], SMALL_SPANS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_that_misleads_costs_time_but_not_exactness(dtype: torch.dtype) -> None:
    size = 5 * SAMPLE
    runs = torch.arange(size) // 64 % (size // SAMPLE)  # of each group of runs the sample sees the first
    seen_large = torch.where(runs == 0, 8.0, torch.arange(size) / size).to(dtype)
    seen_small = torch.where(runs == 0, torch.arange(size) / size, 8.0 + torch.arange(size) / size).to(dtype)
    for tensor in (seen_large, seen_small):
        assert_exact([tensor] * 4, [1, size // 10, size // 2, size - 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sorted_entries_are_no_obstacle(dtype: torch.dtype) -> None:
    words = torch.arange(3 * BLOCK).to(WORDS[dtype])
    tensor = words.view(dtype) if dtype != torch.float32 else (words * 40009).view(dtype)
    assert_exact([tensor, tensor.flip(0)], [BLOCK + 3, BLOCK + 3])


@pytest.mark.slow
def test_a_tensor_of_a_million_entries_is_cut_into_spans() -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(1 << 20, generator=generator).bfloat16()
    assert tensor.numel() > LARGE
    assert_exact([tensor], [1 << 19])


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=40),
    st.integers(1, 300),
    st.data(),
)
def test_any_values_in_any_order(
    dtype: torch.dtype, values: list[float], repeats: int, data: st.DataObject
) -> None:
    tensor = torch.tensor(values * repeats).to(dtype)
    count = data.draw(st.integers(1, tensor.numel()))
    assert_exact([tensor], [count])
