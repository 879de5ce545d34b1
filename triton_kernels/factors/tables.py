"""The table of tensors that a launch writes to, as an array. Knows nothing of plans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from merged_lora.errors import PlanError
from merged_lora.triton_kernels.kernels.words import GROUP
from merged_lora.triton_kernels.transfer import ALIGNMENT, Integers

FURTHEST = 2**31 - 2**16
"""Largest number of entries in a tensor: kernels count in 32 bits and may read a block past the end."""


def target_rows(
    tensors: Sequence[torch.Tensor], sources: Integers, begins: Integers | None = None
) -> Integers:
    """Rows of the table of tensors, int64 ``[n, TABLE_COLUMNS]``, for results that go to these tensors.

    tensors: ``n`` two-dimensional targets of any dtype and strides.
    sources: rows and columns of the sources ``[n, 2]``, contiguous; entries of a target beyond them become
        zero.
    begins: row and column of the sources at which each target begins ``[n, 2]``; zeros if None.

    The columns are the address, the strides of a row and of a column, rows and columns of the target; then
    the stride of a row in the sources, the rows and columns that they fill, and their first entry.  If
    neither side leaves gaps, the tensor is described as one long row.

    Raises PlanError if a target or a source has more entries than kernels can count.
    """
    described = [x for t in tensors for x in (t.data_ptr(), *t.shape, *t.stride())]
    address, shape, stride = np.split(np.array(described, np.int64).reshape(-1, 5), (1, 3), axis=1)
    address, length = address[:, 0], sources[:, 1]
    begins = np.zeros_like(sources) if begins is None else begins
    # A target may be larger than what is left of the sources, or begin beyond their end.
    filled = np.clip(sources - begins, 0, shape)
    first = begins[:, 0] * length + begins[:, 1]
    table = np.stack([address, *stride.T, *shape.T, length, *filled.T, first], axis=1)
    furthest = np.maximum(((shape - 1) * stride).sum(1), np.maximum(shape.prod(1), sources.prod(1)))
    if (furthest > FURTHEST).any():
        raise PlanError(f"a tensor of more than {FURTHEST} entries cannot be merged on a device")
    # Only a target without gaps whose rows are rows of the sources is one long row. If the sources do not
    # reach it, all of it becomes zero, and their rows do not matter.
    contiguous = (stride[:, 1] == 1) & (stride[:, 0] == shape[:, 1])
    contiguous &= ((length == shape[:, 1]) & (begins[:, 1] == 0)) | (filled[:, 0] == 0)
    ones, size = np.ones_like(address), shape.prod(1)
    flat = np.stack([address, size, ones, ones, size, filled.prod(1), ones, filled.prod(1), first], axis=1)
    return np.where(contiguous[:, None], flat, table)


def aligned(rows: Integers) -> NDArray[np.bool_]:
    """Whether each row's tensor can be loaded and stored in whole groups of eight entries, ``[n]``.

    rows: of :func:`target_rows`.
    """
    address, row_stride, column_stride, _, columns, stride, _, filled, first = rows.T
    eight = int(GROUP.value)
    return np.asarray(
        (address % ALIGNMENT == 0)
        & (column_stride == 1)
        & ((row_stride % eight == 0) & (columns % eight == 0) & (stride % eight == 0))
        & ((filled % eight == 0) & (first % eight == 0))
    )
