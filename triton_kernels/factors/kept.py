"""Launches into slots whose tables stay on the device, and serve again while nothing moves."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from merged_lora.backends import Slot
from merged_lora.triton_kernels.packed import Resident
from merged_lora.triton_kernels.transfer import Part, Ring

from .launch import Draft, Launch, upload_launches
from .slots import Targets, addresses_of, slot_tensors


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
        self, asked: Asked, residents: Sequence[Resident], thresholds: Sequence[torch.Tensor | None]
    ) -> bool:
        """Whether tables made now would be the same."""
        return (
            self.addresses == asked.addresses
            and self.names == asked.names
            and all(kept() is slot for kept, slot in zip(self.slots, asked.slots, strict=True))
            and all(kept() is resident for kept, resident in zip(self.residents, residents, strict=True))
            and all(kept is table for kept, table in zip(self.thresholds, thresholds, strict=True))
        )


class Asked:
    """The targets of a write, as :class:`Written` has them."""

    def __init__(self, targets: Targets) -> None:
        self.names = list(targets.slots)
        self.slots = targets.all
        self.addresses: list[int] = addresses_of(slot_tensors(self.slots)).tolist()


class KeptLaunches:
    """Launches whose tables lie in a ring on the device.  All work must be queued on one and the same stream.

    nbytes: size of the ring.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._device = device
        self._ring = Ring(nbytes, device)

    def reserve(self) -> torch.Tensor:
        """The memory for tables, uint8, allocated now if it is not yet."""
        return self._ring.reserve()

    def find(
        self,
        written: list[Written],
        targets: Targets,
        residents: Sequence[Resident] = (),
        thresholds: Sequence[torch.Tensor | None] = (),
    ) -> Sequence[Launch] | None:
        """The launches of an earlier write that are still valid; None if there are none.

        written: earlier writes of the same; those whose tables were overwritten in the ring are forgotten.
        """
        written[:] = [write for write in written if write.part.held]
        asked = Asked(targets)
        for write in written:
            if write.is_valid(asked, residents, thresholds):
                return write.launches
        return None

    def upload(
        self,
        drafts: Sequence[Draft],
        written: list[Written],
        targets: Targets,
        residents: Sequence[Resident] = (),
        thresholds: Sequence[torch.Tensor | None] = (),
    ) -> Sequence[Launch]:
        """The launches with their tables on the device.

        written: earlier writes of the same; this one is added, if the ring has room for its tables.
        """
        part: Part | None = None

        def take(nbytes: int) -> torch.Tensor:
            nonlocal part
            part = self._ring.take(nbytes)
            if part is None:
                return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            return part.buffer

        launches = upload_launches(drafts, self._device, take)
        if part is not None:
            asked = Asked(targets)
            written.append(
                Written(
                    names=asked.names,
                    slots=[weakref.ref(slot) for slot in asked.slots],
                    addresses=asked.addresses,
                    residents=[weakref.ref(resident) for resident in residents],
                    thresholds=thresholds,
                    part=part,
                    launches=launches,
                )
            )
        return launches
