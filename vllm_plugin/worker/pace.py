"""How long a merge takes on this machine: measured at the start, and corrected by every merge.

Knows backends and plans, and nothing of vLLM.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch

from merged_lora.adapters import Adapter
from merged_lora.backends import Backend, SlotBackend
from merged_lora.cost import cost_of
from merged_lora.errors import MergeError, PlanError
from merged_lora.factors import Factors
from merged_lora.plan import MergePlan
from merged_lora.planning import make_plan
from merged_lora.spec import MergeSpec, parse
from merged_lora.strategies import TABLE, find

MEASURED = {"ties": 24, "della": 24, "sum": 24, "knots": 12, "core_ties": 12, "ties_svd": 2, "della_svd": 2}
"""Strategies that are timed at the start, with the number of modules: one of each kind of work that a machine
does at a rate of its own."""
ROWS, RANK = 512, 8
"""Rows and columns of a module of the random adapters that are merged for that, and their rank."""
REFERENCE = "numpy"
"""Name of the backend that is made to prove the others."""
ALTERNATIVES = 4
"""Number of faster strategies that a refusal names."""
LEARNED = 0.25
"""Weight of the newest merge in what is known of such merges."""
ALIKE = 4.0
"""Merges whose sizes are between the same two powers of this teach each other.  What small ones take does not
grow with their size, and says nothing of large ones."""
BELIEVED = 4.0
"""A merge teaches a rate of at most this many times the known one: the machine may just have been busy."""


_Kind = tuple[str, bool, int]
"""Strategy, whether weights have to be found, and class of size."""


class Pace:
    """Seconds for each operation of a merge.

    What is measured at the start is by strategy.  What is learned later is by strategy and size, so that it
    counts for merges that are like those that taught it, and for no others.  Until something was measured,
    nothing is known, and every merge is announced as free.  It belongs to the thread that merges.
    """

    def __init__(self) -> None:
        self._measured: dict[str, float] = {}  # seconds for an operation or a byte, by strategy
        self._learned: dict[_Kind, float] = {}

    def measure(self, backend: Backend) -> None:
        """Time small merges of random adapters, twice, because the first one may compile something.

        A backend whose device is only simulated is not timed, because what it takes says nothing.  Nor is the
        reference, because that would take minutes.
        """
        simulated = isinstance(backend, SlotBackend) and backend.device.type == "cpu"
        if simulated or backend.name == REFERENCE:
            return
        for strategy, modules in MEASURED.items():
            sources = {name: _random_adapter(modules, seed) for seed, name in enumerate("abc")}
            plan = make_plan(parse(f"{strategy}(a, b, c)"), sources, RANK)
            backend.merge(plan)
            start = time.perf_counter()
            backend.merge(plan)
            self._measured[strategy] = (time.perf_counter() - start) / _size(plan)

    def seconds(self, plan: MergePlan) -> float:
        """How long a merge is expected to take."""
        size = _size(plan)
        return size * self._rate(_kind(plan, size))

    def correct(self, plan: MergePlan, spent: float) -> None:
        """Take in how long a merge took; nothing is learned as long as nothing was measured."""
        if self._measured:
            size = _size(plan)
            rate = self._rate(_kind(plan, size))
            self._learn(_kind(plan, size), min(spent / size, BELIEVED * rate))

    def doubt(self, plan: MergePlan) -> None:
        """Trust what was learned a little less, because a merge that is refused for it cannot correct it."""
        kind = _kind(plan, _size(plan))
        if kind in self._learned:
            self._learn(kind, min(self._learned[kind], self._rate_at_start(kind[0])))

    def _learn(self, kind: _Kind, taught: float) -> None:
        rate = self._rate(kind)
        self._learned[kind] = rate + LEARNED * (taught - rate)

    def _rate(self, kind: _Kind) -> float:
        return self._learned.get(kind, self._rate_at_start(kind[0]))

    def _rate_at_start(self, strategy: str) -> float:
        """What was measured of a strategy, or of the one that is most like it."""
        if strategy in self._measured or not self._measured:
            return self._measured.get(strategy, 0.0)
        recipe = find(strategy).recipe
        kinds: Mapping[str, tuple[object, ...]] = {
            name: (other.space == recipe.space, other.basis == recipe.basis, other.keep == recipe.keep)
            for name, other in ((name, find(name).recipe) for name in self._measured)
        }
        return self._measured[max(kinds, key=kinds.__getitem__)]


def too_long(plan: MergePlan, limit: float, pace: Pace, max_rank: int) -> PlanError:
    """The error for a merge that would take longer than allowed; it names strategies that would not.

    limit:    seconds that a merge may take.
    max_rank: largest rank of a result.

    Plans all strategies if need be, each of which takes milliseconds.
    """
    spec, sources = plan.spec, dict(zip(plan.spec.names, plan.sources, strict=True))
    own = plan.recipe
    choice = tuple([given for given in spec.options if given[0] in ("modules", "without")])
    alike = sorted(
        (strategy for strategy in TABLE.values() if strategy.name != spec.strategy),
        key=lambda other: (other.recipe.keep, other.recipe.blend) != (own.keep, own.blend),
    )
    faster: list[str] = []
    for strategy in alike:
        try:
            other = MergeSpec(strategy.name, spec.sources, choice)
            seconds = pace.seconds(make_plan(other, sources, max_rank))
        except MergeError:  # it does not take these sources
            continue
        if seconds <= limit:
            faster.append(f"{strategy.name} ({seconds:.2g} s)")
        if len(faster) == ALTERNATIVES:
            break
    way_out = f"; these would do: {', '.join(faster)}" if faster else ""
    return PlanError(
        f"{spec.strategy} of these sources takes about {pace.seconds(plan):.2g} s here, and this server "
        f"merges for at most {limit:g} s (--merged-lora-max-seconds){way_out}"
    )


def _size(plan: MergePlan) -> float:
    """Operations and bytes, of which a core does about as many in a second."""
    cost = cost_of(plan)
    return cost.operations + cost.nbytes


def _kind(plan: MergePlan, size: float) -> _Kind:
    """What a merge has in common with those that it teaches something about."""
    return plan.spec.strategy, plan.spec.automatic, math.floor(math.log(size, ALIKE))


def _random_adapter(modules: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return Adapter({f"layers.{i}": Factors(tensor(RANK, ROWS), tensor(ROWS, RANK)) for i in range(modules)})
