"""Trimming keeps exactly so many entries: the largest, and among equals those that come first."""

from __future__ import annotations

import pytest
import torch

from agreement import comparing
from agreement.comparing import plan_of, run
from merged_lora.cpu_kernels.kernels import BLOCK, TIE_BLOCK
from merged_lora.factors import DTYPES
from merged_lora.plan import Largest

SIZE = 3 * max(BLOCK, TIE_BLOCK) + 5


def trimmed(tensor: torch.Tensor, count: int, backend: str) -> torch.Tensor:
    return run(plan_of(tensor, Largest(count)), backend).modules["m"].a[0]


@pytest.mark.parametrize("backend", ["cpu", "numpy", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_among_equal_magnitudes_the_first_are_kept(dtype: torch.dtype, backend: str) -> None:
    equal = torch.full((SIZE,), 0.375, dtype=dtype)
    equal[::3] *= -1
    around = {
        edge * block + off for edge in (0, 1, 2, 3) for block in (BLOCK, TIE_BLOCK) for off in (-1, 0, 1)
    }
    for count in sorted(n for n in around | {SIZE - 1, SIZE} if n >= 0):
        expected = torch.where(torch.arange(SIZE) < count, equal, 0)
        assert torch.equal(trimmed(equal, count, backend), expected), count


@pytest.mark.parametrize("backend", ["cpu", "numpy", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("larger", [1, 100, BLOCK])
def test_larger_entries_come_before_earlier_ones(larger: int, dtype: torch.dtype, backend: str) -> None:
    # The last ones are larger; of the others, as many of the first as are left to keep.
    values = torch.full((SIZE,), 0.375, dtype=dtype)
    values[-larger:] = -0.5
    for more in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1):
        index = torch.arange(SIZE)
        expected = torch.where((index < more) | (index >= SIZE - larger), values, 0)
        assert torch.equal(trimmed(values, larger + more, backend), expected), more


@pytest.mark.parametrize("backend", ["cpu", "numpy", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distinct_magnitudes_are_kept_as_sorting_says(dtype: torch.dtype, backend: str) -> None:
    # 1024 bit patterns from 2^-4 on; those of float32 differ in their low halves and in their high ones.
    step = 3001 if dtype == torch.float32 else 1
    words = torch.int32 if dtype == torch.float32 else torch.int16
    first = torch.tensor(2.0**-4, dtype=dtype).view(words)
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(0))
    values = (first + step * order.to(words)).view(dtype)
    values[::2] *= -1
    for count in (0, 1, 2, 511, 512, 1023, 1024):
        expected = torch.where(order >= 1024 - count, values, 0)
        assert torch.equal(trimmed(values, count, backend), expected), count


def test_the_sizes_that_other_tests_merge_lie_around_a_block() -> None:
    assert comparing.BLOCK == BLOCK
