"""Arrays on their way to a device, and memory that keeps them there. Knows nothing of what they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Take = Callable[[int], torch.Tensor]
"""A function that returns that many bytes of device memory, uint8."""

ALIGNMENT = 16
"""Bytes: every uploaded array begins at a multiple of it, since kernels load so many bytes at a time."""


def upload(
    arrays: Sequence[NDArray[np.generic]], device: torch.device, take: Take | None = None
) -> list[torch.Tensor]:
    """The arrays on the device, in their shapes and dtypes, by one copy that the host does not wait for.

    arrays: of any shapes and dtypes that torch knows.
    take: provides the device memory; it is allocated if None.
    """
    starts = np.cumsum([0] + [padded(array.nbytes) for array in arrays]).tolist()
    host = host_memory(starts[-1], device)
    words = host.numpy()
    for array, start in zip(arrays, starts, strict=False):
        words[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    memory = torch.empty_like(host, device=device) if take is None else take(starts[-1])
    memory.copy_(host, non_blocking=True)
    return [
        memory[start : start + array.nbytes]
        .view(torch.from_numpy(np.empty(0, array.dtype)).dtype)
        .view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]


def host_memory(nbytes: int, device: torch.device) -> torch.Tensor:
    """Uninitialized host memory, uint8 ``[nbytes]``; page-locked for a GPU, so that copies do not block."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def keep_host_memory(nbytes: int, device: torch.device) -> None:
    """Let later uploads of up to that many bytes find page-locked memory, which takes long to be locked.

    torch locks powers of two, and hands each out again when it is free.
    """
    if device.type == "cuda":
        held = [host_memory(1 << power, device) for power in range(nbytes.bit_length())]
        held.clear()


def padded(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """The number of bytes, rounded up to a multiple of the alignment."""
    return -(-nbytes // alignment) * alignment


@dataclass(eq=False)
class Part:
    """A part of a :class:`Ring`.

    buffer: uint8, the part itself.
    start: byte of the ring at which it begins.
    held: whether its content is still there; False once a newer part has taken its place.
    """

    buffer: torch.Tensor
    start: int
    held: bool = True


class Ring:
    """Device memory for arrays that outlive one launch: a buffer whose oldest parts make room for new ones.

    The buffer is allocated on first use and never grows.  All work must be queued on one and the same stream:
    an upload may overwrite what earlier work on that stream reads.

    nbytes: size of the whole ring.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._nbytes = nbytes
        self._device = device
        self._buffer: torch.Tensor | None = None
        self._parts: list[Part] = []
        self._end = 0

    def reserve(self) -> torch.Tensor:
        """The buffer, uint8 ``[nbytes]``, allocated now if it is not yet."""
        if self._buffer is None:
            self._buffer = torch.empty(self._nbytes, dtype=torch.uint8, device=self._device)
        return self._buffer

    def take(self, nbytes: int) -> Part | None:
        """A new part of that many bytes, in place of the oldest parts; None if the whole ring is smaller."""
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
