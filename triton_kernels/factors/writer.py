"""Launches of a layout's modules: into slots, with tables that are kept for the next time, or as a check."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from merged_lora.backends import Slot
from merged_lora.triton_kernels.packed import Resident
from merged_lora.triton_kernels.transfer import Part, Ring

from .launch import (
    KEEP_EVERYTHING,
    KEEP_NONE,
    Draft,
    Launch,
    draft_launches,
    raised_flags,
    source_addresses,
    source_thresholds,
    threshold_addresses,
    upload_launches,
)
from .layout import Layout
from .slots import Targets, draft_merge, draft_zeros, slot_tensors
from .tables import target_rows

TABLES = 16 << 20
"""Bytes of tables kept on the device; about 60 merges of rank 16 into a slot of an 8B model."""


@dataclass(frozen=True, eq=False)
class Written:
    """The launches of a write, with their tables in a part of the ring.

    They are valid for the same slots at the same addresses, as long as the sources and their thresholds have
    not moved; a source that was evicted and loaded again is another resident.  Slots and residents are held
    weakly, so that they do not keep device memory alive.

    names: modules written, in the order of their slots.
    slots: those of the modules, then those that become zero.
    addresses: of A and B of every slot in turn.
    residents: the sources.
    thresholds: of :func:`launch.source_thresholds`.
    part: holds the tables.
    """

    names: Sequence[str]
    slots: Sequence[weakref.ref[Slot]]
    addresses: Sequence[int]
    residents: Sequence[weakref.ref[Resident]]
    thresholds: Sequence[torch.Tensor | None]
    part: Part
    launches: Sequence[Launch]

    def is_valid(
        self,
        targets: Targets,
        residents: Sequence[Resident],
        thresholds: Sequence[torch.Tensor | None],
    ) -> bool:
        """Whether tables made now would be the same."""
        return (
            self.names == list(targets.slots)
            and self.addresses == _addresses(targets)
            and all(kept() is slot for kept, slot in zip(self.slots, targets.all, strict=True))
            and all(kept() is resident for kept, resident in zip(self.residents, residents, strict=True))
            and all(kept is table for kept, table in zip(self.thresholds, thresholds, strict=True))
        )


class LayoutWriter:
    """Launches of the modules of a layout on one device.

    The tables of launches into slots stay in a ring on the device and serve again while nothing moves.  All
    work must be queued on one and the same stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ring = Ring(TABLES, device)
        self._constants = torch.tensor([KEEP_EVERYTHING, KEEP_NONE], dtype=torch.int32).to(device)

    def reserve(self) -> torch.Tensor:
        """The memory for tables, uint8, allocated now if it is not yet."""
        return self._ring.reserve()

    def launches(
        self,
        layout: Layout,
        residents: Sequence[Resident],
        targets: Targets,
        written: list[Written] | None = None,
    ) -> Sequence[Launch]:
        """The launches that merge a layout's modules into their slots, and fill empty slots with zeros.

        residents: the sources of the layout, in order.
        written: earlier writes of this layout, whose launches are returned again if they are still valid;
            this one is added, if the ring has room for its tables.  Nothing is kept if None.
        """
        chosen, slots = targets.chosen(layout)
        thresholds = source_thresholds(layout, residents, self._device) if slots else []
        if written is not None:
            # Writes whose tables were overwritten in the ring by newer ones are forgotten.
            written[:] = [write for write in written if write.part.held]
            for write in written:
                if write.is_valid(targets, residents, thresholds):
                    return write.launches
        drafts: list[Draft] = []
        if slots:
            addresses = source_addresses(layout, residents)
            kept = threshold_addresses(layout, thresholds, self._constants)
            drafts += draft_merge(layout, chosen, slots, addresses, kept)
        drafts += draft_zeros(targets.empty)
        part: Part | None = None

        def take(nbytes: int) -> torch.Tensor:
            nonlocal part
            part = None if written is None else self._ring.take(nbytes)
            return (
                torch.empty(nbytes, dtype=torch.uint8, device=self._device) if part is None else part.buffer
            )

        launches = upload_launches(drafts, self._device, take)
        if written is not None and part is not None:
            written.append(
                Written(
                    names=list(targets.slots),
                    slots=[weakref.ref(slot) for slot in targets.all],
                    addresses=_addresses(targets),
                    residents=[weakref.ref(resident) for resident in residents],
                    thresholds=thresholds,
                    part=part,
                    launches=launches,
                )
            )
        return launches

    def check(self, layout: Layout, residents: Sequence[Resident]) -> torch.Tensor:
        """Whether the result of each module of the layout overflows, bool ``[modules]`` on the device."""
        # A check stores no results, so its targets need shapes but no memory.
        nowhere = [torch.empty(shape, device="meta") for shape in layout.shapes.tolist()]
        thresholds = source_thresholds(layout, residents, self._device)
        drafts = draft_launches(
            layout=layout,
            chosen=np.arange(len(nowhere)),
            addresses=source_addresses(layout, residents),
            thresholds=threshold_addresses(layout, thresholds, self._constants),
            targets=target_rows(nowhere, layout.shapes),
            kinds=layout.rounds,
            check=True,
        )
        launches = upload_launches(drafts, self._device)
        for launch in launches:
            launch.run()
        return raised_flags(launches).view(-1, 2).amax(1) > 0


def _addresses(targets: Targets) -> list[int]:
    return [tensor.data_ptr() for tensor in slot_tensors(targets.all)]
