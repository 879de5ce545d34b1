"""What will be computed, with every number decided, before anything is.

A plan holds the sources' tensors untouched and, for each module, a job with exact scalars: weights,
kept counts, random keys.  Backends follow it to the letter; that is why they can agree to the bit.
``planning.py`` builds plans.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from .adapters import Adapter
from .calibration import Calibration, Inputs
from .errors import PlanError
from .factors import Factors
from .files.layout import Header
from .recipe import Basis, Recipe
from .spec import MergeSpec

Results = tuple[tuple[tuple[int, int], torch.dtype], ...]

SHARES = 65536
"""Random masks compare 16-bit draws, so a share is a whole number of 65536ths."""


class Keep:
    """Which entries of an input take part. The classes are named after the recipe's words."""

    @property
    def rescale(self) -> float:
        """The largest factor by which kept entries are multiplied to preserve the mean; a float32 value."""
        return 1.0

    @property
    def empty(self) -> bool:
        """Whether no entry is kept."""
        return False

    @property
    def counts(self) -> tuple[int, ...]:
        """For each threshold that the rule compares scores with, the number of entries that lie above it."""
        return ()


@dataclass(frozen=True)
class _Counted(Keep):
    count: int

    @property
    def empty(self) -> bool:
        """Whether no entry is kept."""
        return self.count == 0

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of entries above the one threshold."""
        return (self.count,)


@dataclass(frozen=True)
class _Drawn(Keep):
    share: int
    key: int


@dataclass(frozen=True)
class All(Keep):
    """Every entry."""


@dataclass(frozen=True)
class Largest(_Counted):
    """The ``count`` largest magnitudes; among equals those that come first."""


@dataclass(frozen=True)
class LargestInModel(Keep):
    """The largest magnitudes of a source over all modules; ``MergePlan.counts`` holds how many."""


@dataclass(frozen=True)
class Middle(_Counted):
    """The ``count`` largest magnitudes after the ``skip`` largest; ``skip`` is at least 1."""

    skip: int

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of entries above the lower and above the upper threshold."""
        return self.skip + self.count, self.skip


@dataclass(frozen=True)
class Varied(_Counted):
    """The ``count`` entries whose values vary most between the inputs, the same in all of them."""


@dataclass(frozen=True)
class Important(Keep):
    """The entries whose importance is at least ``median + 1.5 (upper - lower)`` of its quartiles.

    The importance of an entry is its magnitude times the Kullback-Leibler divergence of its row's softmax
    from the uniform distribution.

    upper, median, lower: the number of entries at or above each quartile.
    """

    upper: int
    median: int
    lower: int

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of entries at or above each quartile."""
        return self.upper, self.median, self.lower


@dataclass(frozen=True)
class Random(_Drawn):
    """Entries kept at random, rescaled so that their mean stays.

    share: of 65536.
    key:   64 bits, of the random numbers.
    """

    @property
    def rescale(self) -> float:
        """What kept entries are multiplied by so that the mean stays; a float32 value."""
        return as_float32(SHARES / self.share)


@dataclass(frozen=True)
class Graded(_Drawn):
    """At random, each rescaled by its own share, which rises with an entry's rank in its row.

    It rises from ``share - spread`` for the smallest entry to ``share + spread`` for the largest, within 1
    and 65536; ``spread`` is at least 1.
    """

    spread: int

    @property
    def rescale(self) -> float:
        """What the entry with the smallest share is multiplied by; a float32 value."""
        return as_float32(SHARES / max(1, self.share - self.spread))


@dataclass(frozen=True)
class Sum:
    """The weighted sum."""


@dataclass(frozen=True)
class AgreeingMean:
    """The mean of the weighted entries whose own sign is the elected one.

    frequency: elect by the count of signs instead of by the sum of values.
    weighted:  elect on weighted instead of plain values.
    """

    frequency: bool
    weighted: bool


@dataclass(frozen=True)
class EnergyMean:
    """The mean of those that agree with the sign of the sum, each weighted by its input's sum of squares."""


Blend = Sum | AgreeingMean | EnergyMean


@dataclass(frozen=True)
class Rule:
    """How same-shaped inputs are combined, entry by entry.

    weights: one float32 value per input.
    keeps:   one per input.
    blend:   what is made of the kept entries.
    """

    weights: tuple[float, ...]
    keeps: tuple[Keep, ...]
    blend: Blend

    def consists_of(self, keeps: Collection[type[Keep]], blends: Collection[type[Blend]]) -> bool:
        """Whether it keeps and blends by these classes alone; each backend declares those that it fuses."""
        return type(self.blend) in blends and all(type(keep) in keeps for keep in self.keeps)


@dataclass(frozen=True)
class Mean:
    """A rule of ``scalars.RULES``, which finds weights from the inner products of the deltas.

    rule:   name of the rule.
    shares: one per input.
    count:  number of sources of the merge; some of them may lack the module.
    """

    rule: str
    shares: tuple[float, ...]
    count: int


