"""Arrays on the device: uploaded without change, kept in a ring that never grows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from merged_lora.triton_kernels.transfer import ALIGNMENT, Ring, upload

CPU = torch.device("cpu")


def test_what_is_uploaded_is_what_was_given() -> None:
    given: list[NDArray[Any]] = [
        np.arange(5, dtype=np.int64),
        np.ones((3, 1), np.float32),
        np.arange(6, dtype=np.int32)[::2],
    ]
    memory = torch.full((96,), 255, dtype=torch.uint8)
    for uploaded in (upload(given, CPU), upload(given, CPU, lambda nbytes: memory[:nbytes])):
        for array, tensor in zip(given, uploaded, strict=True):
            assert np.array_equal(tensor.numpy(), array)
            assert tensor.numpy().dtype == array.dtype
            assert (tensor.data_ptr() - uploaded[0].data_ptr()) % ALIGNMENT == 0
    assert uploaded[0].data_ptr() == memory.data_ptr()


def test_what_is_held_in_a_ring_never_overlaps() -> None:
    ring, generator = Ring(1000, CPU), np.random.default_rng(0)
    given = []
    for size in generator.integers(1, 400, 200).tolist():
        part = ring.take(size)
        assert part is not None
        assert part.buffer.numel() == size
        given.append(part)
        taken = np.zeros(1000, int)
        for earlier in given:
            if earlier.held:
                taken[earlier.start : earlier.start + earlier.buffer.numel()] += 1
        assert taken.max() == 1
        assert part.held


def test_the_oldest_part_gives_way() -> None:
    ring = Ring(3 * ALIGNMENT, CPU)
    parts = [ring.take(ALIGNMENT) for _ in range(4)]
    assert [part.held for part in parts if part is not None] == [False, True, True, True]


@pytest.mark.parametrize("nbytes", [ALIGNMENT + 1, 1 << 20])
def test_what_is_larger_than_the_ring_gets_no_part_and_drives_nothing_out(nbytes: int) -> None:
    ring = Ring(ALIGNMENT, CPU)
    part = ring.take(ALIGNMENT)
    assert ring.take(nbytes) is None
    assert part is not None
    assert part.held
