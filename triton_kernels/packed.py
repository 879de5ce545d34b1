"""Sources in device memory: one buffer per adapter, within a budget. Knows nothing of merging."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from merged_lora.adapters import Adapter
from merged_lora.errors import PlanError
from merged_lora.factors import Factors
from merged_lora.lru import Lru

from .transfer import host_memory, padded

ALIGNMENT = 64  # bytes; every tensor begins at a multiple of it, after a padding of zeros
UNRESERVED = 1 << 30
"""Bytes for sources if none were reserved; a merge that needs more increases them."""


@dataclass(frozen=True, eq=False)
class Packed:
    """The tensors of an adapter as views of one buffer in host memory, page-locked for a GPU.

    Modules of one kind (shape, rank, dtypes) are adjacent, so that they can be viewed as one stack.

    host: the buffer, uint8 ``[nbytes]``.
    modules: the views, by module name.
    index: row of each module in ``offsets``.
    offsets: bytes at which A and B begin, int64 ``[modules, 2]``.
    """

    host: torch.Tensor
    modules: dict[str, Factors]
    index: dict[str, int]
    offsets: NDArray[np.int64]


def pack(adapter: Adapter, device: torch.device) -> Packed:
    """A copy of the adapter's tensors in one buffer of host memory, ready to be uploaded to the device."""
    order = sorted(adapter.modules, key=lambda name: (*_kind(adapter.modules[name]), name))
    factors = [adapter.modules[name] for name in order]
    lengths = np.array([[padded(t.nbytes, ALIGNMENT) for t in (f.a, f.b)] for f in factors], np.int64)
    offsets = np.cumsum(lengths.reshape(-1)).reshape(lengths.shape) - lengths
    host = host_memory(int(lengths.sum()), device).zero_()
    modules = {}
    for name, f, starts in zip(order, factors, offsets.tolist(), strict=True):
        a, b = (view_like(host, start, t).copy_(t) for start, t in zip(starts, (f.a, f.b), strict=True))
        modules[name] = Factors(a, b, f.scaling, f.embedding)
    return Packed(host, modules, {name: i for i, name in enumerate(order)}, offsets)


def _kind(f: Factors) -> tuple[int, int, int, str, str]:
    return *f.shape, f.rank, str(f.a.dtype), str(f.b.dtype)