@dataclass(frozen=True, eq=False)
class FactorJob:
    """One result tensor in ``factors`` space: inputs of one shape, combined entry by entry.

    inputs: of every source that has the module, float32, float16 or bfloat16.
    rule:   how they are combined.
    dtype:  of the result.
    """

    inputs: tuple[torch.Tensor, ...]
    rule: Rule
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class FactorModule:
    """A module merged in ``factors`` space: one job for A, one for B.

    present:   indices of the plan's sources that have the module, in the order of the inputs.
    embedding: whether it is an embedding, see :class:`Factors`.
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
class SumModule:
    """A weighted sum of deltas: ``sum_i c_i weights[i] B_i A_i`` in at most ``rank`` dimensions.

    sources:   factors of the sources that have the module.
    present:   their indices in the plan's sources.
    weights:   one float32 value per source; scalings and ``scale`` are in them.
    rank:      of the result.
    mean:      the rule that finds the ``c_i``; None if they are 1.
    dtype:     of the result.
    embedding: whether it is an embedding.
    flat:      whether all singular values of the result are equal, see ``lowrank.flattened``.
    """

    sources: tuple[Factors, ...]
    present: tuple[int, ...]
    weights: tuple[float, ...]
    rank: int
    mean: Mean | None
    dtype: torch.dtype
    embedding: bool
    flat: bool = False

    @property
    def is_concatenated(self) -> bool:
        """Whether the result has the factors of all sources side by side, multiplied by weights."""
        return not self.flat and self.rank == sum(f.rank for f in self.sources)

    @property
    def results(self) -> Results:
        """Shape and dtype of the merged A and B."""
        return _results(self)


@dataclass(frozen=True, eq=False)
class EntryModule:
    """Deltas ``scalings[i] * B_i A_i`` merged entry by entry, as they are or in a basis that they share.

    sources:   factors of the sources that have the module.
    present:   their indices in the plan's sources.
    scalings:  one float32 value per source.
    rule:      how the entries are combined, of which there are ``entries`` (rows, columns).
    basis:     None for the deltas themselves, ``output`` for a basis of their columns, ``both`` for one of
               their rows too.
    rank:      of the result.
    dtype:     of the result.
    embedding: whether it is an embedding.
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
        """Number of rows and columns that the rule is applied to."""
        total = sum(f.rank for f in self.sources)
        return entries_of(self.sources[0].shape, total, self.rank, self.basis)

    @property
    def results(self) -> Results:
        """Shape and dtype of the merged A and B."""
        return _results(self)


@dataclass(frozen=True, eq=False)
class OutputModule:
    """Deltas ``scalings[i] * B_i A_i`` merged by their outputs on each source's own inputs.

    sources:   factors of the sources that have the module.
    present:   their indices in the plan's sources.
    inputs:    what the inputs of each source look like, and then of those that lack the module.
    scalings:  one float32 value per source.
    weights:   what the outputs of each source are multiplied by, float32 values.
    shrink:    share of the inputs' correlations that is kept.
    rank:      of the result.
    dtype:     of the result.
    embedding: whether it is an embedding.
    """

    sources: tuple[Factors, ...]
    present: tuple[int, ...]
    inputs: tuple[Inputs, ...]
    scalings: tuple[float, ...]
    weights: tuple[float, ...]
    shrink: float
    rank: int
    dtype: torch.dtype
    embedding: bool

    @property
    def results(self) -> Results:
        """Shape and dtype of the merged A and B."""
        return _results(self)


def entries_of(shape: tuple[int, int], total: int, rank: int, basis: Basis | None) -> tuple[int, int]:
    """Number of rows and columns that an :class:`EntryModule` combines.

    shape: of the delta.
    total: sum of the sources' ranks.
    rank:  of the result.
    basis: as in :class:`EntryModule`.
    """
    rows, columns = shape
    if basis is None:
        return rows, columns
    return (min(total, rows), columns) if basis == "output" else (rank, rank)


def _results(module: DeltaModule) -> Results:
    rows, columns = module.sources[0].shape
    return ((module.rank, columns), module.dtype), ((rows, module.rank), module.dtype)


DeltaModule = SumModule | EntryModule | OutputModule
Module = FactorModule | DeltaModule


def with_sources(module: Module, sources: tuple[Factors, ...]) -> Module:
    """The plan of a module that differs from another one in the values of its tensors alone.

    module:  the other one; not an :class:`OutputModule`, whose inputs are its own.
    sources: the factors of the sources that have the module.
    """
    match module:
        case FactorModule(a, b, present, embedding):
            return FactorModule(
                FactorJob(tuple([f.a for f in sources]), a.rule, a.dtype),
                FactorJob(tuple([f.b for f in sources]), b.rule, b.dtype),
                present,
                embedding,
            )
        case SumModule(_, present, weights, rank, mean, dtype, embedding, flat):
            return SumModule(sources, present, weights, rank, mean, dtype, embedding, flat)
        case EntryModule(_, present, scalings, rule, basis, rank, dtype, embedding):
            return EntryModule(sources, present, scalings, rule, basis, rank, dtype, embedding)
    raise TypeError(f"the inputs of a {type(module).__name__} are its own")


@dataclass(frozen=True, eq=False)
class MergePlan:
    """A merge ready to run.

    spec:    what was asked for.
    recipe:  of its strategy.
    header:  of the result.
    modules: how each module is merged, by name.
    sources: the adapters in the order of ``spec.names``.
    notes:   what a user should know, in sentences.
    counts:  number of entries kept of each source, if they are counted over all modules instead of in each.
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

    @property
    def calibrations(self) -> dict[str, str]:
        """Content digest of the calibration of every source, by name; empty if the merge uses none."""
        if self.recipe.space != "outputs":
            return {}
        pairs = zip(self.spec.names, self.sources, strict=True)
        return {name: a.calibration.digest for name, a in pairs if isinstance(a.calibration, Calibration)}


def overflow(spec: MergeSpec, module: str) -> PlanError:
    """The error for a module whose merged factors are larger than their dtype can hold."""
    return PlanError(f"{spec}: the result overflows its dtype in {module}; use smaller weights")


def as_float32(value: float) -> float:
    """The value rounded to float32; raises PlanError if it is larger than that can hold."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        raise PlanError(
            "weight, scaling and scale multiply to more than float32 can hold; make them smaller"
        ) from None
