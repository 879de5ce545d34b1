"""The tables that a launch reads, as arrays. Knows nothing of Triton or of plans."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from merged_lora.errors import PlanError

Integers = NDArray[np.int64]
FURTHEST = 2**31 - 2**16  # kernels count entries in 32 bits, and may look a block past the end


def target_rows(tensors: Sequence[torch.Tensor], filled: Integers) -> Integers:
    """Rows of the table of tensors, ``[n, 8]``, for results that go to these tensors.

    tensors: two-dimensional, of any strides.  filled: rows and columns of the sources ``[n, 2]``, which lie
    one row after the other; entries of a target beyond them become zero.

    Columns: address, strides of a row and of a column, rows, columns; stride of a row in the sources, filled
    rows, filled columns.  Where neither side leaves gaps, a tensor is one long row.  Raises PlanError where a
    target reaches further than 32 bits count.
    """
    address = np.array([t.data_ptr() for t in tensors], np.int64)
    shape = np.array([t.shape for t in tensors], np.int64).reshape(-1, 2)
    stride = np.array([t.stride() for t in tensors], np.int64).reshape(-1, 2)
    table = np.stack([address, *stride.T, *shape.T, filled[:, 1], *filled.T], axis=1)
    furthest = np.maximum(((shape - 1) * stride).sum(1), shape.prod(1))
    if (furthest > FURTHEST).any():
        raise PlanError(f"a tensor of more than {FURTHEST} entries cannot be merged on a device")
    whole = (stride[:, 1] == 1) & (stride[:, 0] == shape[:, 1])
    whole &= (filled[:, 1] == shape[:, 1]) | (filled[:, 0] == 0)
    one = np.ones_like(address)
    flat = np.stack(
        [address, shape.prod(1), one, one, shape.prod(1), filled.prod(1), one, filled.prod(1)], axis=1
    )
    return np.where(whole[:, None], flat, table)


def aligned(rows: Integers) -> NDArray[np.bool_]:
    """For each row of the table of tensors whether groups of eight entries can be stored and loaded whole."""
    address, row_stride, column_stride, _, columns, stride, _, filled = rows.T
    return np.asarray(
        (address % 16 == 0)
        & (column_stride == 1)
        & ((row_stride % 8 == 0) & (columns % 8 == 0) & (stride % 8 == 0) & (filled % 8 == 0))
    )


def block_items(sizes: Integers, block: int) -> NDArray[np.int32]:
    """The blocks of tensors of these sizes, ``[items, 2]``: index of the tensor, first entry of the block."""
    return _block_items(sizes.tobytes(), block)


@functools.lru_cache(maxsize=64)
def _block_items(sizes: bytes, block: int) -> NDArray[np.int32]:
    counts = -(-np.frombuffer(sizes, np.int64) // block)
    tensor = np.repeat(np.arange(counts.size), counts)
    start = (np.arange(tensor.size) - np.repeat(np.cumsum(counts) - counts, counts)) * block
    return np.stack([tensor, start], axis=1).astype(np.int32)


def upload(arrays: Sequence[NDArray[np.generic]], device: torch.device) -> list[torch.Tensor]:
    """The arrays on the device, in their dtypes, by one copy that nobody waits for."""
    starts = np.cumsum([0] + [-(-array.nbytes // 16) * 16 for array in arrays]).tolist()
    host = torch.zeros(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for array, start in zip(arrays, starts, strict=False):
        host.numpy()[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = host.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes]
        .view(torch.from_numpy(np.empty(0, array.dtype)).dtype)
        .view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]
