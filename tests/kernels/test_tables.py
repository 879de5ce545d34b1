"""The table of tensors says where each entry of a result comes from and goes to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from merged_lora.errors import PlanError
from merged_lora.triton_kernels.factors.tables import FURTHEST, aligned, target_rows
from merged_lora.triton_kernels.kernels.blocks import block_items

TARGETS = {
    "plain": lambda: torch.empty(6, 10),
    "transposed": lambda: torch.empty(10, 6).T,
    "with gaps": lambda: torch.empty(6, 17)[:, 3:13],
    "every second row": lambda: torch.empty(12, 10)[::2],
    "one row": lambda: torch.empty(1, 10),
}
WINDOWS = {
    "the whole source": ((6, 10), (0, 0)),
    "a smaller source": ((4, 7), (0, 0)),
    "the middle of a larger source": ((9, 16), (2, 5)),
    "the end of a source": ((9, 16), (5, 8)),
    "nothing left of a source": ((4, 7), (4, 0)),
    "an empty source": ((0, 0), (0, 0)),
}


def written(target: torch.Tensor, source: torch.Tensor, begin: tuple[int, int]) -> torch.Tensor:
    """What a kernel that follows the table writes to a target: the window of a source, and zeros."""
    (row,) = target_rows([target], np.array([source.shape]), np.array([begin])).tolist()
    address, row_stride, column_stride, rows, columns, stride, filled_rows, filled_columns, first = row
    assert address == target.data_ptr()
    assert rows * columns == target.numel()
    entries = source.reshape(-1)
    memory = torch.full((target.untyped_storage().nbytes() // 4,), torch.nan)
    for entry in range(rows * columns):
        i, j = divmod(entry, columns)
        inside = i < filled_rows and j < filled_columns
        memory[i * row_stride + j * column_stride] = entries[first + i * stride + j] if inside else 0.0
    return memory.as_strided(target.shape, target.stride())


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", TARGETS)
def test_a_target_gets_its_window_of_the_source_and_zeros(kind: str, window: str) -> None:
    target = TARGETS[kind]()
    shape, (row, column) = WINDOWS[window]
    source = torch.arange(1.0, shape[0] * shape[1] + 1).view(shape)
    part = source[row : row + target.shape[0], column : column + target.shape[1]]
    expected = torch.zeros(target.shape)
    expected[: part.shape[0], : part.shape[1]] = part
    assert torch.equal(written(target, source, (row, column)), expected)


def test_a_tensor_without_gaps_is_one_long_row() -> None:
    target = torch.empty(6, 10)
    assert target_rows([target], np.array([(6, 10)])).tolist() == [
        [target.data_ptr(), 60, 1, 1, 60, 60, 1, 60, 0]
    ]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (torch.empty(3, 16), True),
        (torch.empty(3, 12), False),
        (torch.empty(3, 24)[:, :16], True),
        (torch.empty(3, 20)[:, :16], False),
        (torch.empty(3, 24)[:, 1:17], False),
        (torch.empty(16, 3).T, False),
    ],
    ids=["plain", "short rows", "with gaps", "odd stride", "odd address", "transposed"],
)
def test_whole_groups_need_aligned_addresses_rows_and_strides(target: torch.Tensor, expected: bool) -> None:
    assert aligned(target_rows([target], np.array([(2, 16)]))).tolist() == [expected]


def test_a_tensor_that_32_bits_cannot_index_is_refused() -> None:
    nowhere = torch.empty(1, FURTHEST + 1, device="meta")
    with pytest.raises(PlanError, match=f"more than {FURTHEST} entries"):
        target_rows([nowhere], np.array([(1, 8)]))


def test_blocks_cover_every_tensor() -> None:
    assert block_items(np.array([5, 8, 0, 9]), 8).tolist() == [[0, 0], [1, 0], [3, 0], [3, 8]]
