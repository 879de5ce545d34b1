"""Random sources on the device, slots to merge them into, and merges of several sets of both in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from merged_lora.backends import Slot, StagedMerge
from merged_lora.plan import MergePlan
from merged_lora.planning import make_plan
from merged_lora.spec import parse
from merged_lora.triton_kernels.backend import TritonBackend
from merged_lora.triton_kernels.packed import ALIGNMENT

from . import cases
from .agreement import merge_by_reference
from .device_agreement import find_different_truncation, find_wrong_slot

DENSITY = 0.5
STEP = 2.0**-14
"""Between the densities of two plans of the same merge: of a tensor of 16,384 entries one more is kept."""


class DisagreementError(Exception):
    """A merge that was about to be timed gives a wrong result."""


class Pool:
    """Random sources of one dtype in page-locked memory, and a backend that can hold all of them."""

    def __init__(
        self, shapes: cases.Shapes, count: int, rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shapes = shapes
        self.rank = rank
        self.dtype = dtype
        self.backend = TritonBackend(device)
        adapters = cases.random_sources(shapes, count, rank, dtype)
        self.sources = {name: self.backend.adopt(adapter) for name, adapter in adapters.items()}
        self.reserve(count)

    def reserve(self, count: int) -> None:
        """Make room on the device for that many sources, and remove those that are there."""
        adapter = self.sources["a"]
        self.backend.reserve(count * (adapter.nbytes + 2 * ALIGNMENT * len(adapter.modules)))

    def merges(
        self, strategy: str, count: int, options: str, sets: int, slot_rank: int | None = None
    ) -> Merges:
        """The same merge of up to ``sets`` sets of ``count`` sources, no two of which share a source.

        options: text that follows the sources in the spec, in which ``{density}`` is replaced.
        slot_rank: rank of the slots, the sources' by default, and the limit of a result's rank.
        """
        names = list(self.sources)
        chosen = [names[i : i + count] for i in range(0, len(names) - count + 1, count)][:sets]
        specs = [f"{strategy}({', '.join(group)}{options})" for group in chosen]
        return Merges(self, specs, slot_rank or self.rank)


class Merges:
    """One merge of several sets of sources, each into slots of its own; the methods take a set's number."""

    def __init__(self, pool: Pool, specs: Sequence[str], slot_rank: int) -> None:
        self._pool = pool
        self._specs = specs
        self._rank = slot_rank
        self.renew_slots()
        self._renewed = 0
        self._staged: dict[int, StagedMerge] = {}
        self.plans = [self._plan(spec) for spec in specs]

    def __len__(self) -> int:
        return len(self.plans)

    def _plan(self, spec: str) -> MergePlan:
        density = DENSITY + STEP * self._renewed
        return make_plan(parse(spec.format(density=density)), self._pool.sources, self._rank)

    def renew(self, turn: int) -> None:
        """Plan a merge again with a new density, so that nothing of it is cached."""
        self._renewed += 1
        self.plans[turn] = self._plan(self._specs[turn])

    def renew_slots(self) -> None:
        """Make new slots, to which nothing was written yet."""
        pool = self._pool
        self.slots = make_slots(pool.shapes, len(self._specs), self._rank, pool.dtype, pool.backend.device)

    def upload(self, turn: int) -> None:
        """Bring the sources to the device unless they are there."""
        self._pool.backend.load_sources(self.plans[turn])

    def write(self, turn: int) -> None:
        """Merge straight into the slots."""
        self._pool.backend.write(self.plans[turn], self.slots[turn])

    def write_anew(self, turn: int) -> None:
        """Plan the merge again, then merge into the slots."""
        self.renew(turn)
        self.write(turn)

    def stage(self, turn: int) -> None:
        """Make the merge, check it and bring it to host memory, as a server does beside its steps."""
        staged = self._staged[turn] = self._pool.backend.stage(self.plans[turn], self._pool.dtype)
        self._pool.backend.compile(staged, self.slots[turn])

    def place(self, turn: int) -> None:
        """Copy what was staged last into the slots, as a server does within a step."""
        self._pool.backend.place(self._staged[turn], self.slots[turn])

    def verify(self, fill: Callable[[int], object] | None = None) -> None:
        """Raise DisagreementError unless the first set fills its slots with the right numbers.

        fill: fills the slots of a set; :meth:`write` if None.

        One module of each shape is compared, with the bits of the NumPy backend or, if matrices are
        decomposed, with the factors that the CPU computes.  Merges of entries must only fill their slots.
        """
        plan, slots = self.plans[0], self.slots[0]
        tensors = [x for slot in slots.values() for x in (slot.a, slot.b)]
        for tensor in tensors:
            tensor.fill_(torch.nan)
        (fill or self.write)(0)
        if any(bool(x.isnan().any()) for x in tensors):
            raise DisagreementError(f"{plan.spec}: the slots are not wholly written")
        names = one_of_each({name: (slot.b.shape[0], slot.a.shape[1]) for name, slot in slots.items()})
        wrong = None  # dense references of entries take minutes: small ones were checked before
        if plan.recipe.space == "factors":
            part = replace(plan, modules={name: plan.modules[name] for name in names})
            wrong = find_wrong_slot(slots, merge_by_reference(part))
        elif plan.recipe.space == "sums":
            wrong = find_different_truncation(plan, names, slots)
        if wrong:
            raise DisagreementError(f"{plan.spec}: {wrong}")


def make_slots(
    shapes: cases.Shapes, count: int, rank: int, dtype: torch.dtype, device: torch.device
) -> list[dict[str, Slot]]:
    """That many slots of every module, full of NaN, side by side as vLLM keeps them.

    A is ``[slots, 1, rank, in]``, B is ``[slots, 1, out, rank]``.
    """
    stacked = {
        name: (
            torch.full((count, 1, rank, columns), torch.nan, dtype=dtype, device=device),
            torch.full((count, 1, rows, rank), torch.nan, dtype=dtype, device=device),
        )
        for name, (rows, columns) in shapes.items()
    }
    return [{name: Slot(a[i, 0], b[i, 0]) for name, (a, b) in stacked.items()} for i in range(count)]


def one_of_each(shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """The first module of each distinct shape."""
    return list({shape: name for name, shape in reversed(list(shapes.items()))}.values())
