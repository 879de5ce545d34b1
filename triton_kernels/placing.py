"""From staged merges to slots, in a server's step: one copy to the device, then launches that spread it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import torch

from merged_lora.backends import StagedMerge
from merged_lora.factors import Factors
from merged_lora.lru import Lru

from .factors.kept import KeptLaunches, Written
from .factors.launch import upload_launches
from .factors.slots import Targets, draft_placing
from .packed import view_like
from .transfer import keep_host_memory

TABLES: Final = 16 << 20
"""Bytes of tables kept on the device; for a slot of an 8B model and rank 16 they take about 0.25 MB."""
KEPT_KINDS: Final = 64
"""Number of kinds of merges whose tables are kept: merges of one kind differ in their values alone."""
UPLOADED: Final = 1 << 20
"""Bytes of tables for which page-locked memory is kept at hand."""


class Placer:
    """Fills slots from staged merges on one device.

    Whatever it touches is its own, and all its work is queued on the current stream, so that this stream's
    order alone makes it right: a merge is in the staging buffer when it is copied into slots, and has been
    copied before the next one comes.  It is used by one thread at a time, on one and the same stream.

    A staged merge may be forgotten right after the call.  Its copy is a non-blocking one from memory that
    torch has page-locked, and torch records an event on the stream of each such copy: neither that memory
    nor that of the tables is handed out again before the event has come.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._staging = torch.empty(0, dtype=torch.uint8, device=device)
        self._kept = KeptLaunches(TABLES, device)
        self._written: Lru[str, list[Written]] = Lru()  # by kind of merge

    def reserve(self, nbytes: int) -> None:
        """Allocate the staging buffer and the memory for tables.

        nbytes: of the largest merge.
        """
        self._renew(nbytes)
        self._kept.reserve()
        keep_host_memory(UPLOADED, self._device)

    def compile(self, staged: StagedMerge, targets: Targets) -> None:
        """Compile what :meth:`place` would launch, from any thread; uses no memory of this object."""
        hash(staged.kind)  # found here, so that no step has to
        # The address has no part in what is compiled: every tensor is as aligned as in host memory.
        for launch in upload_launches(draft_placing(staged, targets, staged.host.data_ptr()), self._device):
            launch.compile()

    def place(self, staged: StagedMerge, targets: Targets, whole: Collection[str] = ()) -> dict[str, Factors]:
        """See :meth:`merged_lora.backends.SlotBackend.place`."""
        if staged.nbytes > self._staging.numel():
            self._renew(staged.nbytes)  # only if nothing was reserved: ``stage`` refuses what is larger
        self.bring(staged)
        written = self._written.use(staged.kind)
        if written is None:
            written = []
            self._written.add(staged.kind, written, KEPT_KINDS)
        launches = self._kept.find(written, targets)
        if launches is None:
            drafts = draft_placing(staged, targets, self._staging.data_ptr())
            launches = self._kept.upload(drafts, written, targets)
        for launch in launches:
            launch.run()
        return {name: self._on_device(staged, staged.modules[name]) for name in whole}

    def bring(self, staged: StagedMerge) -> None:
        """Copy a merge to the staging buffer."""
        self._staging[: staged.nbytes].copy_(staged.host, non_blocking=True)

    def _renew(self, nbytes: int) -> None:
        """Replace the staging buffer; no table is right afterwards."""
        self._staging = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self._written.clear()

    def _on_device(self, staged: StagedMerge, f: Factors) -> Factors:
        begin = staged.host.data_ptr()
        a, b = (view_like(self._staging, t.data_ptr() - begin, t) for t in (f.a, f.b))
        return Factors(a, b, f.scaling, f.embedding)
