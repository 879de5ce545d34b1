"""Random sources on the device, slots to merge them into, and merges of several sets of both in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from merged_lora.backends import Slot, load_backend
from merged_lora.plan import MergePlan
from merged_lora.planning import make_plan
from merged_lora.spec import parse
from merged_lora.triton_kernels.backend import TritonBackend
from merged_lora.triton_kernels.packed import ALIGNMENT

from . import cases
from .device_agreement import differing_slots, differs_from_lowrank

DENSITY = 0.5
STEP = 2.0**-14
"""Between the densities of two plans of the same merge: of a tensor of 16,384 entries one more is kept."""


class DisagreementError(Exception):
    """What was about to be timed gives a wrong result."""


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
        """Take room for so many of the sources; none is on the device afterwards."""
        adapter = self.sources["a"]
        self.backend.reserve(count * (adapter.nbytes + 2 * ALIGNMENT * len(adapter.modules)))

    def merges(
        self,
        strategy: str,
        count: int,
        options: str,
        sets: int,
        slot_rank: int | None = None,
        limit: int | None = None,
    ) -> Merges:
        """The same merge of up to ``sets`` sets of ``count`` sources, no two of which share one.

        options: text that follows the sources in the spec; ``{density}`` stands for one.  slot_rank: of the
        slots, the rank of the sources where None.  limit: as in ``make_plan``.
        """
        names = list(self.sources)
        chosen = [names[i : i + count] for i in range(0, len(names) - count + 1, count)][:sets]
        specs = [f"{strategy}({', '.join(some)}{options})" for some in chosen]
        slots = make_slots(self.shapes, len(chosen), slot_rank or self.rank, self.dtype, self.backend.device)
        return Merges(self, specs, slots, limit)


class Merges:
    """One merge of several sets of sources, each into slots of its own; all methods take the set's number."""

    def __init__(
        self, pool: Pool, specs: Sequence[str], slots: Sequence[Mapping[str, Slot]], limit: int | None
    ) -> None:
        self.slots = slots
        self._pool = pool
        self._specs = specs
        self._limit = limit
        self._renewed = 0
        self.plans = [self._plan(spec) for spec in specs]

    def __len__(self) -> int:
        return len(self.plans)

    def _plan(self, spec: str) -> MergePlan:
        density = DENSITY + STEP * self._renewed
        return make_plan(parse(spec.format(density=density)), self._pool.sources, self._limit)

    def renew(self, turn: int) -> None:
        """Plan a merge again, with a density that was never asked for: nothing of it is known then."""
        self._renewed += 1
        self.plans[turn] = self._plan(self._specs[turn])

    def upload(self, turn: int) -> None:
        """Bring the sources to the device, where they are not there yet."""
        self._pool.backend.load_sources(self.plans[turn])

    def write(self, turn: int) -> None:
        """The whole merge, as a server does it."""
        self._pool.backend.write(self.plans[turn], self.slots[turn])

    def write_anew(self, turn: int) -> None:
        """Plan it again, then the whole merge."""
        self.renew(turn)
        self.write(turn)

    def check(self, turn: int) -> None:
        """The check that a server makes first."""
        self._pool.backend.check(self.plans[turn])

    def verify(self) -> None:
        """Raise DisagreementError unless the first set fills its slots, with what it should.

        That is looked at in one module of each shape: the bits of the NumPy backend or, where matrices are
        decomposed, the factors that the CPU computes; of merges of entries, that slots are filled.
        """
        plan, slots = self.plans[0], self.slots[0]
        tensors = [x for slot in slots.values() for x in (slot.a, slot.b)]
        for tensor in tensors:
            tensor.fill_(torch.nan)
        self.write(0)
        if any(bool(x.isnan().any()) for x in tensors):
            raise DisagreementError(f"{plan.spec}: the slots are not wholly written")
        names = one_of_each({name: (slot.b.shape[0], slot.a.shape[1]) for name, slot in slots.items()})
        if plan.recipe.space == "factors":
            some = replace(plan, modules={name: plan.modules[name] for name in names})
            wrong = differing_slots(slots, load_backend("numpy").merge(some, lambda _: None))
        elif plan.recipe.space in ("entries", "core"):
            wrong = None  # dense references of such modules take minutes: small ones were checked before
        else:
            wrong = differs_from_lowrank(plan, names, slots)
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


def one_of_each(shapes: cases.Shapes) -> list[str]:
    """The first module of each distinct shape."""
    return list({shape: name for name, shape in reversed(list(shapes.items()))}.values())
