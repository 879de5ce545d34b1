"""The tables that a launch reads, as arrays. Knows nothing of Triton or of plans."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from merged_lora.errors import PlanError

Integers = NDArray[np.int64]
Take = Callable[[int], torch.Tensor]
"""Gives device memory of so many bytes, uint8."""

ALIGNMENT = 16  # bytes; tables begin at a multiple of it
FURTHEST = 2**31 - 2**16  # kernels count entries in 32 bits, and may look a block past the end


def target_rows(
    tensors: Sequence[torch.Tensor], sources: Integers, begins: Integers | None = None
) -> Integers:
    """Rows of the table of tensors, ``[n, 9]``, for results that go to these tensors.

    tensors: two-dimensional, of any strides.  sources: rows and columns of the sources ``[n, 2]``, which lie
    one row after the other; entries of a target beyond them become zero.  begins: row and column of the
    sources at which the targets begin ``[n, 2]``; zeros where None.

    Columns: address, strides of a row and of a column, rows, columns; stride of a row in the sources, rows
    and columns that they fill, their first entry.  Where neither side leaves gaps, a tensor is one long row.
    Raises PlanError where a target or a source reaches further than 32 bits count.
    """
    told = [x for t in tensors for x in (t.data_ptr(), *t.shape, *t.stride())]
    address, shape, stride = np.split(np.array(told, np.int64).reshape(-1, 5), (1, 3), axis=1)
    address, length = address[:, 0], sources[:, 1]
    begins = np.zeros_like(sources) if begins is None else begins
    filled = np.clip(sources - begins, 0, shape)
    first = begins[:, 0] * length + begins[:, 1]
    table = np.stack([address, *stride.T, *shape.T, length, *filled.T, first], axis=1)
    furthest = np.maximum(((shape - 1) * stride).sum(1), np.maximum(shape.prod(1), sources.prod(1)))
    if (furthest > FURTHEST).any():
        raise PlanError(f"a tensor of more than {FURTHEST} entries cannot be merged on a device")
    whole = (stride[:, 1] == 1) & (stride[:, 0] == shape[:, 1])
    whole &= ((length == shape[:, 1]) & (begins[:, 1] == 0)) | (filled[:, 0] == 0)
    one, size = np.ones_like(address), shape.prod(1)
    flat = np.stack([address, size, one, one, size, filled.prod(1), one, filled.prod(1), first], axis=1)
    return np.where(whole[:, None], flat, table)


def aligned(rows: Integers) -> NDArray[np.bool_]:
    """For each row of the table of tensors whether groups of eight entries can be stored and loaded whole."""
    address, row_stride, column_stride, _, columns, stride, _, filled, first = rows.T
    return np.asarray(
        (address % 16 == 0)
        & (column_stride == 1)
        & ((row_stride % 8 == 0) & (columns % 8 == 0) & (stride % 8 == 0))
        & ((filled % 8 == 0) & (first % 8 == 0))
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


def upload(
    arrays: Sequence[NDArray[np.generic]], device: torch.device, take: Take | None = None
) -> list[torch.Tensor]:
    """The arrays on the device, in their dtypes, by one copy that nobody waits for.

    take: gives the memory on the device, uint8; without it, it is allocated.
    """
    starts = np.cumsum([0] + [padded(array.nbytes) for array in arrays]).tolist()
    host = host_memory(starts[-1], device)
    place = host.numpy()
    for array, start in zip(arrays, starts, strict=False):
        place[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = torch.empty_like(host, device=device) if take is None else take(starts[-1])
    there.copy_(host, non_blocking=True)
    return [
        there[start : start + array.nbytes]
        .view(torch.from_numpy(np.empty(0, array.dtype)).dtype)
        .view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]


def host_memory(nbytes: int, device: torch.device) -> torch.Tensor:
    """Bytes in host memory, uint8, from which a copy to the device need not be waited for; not filled."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def padded(nbytes: int) -> int:
    """What an array of so many bytes takes beside others: kernels load tables 16 bytes at a time."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(eq=False)
class Part:
    """A part of a ring.  held: whether nothing newer has been given room there."""

    buffer: torch.Tensor
    start: int
    held: bool = True


class Ring:
    """Device memory for tables that outlive their launch: one buffer, in which the oldest give way.

    It is taken when it is first asked for, and never grows.  All is ordered on the current stream, which must
    always be the same: an upload may overwrite what earlier work on it reads.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._nbytes = nbytes
        self._device = device
        self._buffer: torch.Tensor | None = None
        self._parts: list[Part] = []
        self._end = 0

    def reserve(self) -> torch.Tensor:
        """Take the buffer now, where it is not taken yet."""
        if self._buffer is None:
            self._buffer = torch.empty(self._nbytes, dtype=torch.uint8, device=self._device)
        return self._buffer

    def take(self, nbytes: int) -> Part | None:
        """Room for so many bytes, where others may have to give way; None where the whole ring has less."""
        size = padded(nbytes)
        if size > self._nbytes:
            return None
        start = self._end if self._end + size <= self._nbytes else 0
        self._end = start + size
        for part in self._parts:
            part.held = part.start >= self._end or part.start + part.buffer.numel() <= start
        new = Part(self.reserve()[start : start + nbytes], start)
        self._parts = [*(part for part in self._parts if part.held), new]
        return new
