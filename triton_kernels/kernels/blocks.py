"""Tensors cut into blocks, one for each program of a launch. Knows sizes alone."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from merged_lora.triton_kernels.transfer import Integers


def block_items(sizes: Integers, block: int) -> NDArray[np.int32]:
    """The blocks of tensors of these sizes, ``[items, 2]``: index of the tensor, first entry of the block.

    sizes: entries of each tensor ``[n]``.
    block: entries of a block; the last one of a tensor may hold fewer.
    """
    return _block_items(sizes.tobytes(), block)


@functools.lru_cache(maxsize=64)
def _block_items(sizes: bytes, block: int) -> NDArray[np.int32]:
    counts = -(-np.frombuffer(sizes, np.int64) // block)
    tensor = np.repeat(np.arange(counts.size), counts)
    start = (np.arange(tensor.size) - np.repeat(np.cumsum(counts) - counts, counts)) * block
    return np.stack([tensor, start], axis=1).astype(np.int32)
