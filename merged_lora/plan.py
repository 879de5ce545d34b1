"""What will be computed, with every number decided, before anything is.

A plan holds the sources' tensors untouched and, for each module, a job with exact scalars: weights,
kept counts, random keys.  Backends follow it to the letter; that is why they can agree to the bit.
How a plan comes about is told in ``planning.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .adapters import Adapter
from .errors import PlanError
from .factors import Factors
from .peft_files import Header
from .recipe import Basis, Recipe
from .spec import MergeSpec

Results = tuple[tuple[tuple[int, int], torch.dtype], ...]

SHARES = 65536
"""Random masks compare 16-bit draws, so a share is a whole number of 65536ths."""


@dataclass(frozen=True)
class Keep:
    """Which entries of an input take part: its ``count`` largest, or ``share`` of 65536 at random.

    skip:   that many of the very largest are left out before the ``count`` largest are taken.
    key:    of the random numbers.
    spread: with a random share, how much larger it is for the largest entry of a row, and how much smaller
            for the smallest; in between it grows with the entry's rank in the row.
    """

    count: int | None = None
    share: int | None = None
    key: int | None = None
    skip: int = 0
    spread: int = 0

    @property
    def rescale(self) -> float:
        """What a random share is multiplied by, so that the mean stays; a float32 value."""
        return 1.0 if self.share is None else as_float32(SHARES / self.share)


@dataclass(frozen=True)
class Vote:
    """How signs are elected, and how those that agree are averaged.

    frequency: by count instead of by sum.  weighted: on weighted instead of plain values.
    energy: the mean of those that agree weighs each source by the sum of its squares, instead of equally.
    """

    frequency: bool
    weighted: bool
    energy: bool = False


@dataclass(frozen=True)
class Rule:
    """How same-shaped inputs are combined, entry by entry.

    weights: one float32 value per input.  keeps: one per input.
    vote: None for the weighted sum, else the mean of those that agree with the elected sign.
    select: before anything else, only that many entries are kept in all inputs: those whose values vary most
    between them; None for all.
    """

    weights: tuple[float, ...]
    keeps: tuple[Keep, ...]
    vote: Vote | None
    select: int | None = None

    @property
    def simple(self) -> bool:
        """Whether each input is kept by a number or at random, all alike, and averaged alike."""
        plain = not any(keep.skip or keep.spread for keep in self.keeps)
        return plain and self.select is None and not (self.vote and self.vote.energy)


@dataclass(frozen=True)
class Mean:
    """Weights from the inner products of the deltas: a rule of ``scalars.RULES`` and what it is given.

    shares: one per input.  count: sources of the merge, of which some may lack the module.
    """

    rule: str
    shares: tuple[float, ...]
    count: int


@dataclass(frozen=True, eq=False)
class FactorJob:
    """One result tensor in ``factors`` space: inputs of one shape, combined entry by entry."""

    inputs: tuple[torch.Tensor, ...]
    rule: Rule
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class FactorModule:
    """A module merged in ``factors`` space: one job for A, one for B.

    present: indices into the plan's sources of those that have the module, in the order of the inputs.
    """

    a: FactorJob
    b: FactorJob
    present: tuple[int, ...]
    embedding: bool

    @property
    def results(self) -> Results:
        """Shape and dtype of the merged A and B."""
        return tuple(
            ((job.inputs[0].shape[0], job.inputs[0].shape[1]), job.dtype) for job in (self.a, self.b)
        )


@dataclass(frozen=True, eq=False)
class DeltaModule:
    """A weighted sum of deltas: ``sum_i c_i weights[i] B_i A_i`` in at most ``rank`` dimensions.

    weights hold the sources' scalings.  mean: what gives the ``c_i``; None where they are 1.
    present: indices into the plan's sources of those that have the module, in the order of ``sources``.
    """

    sources: tuple[Factors, ...]
    present: tuple[int, ...]
    weights: tuple[float, ...]
    rank: int
    mean: Mean | None
    dtype: torch.dtype
    embedding: bool

    @property
    def results(self) -> Results:
        """Shape and dtype of the merged A and B."""
        return _results(self)


@dataclass(frozen=True, eq=False)
class EntryModule:
    """Deltas ``scalings[i] * B_i A_i`` merged entry by entry, as they are or in a basis that they share.

    rule: for the entries, of which there are ``entries`` (rows, columns).
    basis: None for the deltas themselves; ``output``: one basis for their columns; ``both``: for rows too.
    present: indices into the plan's sources of those that have the module, in the order of ``sources``.
    """

    sources: tuple[Factors, ...]
    present: tuple[int, ...]
    scalings: tuple[float, ...]
    rule: Rule
    basis: Basis | None
    rank: int
    dtype: torch.dtype
    embedding: bool

    @property
    def entries(self) -> tuple[int, int]:
        """Rows and columns of what the rule is applied to."""
        rows, columns = self.sources[0].shape
        if self.basis is None:
            return rows, columns
        if self.basis == "output":
            return min(sum(f.rank for f in self.sources), rows), columns
        return self.rank, self.rank

    @property
    def results(self) -> Results:
        """Shape and dtype of the merged A and B."""
        return _results(self)


def _results(module: DeltaModule | EntryModule) -> Results:
    rows, columns = module.sources[0].shape
    return ((module.rank, columns), module.dtype), ((rows, module.rank), module.dtype)


Module = FactorModule | DeltaModule | EntryModule


@dataclass(frozen=True, eq=False)
class MergePlan:
    """A merge ready to run: its spec, its recipe, one entry per module, and what the user should know.

    sources: the adapters in the order of ``spec.names``.
    counts: where entries are counted over all modules instead of in each, how many of each source are kept.
    """

    spec: MergeSpec
    recipe: Recipe
    header: Header
    modules: Mapping[str, Module]
    sources: tuple[Adapter, ...]
    notes: tuple[str, ...]
    counts: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        results = [result for module in self.modules.values() for result in module.results]
        return sum(rows * columns * dtype.itemsize for (rows, columns), dtype in results)

    @property
    def digests(self) -> dict[str, str]:
        """Content digest of every source, by name."""
        return {name: adapter.digest for name, adapter in zip(self.spec.names, self.sources, strict=True)}


def overflow(spec: MergeSpec, module: str) -> PlanError:
    """What to raise where a module's merged factors are larger than their dtype can hold."""
    return PlanError(f"{spec}: the result overflows its dtype in {module}; use smaller weights")


def as_float32(value: float) -> float:
    """The value rounded to float32; raises PlanError where it is larger than that can hold."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        raise PlanError(
            "weight, scaling and scale multiply to more than float32 can hold; make them smaller"
        ) from None