def view_like(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """The bytes from ``start`` on, as a tensor of the shape and dtype of ``like``."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


@dataclass(eq=False)
class Resident:
    """An adapter on the device.

    packed: the same in host memory.
    buffer: the packed bytes on the device, uint8.
    start: byte of the budget at which the buffer begins.
    thresholds: trimming thresholds ``(thr, cut)``, int32 ``[tensors, 2]``, the least recently used first; the
        key says which tensors they belong to and how many entries of each they keep.
    """

    packed: Packed
    buffer: torch.Tensor
    start: int
    thresholds: Lru[bytes, torch.Tensor] = field(default_factory=Lru)

    @property
    def addresses(self) -> NDArray[np.int64]:
        """Addresses of A and B on the device, int64 ``[modules, 2]``."""
        return self.packed.offsets + self.buffer.data_ptr()

    def stack(self, modules: Sequence[str], side: int) -> torch.Tensor:
        """A (side 0) or B (side 1) of modules of one kind, ``[modules, rows, columns]``.

        A view of the buffer if the modules are evenly spaced in it, otherwise a copy.
        """
        starts = self.packed.offsets[[self.packed.index[name] for name in modules], side].tolist()
        f = self.packed.modules[modules[0]]
        like = f.b if side else f.a
        first = view_like(self.buffer, starts[0], like)
        steps = {after - before for before, after in pairwise(starts)}
        if len(steps) > 1 or any(step < 0 for step in steps):
            return torch.stack([view_like(self.buffer, start, like) for start in starts])
        step = steps.pop() // like.element_size() if steps else like.numel()
        return first.as_strided((len(modules), *like.shape), (step, like.shape[1], 1))


class DeviceSources:
    """Adapters on a device, of which the least recently used are evicted when the budget is full.

    The budget is one buffer, allocated first fit.  All work must be queued on one and the same stream: an
    upload may overwrite what earlier work on that stream reads.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arena = torch.empty(0, dtype=torch.uint8, device=device)
        self._reserved: str | None = None
        self._residents: Lru[str, Resident] = Lru()  # by key of the adapter
        self._packed: weakref.WeakKeyDictionary[Adapter, Packed] = weakref.WeakKeyDictionary()
        self._packing = threading.Lock()

    def reserve(self, nbytes: int, reason: str = "") -> None:
        """Allocate the whole budget now, after which it never grows.

        nbytes: size of the budget.
        reason: where the size comes from; shown to a user whose merge does not fit.
        """
        self._renew(nbytes)
        self._reserved = reason

    def adopt(self, adapter: Adapter) -> Adapter:
        """The same adapter in packed form, which :meth:`load` uploads without another copy in host memory.

        From any thread, also while another one loads: nothing on the device is touched.
        """
        packed = self.pack(adapter)
        twin = adapter.moved({name: packed.modules[name] for name in adapter.modules})
        with self._packing:
            self._packed[twin] = packed
        return twin

    def pack(self, adapter: Adapter) -> Packed:
        """The adapter in packed form, made once."""
        with self._packing:
            packed = self._packed.get(adapter)
        if packed is None:
            packed = pack(adapter, self._device)
            with self._packing:
                packed = self._packed.setdefault(adapter, packed)
        return packed

    def load(self, adapters: Sequence[Adapter]) -> list[Resident]:
        """The adapters on the device, all at the same time and in this order; missing ones are uploaded.

        Raises PlanError if they need more than the reserved budget.
        """
        needed = {adapter.key: self.pack(adapter) for adapter in adapters}
        total = sum(packed.host.numel() for packed in needed.values())
        if total > self._arena.numel():
            if self._reserved is not None:
                each = " + ".join(f"{packed.host.numel() / 2**30:.3g}" for packed in needed.values())
                reason = f" ({self._reserved})" if self._reserved else ""
                raise PlanError(
                    f"the sources of this merge take {each} = {total / 2**30:.3g} GiB of device memory, "
                    f"{self._arena.numel() / 2**30:.3g} GiB are reserved{reason}; merge fewer sources, or "
                    "reserve more (vllm serve: --merged-lora-gpu-gib)"
                )
            self._renew(max(total, UNRESERVED))
        for key in needed:  # not a set, whose order depends on the hash seed
            self._residents.use(key)
        missing = {key: packed for key, packed in needed.items() if key not in self._residents}
        if not all(self._place(key, packed, needed) for key, packed in missing.items()):
            # There is enough room, but it is fragmented: start over, one adapter after the other.
            self._residents.clear()
            for key, packed in needed.items():
                self._place(key, packed, needed)
        return [self._residents[adapter.key] for adapter in adapters]

    def _place(self, key: str, packed: Packed, wanted: Collection[str]) -> bool:
        """Upload one adapter into the first gap; returns False if there is none.

        Evicts adapters that are not wanted, least recently used first, until there is a gap.
        """
        size = packed.host.numel()
        evictable = [other for other in self._residents if other not in wanted]
        while (start := self._gap(size)) is None:
            if not evictable:
                return False
            del self._residents[evictable.pop(0)]
        buffer = self._arena[start : start + size]
        buffer.copy_(packed.host, non_blocking=True)
        self._residents[key] = Resident(packed, buffer, start)
        return True

    def _gap(self, size: int) -> int | None:
        """The start of the first gap of that many bytes, or None."""
        end = 0
        for resident in sorted(self._residents.values(), key=lambda r: r.start):
            if resident.start - end >= size:
                return end
            end = resident.start + resident.buffer.numel()
        return end if self._arena.numel() - end >= size else None

    def _renew(self, nbytes: int) -> None:
        """Replace the budget; nothing is on the device afterwards."""
        self._residents.clear()
        self._arena = torch.empty(0, dtype=torch.uint8, device=self._device)  # free before taking more
        self._arena = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
