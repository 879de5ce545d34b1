"""Where the tensors of a merge lie in one buffer, in the order in which they are made. Allocates nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from merged_lora.factors import Factors
from merged_lora.plan import MergePlan

from .packed import ALIGNMENT
from .transfer import padded


@dataclass(frozen=True)
class Place:
    """One tensor.

    start: byte at which it begins, a multiple of ``packed.ALIGNMENT``.
    """

    start: int
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        """The byte at which the next tensor begins."""
        return self.start + padded(self.nbytes, ALIGNMENT)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def view(self, buffer: torch.Tensor, begin: int) -> torch.Tensor:
        """The tensor in a buffer that holds the bytes from ``begin`` on."""
        start = self.start - begin
        return buffer[start : start + self.nbytes].view(self.dtype).view(self.shape)


class Outline:
    """The places of A and B of every module of a plan.

    plan:  the plan.
    parts: names of all modules; those that are made together lie side by side.
    dtype: of the tensors; each has the dtype of the plan if None.
    """

    def __init__(self, plan: MergePlan, parts: Sequence[Sequence[str]], dtype: torch.dtype | None) -> None:
        self._plan = plan
        self._places: dict[str, tuple[Place, Place]] = {}
        self.nbytes = 0
        for name in (name for part in parts for name in part):
            (shape_a, dtype_a), (shape_b, dtype_b) = plan.modules[name].results
            a = Place(self.nbytes, shape_a, dtype or dtype_a)
            b = Place(a.end, shape_b, dtype or dtype_b)
            self._places[name] = a, b
            self.nbytes = b.end

    def part(self, names: Sequence[str]) -> slice:
        """The bytes of modules that lie side by side."""
        return slice(self._places[names[0]][0].start, self._places[names[-1]][1].end)

    def modules(self, buffer: torch.Tensor, names: Sequence[str], begin: int = 0) -> dict[str, Factors]:
        """Modules as views of a buffer that holds the bytes from ``begin`` on."""
        made = {}
        for name in names:
            a, b = (place.view(buffer, begin) for place in self._places[name])
            made[name] = Factors(a, b, embedding=self._plan.modules[name].embedding)
        return made
