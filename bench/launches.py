"""The launches of a merge in factors space, with their tables on the device beforehand: to be timed alone.

For plans in which every source has every module.  The benchmark compares what they make with what the backend
makes before it times either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from merged_lora.backends import Slot
from merged_lora.plan import MergePlan
from merged_lora.triton_kernels.launch import prepare_launches, source_addresses
from merged_lora.triton_kernels.layout import lay_out
from merged_lora.triton_kernels.packed import Resident
from merged_lora.triton_kernels.tables import target_rows
from merged_lora.triton_kernels.trim import find_thresholds
from merged_lora.triton_kernels.words import KINDS


class Launches:
    """The launches that one plan needs, from residents into slots; both must stay where they are."""

    def __init__(
        self, plan: MergePlan, residents: Sequence[Resident], slots: Mapping[str, Slot], device: torch.device
    ) -> None:
        layout = lay_out(plan, [resident.packed for resident in residents])
        targets = [t for name in layout.modules for t in (slots[name].a, slots[name].b)]
        kinds = np.array([KINDS[t.dtype] for t in targets], np.int64)
        addresses = source_addresses(layout, residents)
        self._device = device
        self._held = (residents, targets)
        self._pairs = torch.empty(*addresses.shape, 2, dtype=torch.int32, device=device)
        pairs = self._pairs.data_ptr() + 8 * np.arange(addresses.size).reshape(addresses.shape)
        sizes = np.broadcast_to(layout.shapes.prod(1)[:, None], addresses.shape)
        self._tasks = np.stack([addresses, sizes, layout.counts, pairs], axis=-1).reshape(-1, 4)
        self._kinds = layout.kinds.reshape(-1)
        rows, every = target_rows(targets, layout.shapes), np.arange(len(targets))
        self._launches = prepare_launches(layout, every, addresses, pairs, rows, kinds, device)

    def trim(self) -> None:
        """Find the thresholds of every tensor, for a strategy that trims; uploads 32 bytes for each."""
        find_thresholds(self._tasks, self._kinds, self._device)

    def combine(self) -> None:
        """Merge, with the thresholds found last."""
        for one in self._launches:
            one.run()
