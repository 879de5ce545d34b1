"""From a server's slots to launches that fill them: with merged tensors, with copies, or with zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from merged_lora.backends import Slot, StagedMerge
from merged_lora.triton_kernels.kernels.words import KINDS
from merged_lora.triton_kernels.transfer import Integers

from .launch import Draft, draft_launches
from .layout import Layout, copies
from .tables import target_rows


@dataclass(frozen=True, eq=False)
class Targets:
    """What a merge is written to.

    slots: by module name.
    empty: slots that become zero.
    """

    slots: Mapping[str, Slot]
    empty: Sequence[Slot]

    @property
    def all(self) -> list[Slot]:
        """Every slot, those that become zero last."""
        return [*self.slots.values(), *self.empty]

    def chosen(self, layout: Layout) -> tuple[Integers, list[Slot]]:
        """The tensors of a layout that have a slot ``[n]``, and their slots, one for A and B of a module."""
        modules = [i for i, name in enumerate(layout.modules) if name in self.slots]
        tensors = np.array([2 * i + side for i in modules for side in (0, 1)], np.int64)
        return tensors, [self.slots[layout.modules[i]] for i in modules]


def draft_merge(
    layout: Layout, chosen: Integers, slots: Sequence[Slot], addresses: Integers, thresholds: Integers
) -> list[Draft]:
    """The launches that merge the chosen tensors of a layout into their slots.

    chosen, slots: of :meth:`Targets.chosen`.
    addresses, thresholds: as in :func:`launch.draft_launches`.
    """
    tensors = slot_tensors(slots)
    rows = _target_rows(slots, tensors, layout.shapes[chosen])
    return draft_launches(layout, chosen, addresses, thresholds, rows, _kinds(tensors))


def draft_copies(
    sources: Sequence[torch.Tensor], slots: Sequence[Slot], addresses: Integers | None = None
) -> list[Draft]:
    """The launches that copy tensors into slots, and fill the rest of each slot with zeros.

    sources: contiguous two-dimensional tensors, A and B for each slot in turn.
    addresses: where the copies of these tensors lie that are read ``[n]``; the tensors themselves if None.
    """
    tensors = slot_tensors(slots)
    shapes = np.array([t.shape for t in sources], np.int64).reshape(-1, 2)
    if addresses is None:
        addresses = addresses_of(sources)
    rows = _target_rows(slots, tensors, shapes)
    every, column = np.arange(len(tensors)), addresses[:, None]
    # Copies keep all entries and read no thresholds, so any addresses will do for those.
    return draft_launches(
        copies(_kinds(sources)), every, column, np.zeros_like(column), rows, _kinds(tensors)
    )


def draft_placing(staged: StagedMerge, targets: Targets, address: int) -> list[Draft]:
    """The launches that copy modules of a staged merge into their slots, and fill empty slots with zeros.

    address: of a copy of the whole merge, on the device.
    """
    modules = [staged.modules[name] for name in targets.slots]
    sources = [tensor for f in modules for tensor in (f.a, f.b)]
    moved = addresses_of(sources) + (address - staged.host.data_ptr())
    nothing = _nothing(targets.empty)
    # One call for both, because in the same dtype they are one launch.
    return draft_copies([*sources, *nothing], targets.all, np.append(moved, addresses_of(nothing)))


def draft_zeros(slots: Sequence[Slot]) -> list[Draft]:
    """The launches that fill slots with zeros: copies of empty tensors."""
    return draft_copies(_nothing(slots), slots)


def _nothing(slots: Sequence[Slot]) -> list[torch.Tensor]:
    """An empty tensor for A and B of each slot in turn, in their dtypes."""
    return [torch.empty(0, 0, dtype=t.dtype) for t in slot_tensors(slots)]


def addresses_of(tensors: Sequence[torch.Tensor]) -> Integers:
    """The address of each tensor ``[n]``."""
    return np.array([t.data_ptr() for t in tensors], np.int64)


def slot_tensors(slots: Sequence[Slot]) -> list[torch.Tensor]:
    """A and B of each slot in turn."""
    return [tensor for slot in slots for tensor in (slot.a, slot.b)]


def _target_rows(slots: Sequence[Slot], tensors: Sequence[torch.Tensor], sources: Integers) -> Integers:
    begins = np.array([begin for slot in slots for begin in (slot.begin_a, slot.begin_b)], np.int64)
    return target_rows(tensors, sources, begins.reshape(-1, 2))


def _kinds(tensors: Sequence[torch.Tensor]) -> Integers:
    return np.array([KINDS[t.dtype] for t in tensors], np.int64)
