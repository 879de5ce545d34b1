"""The closed vocabulary in which every strategy is written: data only, no arithmetic.

A strategy is a :class:`Recipe` (where the arithmetic happens and which rule each step follows) and the
:class:`Option` values a user may set.  A backend knows the words of the recipe and nothing of strategies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .checks import ALL, Check, flag, modules, number, one_of, patterns, share, unit, whole_number

Number = int | float
Value = Number | str | bool | tuple[float, ...]
Parts = tuple[str, list[tuple[str, float]], list[tuple[str, Value]]]
"""What a merge is written with: a strategy, its sources with their weights, and its options."""

Space = Literal["factors", "sums", "entries", "core", "outputs"]
KeepRule = Literal["all", "largest", "middle", "random", "graded", "varied", "important"]
Blend = Literal[
    "sum",
    "agreeing_mean",
    "energy_mean",
    "slerp",
    "nuslerp",
    "karcher",
    "multislerp",
    "model_stock",
    "balanced",
]
RankRule = Literal["equal", "fit", "exact", "truncate"]
Basis = Literal["output", "both"]

MEANS: tuple[Blend, ...] = ("nuslerp", "karcher", "multislerp", "model_stock")
"""Blends that take the weights relative to their sum."""
SCALED: tuple[Blend, ...] = (*MEANS, "balanced")
"""Blends that find one scalar for each delta from the lengths of all."""
DIVIDED_BY_SUM: tuple[Blend, ...] = ("karcher",)
"""Blends in MEANS that divide by the sum of the weights of the sources that have a module."""


@dataclass(frozen=True)
class Option:
    """One setting of a strategy.

    ``check`` takes a value and returns it in canonical form, or raises ValueError with what is allowed.
    ``per_source`` options also take one value per source, as a list.
    """

    name: str
    default: Value | None
    check: Check[Value]
    help: str
    per_source: bool = False


@dataclass(frozen=True)
class Recipe:
    """How a strategy computes; see docs/semantics.md for the formula behind each word.

    space:  what is combined: the entries of A and of B apart (``factors``), the deltas ``dW = s B A`` with
            one number each (``sums``), the entries of the deltas, which are never held whole (``entries``),
            their coordinates in a basis that the sources share (``core``), or the outputs that they give on
            each source's own inputs, of which calibrations know (``outputs``).
    keep:   which entries of a source take part: ``all``, the ``largest`` (trim), the ``middle``: the largest
            after a few outliers (breadcrumbs), a ``random`` share (DARE), a share ``graded`` by rank within a
            row (DELLA), those that ``varied`` most between the sources (SCE), or the ``important``: those
            whose magnitude, times how far their row is from uniform, stands out (Arcee Fusion).
    blend:  entry by entry the weighted ``sum``, the mean of those that agree with the elected sign, or that
            mean weighted by each source's energy (SCE). In ``sums`` also one scalar for each source and
            module, from the inner products of the deltas; ``balanced`` makes them equally long.
    rank:   ``equal`` ranks in and out; ``fit``: sum of ranks, truncated to the limit; ``exact``: sum of
            ranks, refused over the limit; ``truncate``: the option ``rank``.
    basis:  in ``core`` space, which sides share a basis: the ``output`` side, or ``both``.
    flat:   in ``sums``, whether all singular values of the result become equal.
    """

    space: Space
    keep: KeepRule = "all"
    blend: Blend = "sum"
    rank: RankRule = "equal"
    basis: Basis | None = None
    flat: bool = False

    @property
    def balances(self) -> bool:
        """Whether it finds by itself how much each source counts, so that automatic weights add nothing."""
        return self.blend in SCALED or self.space == "outputs"


@dataclass(frozen=True)
class Strategy:
    """A row of the table: a name users write, its recipe, the options it takes, and where it comes from."""

    name: str
    summary: str
    recipe: Recipe
    options: tuple[Option, ...]
    source: str
    sources_min: int = 1
    sources_max: int | None = None
    ordered: bool = False

    def option(self, name: str) -> Option | None:
        """The option of that name, or None if this strategy does not take it."""
        return next((option for option in self.options if option.name == name), None)


SCALE = Option("scale", 1.0, number, "a factor on the whole merged delta")
NORMALIZE = Option("normalize", False, flag, "divide the weights by their sum first")
DENSITY = Option("density", 0.5, share, "share of entries kept, one value or one per source", per_source=True)
MAJORITY = Option(
    "majority_sign_method",
    "total",
    one_of("total", "frequency"),
    "elect each entry's sign by the sum of values or by the count of signs",
)
ELECT = Option(
    "elect",
    "unweighted",
    one_of("unweighted", "weighted"),
    "whether the vote counts values before or after weighting",
)
SEED = Option("seed", 0, whole_number(0, 2**63 - 1), "seed of the random masks")
RANK = Option("rank", None, whole_number(1, 65536), "rank of the result; by default the largest source rank")
GAMMA = Option("gamma", 0.01, unit, "share of the very largest entries left out", per_source=True)
EPSILON = Option(
    "epsilon",
    0.15,
    unit,
    "how far the share kept rises above density for a row's largest entry and falls for its smallest",
    per_source=True,
)
SELECT = Option("select_topk", 1.0, share, "share of entries kept: those that vary most between the sources")
SCOPE = Option(
    "scope", "module", one_of("module", "model"), "whether density counts entries per module or in all"
)
SHRINK = Option(
    "shrink",
    0.97,
    unit,
    "share of the measured correlations between inputs that is trusted; 0 takes inputs as uncorrelated",
)
T = Option("t", 0.5, unit, "position between the first source (0) and the second (1)")
COMPAT = Option(
    "compat",
    "none",
    one_of("none", "lorax"),
    'with "lorax": raw weights on both factors, the first source\'s scaling',
)
WEIGHTS = Option(
    "weights",
    "given",
    one_of("given", "auto"),
    'with "auto": weights that keep the merge from overshooting, found from the sources alone',
)
MODULES = Option(
    "modules", ALL, modules, "patterns of the modules that are merged, with a space between them"
)
WITHOUT = Option("without", None, patterns, "patterns of the modules that are left out")
EVERYWHERE = (WEIGHTS, SCALE, NORMALIZE, MODULES, WITHOUT)
