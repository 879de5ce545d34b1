"""Launches of a layout's modules: into slots, with tables that are kept for the next time, or as a check."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from merged_lora.triton_kernels.packed import Resident

from .kept import KeptLaunches, Written
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
from .slots import Targets, draft_merge, draft_zeros
from .tables import target_rows

TABLES = 16 << 20
"""Bytes of tables kept on the device; about 60 merges of rank 16 into a slot of an 8B model."""


class LayoutWriter:
    """Launches of the modules of a layout on one device.

    The tables of launches into slots stay in a ring on the device and serve again while nothing moves.  All
    work must be queued on one and the same stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept = KeptLaunches(TABLES, device)
        self._constants = torch.tensor([KEEP_EVERYTHING, KEEP_NONE], dtype=torch.int32).to(device)

    def reserve(self) -> torch.Tensor:
        """The memory for tables, uint8, allocated now if it is not yet."""
        return self._kept.reserve()

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
            found = self._kept.find(written, targets, residents, thresholds)
            if found is not None:
                return found
        drafts: list[Draft] = []
        if slots:
            addresses = source_addresses(layout, residents)
            kept = threshold_addresses(layout, thresholds, self._constants)
            drafts += draft_merge(layout, chosen, slots, addresses, kept)
        drafts += draft_zeros(targets.empty)
        if written is None:
            return upload_launches(drafts, self._device)
        return self._kept.upload(drafts, written, targets, residents, thresholds)

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
