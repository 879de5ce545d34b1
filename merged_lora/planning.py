"""From a spec and its sources to a plan: checks what can be checked, and decides every number."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from .adapters import Adapter, calibrations_of
from .choosing import chosen
from .errors import PlanError, UnknownAdapterError, listed
from .factors import Factors, promoted
from .fitting import (
    check_experts,
    check_shapes,
    cross_term_notes,
    header_of,
    missing_notes,
    zero_notes,
)
from .grammar import meant_by
from .plan import (
    SHARES,
    AgreeingMean,
    All,
    Blend,
    EnergyMean,
    EntryModule,
    FactorJob,
    FactorModule,
    Graded,
    Important,
    Keep,
    Largest,
    LargestInModel,
    Mean,
    MergePlan,
    Middle,
    Module,
    OutputModule,
    Random,
    Rule,
    Sum,
    SumModule,
    Varied,
    as_float32,
    entries_of,
    with_sources,
)
from .recipe import DIVIDED_BY_SUM, SCALED, Recipe, Value
from .spec import MergeSpec, cancels
from .strategies import TABLE, find
from .weighing import auto_weights

DRAWN = ("random", "graded")
"""Keep rules whose random numbers depend on a module's name."""
CANCELLING = 1e-6
"""Weights whose sum is at most this share of the sum of their magnitudes cannot be divided by it."""


def make_plan(
    spec: MergeSpec,
    adapters: Mapping[str, Adapter],
    limit: int | None = None,
    base_model: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> MergePlan:
    """The checked plan of a merge.

    adapters:   by source name; further ones are ignored.
    limit:      largest rank of the result, None for any.
    base_model: the base model that the result names, None for the one that most sources name.
    progress:   called with 0 after each module whose weights have to be found; may raise to stop that.

    Raises PlanError or UnknownAdapterError if the merge cannot be done.
    """
    check_names(spec, adapters)
    sources = [adapters[name] for name in spec.names]
    for name, adapter in zip(spec.names, sources, strict=True):
        if adapter.nonfinite:
            raise PlanError(
                f"{name}: {adapter.nonfinite} holds NaN or infinity; train or export the adapter again"
            )
    names = chosen({name for source in sources for name in source.modules}, *spec.choice)
    named = dict(zip(spec.names, sources, strict=True))
    header, notes = header_of(named, names, base_model)
    check_experts(named, names)
    auto = None
    if spec.automatic:
        check_shapes(named, names)  # before lengths are computed; otherwise each kind of module is checked
        auto = auto_weights(sources, names, find(spec.strategy).recipe.blend == "sum", progress)
    planner = _Planner(_Settings.of(spec, auto), sources, names, limit)
    modules = {name: planner.module(name) for name in names}
    counts = planner.model_counts(modules)
    if planner.adds_factors:
        heard = {source.name: named[source.name] for source in spec.sources if source.weight}
        notes += cross_term_notes(spec.strategy, heard, names)
    zeros = zero_notes(named, names)
    notes += missing_notes(named, names) + zeros
    notes += planner.result_notes(modules, counts, len(zeros) == len(sources))
    return MergePlan(spec, planner.recipe, header, modules, tuple(sources), tuple(notes), counts)


def check_names(spec: MergeSpec, known: Collection[str]) -> None:
    """Raise UnknownAdapterError if the spec names a source that is not known."""
    missing = [name for name in spec.names if name not in known]
    if missing:
        terms = [term for term in (meant_by(name, known) for name in missing) if term]
        hint = f"did you mean {listed(terms)}? " if terms else ""
        way_out = f"known: {listed(sorted(known))}" if known else "none is known"
        raise UnknownAdapterError(f"unknown adapter {listed(map(repr, missing))}; {hint}{way_out}")


def amplification(spec: MergeSpec) -> float:
    """The largest factor by which the spec itself multiplies an entry of a source's delta.

    It covers weights, ``scale`` and the rescaling of entries kept at random. What the strategy makes of the
    adapters' own lengths and angles is not in it.
    """
    strategy = find(spec.strategy)
    rescales = [1.0] * len(spec.sources)
    if strategy.recipe.keep in DRAWN:
        epsilons = spec.per_source("epsilon") if strategy.option("epsilon") else (0.0,) * len(spec.sources)
        drawn = [_drawn(d, e, 0) for d, e in zip(spec.per_source("density"), epsilons, strict=True)]
        times = 2 if strategy.recipe.space == "factors" else 1  # A and B are rescaled each on its own
        rescales = [keep.rescale**times for keep in drawn]
    power = 2 if spec.option("compat") == "lorax" else 1  # raw weights on both factors
    largest = max(abs(w) ** power * rescale for w, rescale in zip(spec.weights(), rescales, strict=True))
    return largest * abs(float(spec.option("scale")))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Settings:
    """The options of a spec, read once for all modules; those that its strategy lacks change nothing."""

    strategy: str
    recipe: Recipe
    names: tuple[str, ...]
    weights: tuple[float, ...]
    auto: Mapping[str, tuple[float, ...]] | None
    scale: float
    densities: tuple[float, ...]
    gammas: tuple[float, ...]
    epsilons: tuple[float, ...]
    select_topk: float | None
    seed: Value | None
    rank: int | None
    t: float | None
    shrink: float
    lorax: bool
    whole_model: bool
    blend: Blend

    @classmethod
    def of(cls, spec: MergeSpec, auto: Mapping[str, tuple[float, ...]] | None) -> _Settings:
        strategy = find(spec.strategy)
        rank, t, select, shrink = (spec.option(name) for name in ("rank", "t", "select_topk", "shrink"))

        def shares(name: str, otherwise: float) -> tuple[float, ...]:
            return spec.per_source(name) if strategy.option(name) else (otherwise,) * len(spec.sources)

        return cls(
            strategy=strategy.name,
            recipe=strategy.recipe,
            names=spec.names,
            weights=spec.weights(),
            auto=auto,
            scale=float(spec.option("scale")),  # type: ignore[arg-type]
            densities=shares("density", 1.0),
            gammas=shares("gamma", 0.0),
            epsilons=shares("epsilon", 0.0),
            select_topk=select if isinstance(select, float) and select < 1.0 else None,
            seed=spec.option("seed"),
            rank=rank if isinstance(rank, int) else None,
            t=t if isinstance(t, float) else None,
            shrink=shrink if isinstance(shrink, float) else 1.0,
            lorax=spec.option("compat") == "lorax",
            whole_model=spec.option("scope") == "model",
            blend=_blend(spec, strategy.recipe),
        )


def _blend(spec: MergeSpec, recipe: Recipe) -> Blend:
    if recipe.blend == "agreeing_mean":
        return AgreeingMean(
            frequency=spec.option("majority_sign_method") == "frequency",
            # Balanced deltas vote with their new lengths; trimming does not know the difference.
            weighted=spec.option("elect") == "weighted" or spec.automatic,
        )
    return EnergyMean() if recipe.blend == "energy_mean" else Sum()


class _Planner:
    """Builds the modules of a plan.

    settings: of the spec.
    sources:  the adapters in the spec's order.
    names:    of the modules.
    limit:    largest rank of the result, None for any.
    """

    def __init__(
        self, settings: _Settings, sources: Sequence[Adapter], names: Sequence[str], limit: int | None
    ) -> None:
        self.recipe = settings.recipe
        self._settings = settings
        self._sources = sources
        self._names = names
        self._limit = limit
        self._alike: dict[tuple[object, ...], Module] = {}
        self._depends_on_names = (
            settings.auto is not None or self.recipe.keep in DRAWN or self.recipe.space == "outputs"
        )
        self._calibrations = (
            calibrations_of(dict(zip(settings.names, sources, strict=True)), settings.strategy)
            if self.recipe.space == "outputs"
            else ()
        )

    @property
    def adds_factors(self) -> bool:
        """Whether A and B are added up, each with the root of its source's weight."""
        summed = self.recipe.space == "factors" and self.recipe.blend == "sum"
        return summed and not self._settings.lorax

    def module(self, name: str) -> Module:
        """How one module is merged."""
        present = tuple([i for i, source in enumerate(self._sources) if name in source.modules])
        factors = tuple([self._sources[i].modules[name] for i in present])
        if self._depends_on_names:
            return self._planned(name, present, factors)
        # Most modules differ from others in nothing but the values of their tensors.
        kind = present, *(f.kind for f in factors)
        like = self._alike.get(kind)
        if like is not None:
            return with_sources(like, factors)
        planned = self._alike[kind] = self._planned(name, present, factors)
        return planned

    def _planned(self, name: str, present: tuple[int, ...], factors: tuple[Factors, ...]) -> Module:
        if len({(f.shape, f.embedding) for f in factors}) > 1:
            check_shapes(dict(zip(self._settings.names, self._sources, strict=True)), self._names)
        if self.recipe.space == "factors":
            return self._factor_module(name, present, factors)
        if self.recipe.space == "sums":
            return self._sum_module(name, present, factors)
        if self.recipe.space == "outputs":
            return self._output_module(name, present, factors)
        return self._entry_module(name, present, factors)

    def model_counts(self, modules: Mapping[str, Module]) -> tuple[int, ...] | None:
        """The number of entries of each source kept over all modules, None if each module has its own."""
        if not self._settings.whole_model or set(self._settings.densities) == {1.0}:
            return None
        sizes = [0] * len(self._sources)
        for module in modules.values():
            if isinstance(module, EntryModule):
                for i in module.present:
                    sizes[i] += math.prod(module.entries)
        return tuple(
            int(density * size) for density, size in zip(self._settings.densities, sizes, strict=True)
        )

    def result_notes(
        self, modules: Mapping[str, Module], counts: tuple[int, ...] | None, from_zeros: bool
    ) -> list[str]:
        """What a user should know about the result.

        from_zeros: whether the deltas of all sources are zero.
        """
        notes, rank = [], self._settings.rank
        largest = max(module.results[0][0][0] for module in modules.values()) if rank is not None else 0
        if rank is not None and largest < rank:
            notes.append(f"rank={rank} is more than there is to keep: the result has rank {largest}")
        if from_zeros:
            notes.append("the merge is zero, because all its sources are")
        elif all(map(_is_zero, modules.values())) or (counts is not None and not any(counts)):
            notes.append("the merge is zero: its weights, scale or density leave nothing")
        return notes

    def _factor_module(
        self, name: str, present: tuple[int, ...], factors: tuple[Factors, ...]
    ) -> FactorModule:
        settings, rank = self._settings, factors[0].rank
        if len({f.rank for f in factors}) > 1:
            ranks = {settings.names[i]: f.rank for i, f in zip(present, factors, strict=True)}
            others = [s.name for s in TABLE.values() if s.recipe.space != "factors"]
            raise PlanError(
                f"{settings.strategy} needs equal ranks, but {name} has "
                f"{listed(f'{rank} in {source}' for source, rank in ranks.items())}; "
                f"these strategies take different ranks: {listed(others)}"
            )
        if self._limit is not None and rank > self._limit:
            raise PlanError(f"{name} has rank {rank}, the limit is {self._limit}; svd can reduce the rank")
        scalings = tuple(f.scaling for f in factors)
        both = _factor_weights(settings.lorax, settings.scale, self._weights(name, present), scalings)
        jobs = []
        for side, weights in zip("ab", both, strict=True):
            inputs = tuple(f.a if side == "a" else f.b for f in factors)
            rule = self._rule(weights, name, side, present, (inputs[0].shape[0], inputs[0].shape[1]))
            jobs.append(FactorJob(inputs, rule, promoted([t.dtype for t in inputs])))
        return FactorModule(jobs[0], jobs[1], present, factors[0].embedding)

    def _sum_module(self, name: str, present: tuple[int, ...], factors: tuple[Factors, ...]) -> SumModule:
        settings, blend = self._settings, self.recipe.blend
        rank = self._sum_rank(name, factors)
        given = self._weights(name, present)
        relative = blend in SCALED
        weights = tuple(
            as_float32(settings.scale * (1.0 if relative else w) * f.scaling)
            for w, f in zip(given, factors, strict=True)
        )
        mean = None
        if relative:
            mean = Mean("slerp" if blend == "nuslerp" else blend, given, len(self._sources))
            if blend in DIVIDED_BY_SUM and cancels(given, CANCELLING):
                raise PlanError(
                    f"the weights of those sources that have {name} add up to 0, and {settings.strategy} "
                    "divides by that; change the weights"
                )
        if blend == "slerp" and settings.t is not None:
            shares = (1.0 - settings.t, settings.t)
            mean = Mean("slerp", tuple(shares[i] for i in present), len(self._sources))
        if mean is not None and mean.rule == "slerp" and len(present) == 1:
            # The other source's delta is zero here, and the path to it is a straight line.
            weights, mean = (as_float32(weights[0] * mean.shares[0]),), None
        dtype = promoted([t.dtype for f in factors for t in (f.a, f.b)])
        embedding = factors[0].embedding
        return SumModule(factors, present, weights, rank, mean, dtype, embedding, self.recipe.flat)

    def _sum_rank(self, name: str, factors: Sequence[Factors]) -> int:
        total, limit = sum(f.rank for f in factors), self._limit
        if self.recipe.rank == "truncate":
            return min(total, self._rank_asked(factors))
        if limit is None or total <= limit:
            return total
        if self.recipe.rank == "exact":
            raise PlanError(
                f"{self._settings.strategy} needs rank {total} for {name}, the limit is {limit}; "
                "use sum, which approximates, or raise the limit"
            )
        return limit

    def _entry_module(self, name: str, present: tuple[int, ...], factors: tuple[Factors, ...]) -> EntryModule:
        settings, recipe = self._settings, self.recipe
        rows, columns = factors[0].shape
        total = sum(f.rank for f in factors)
        if recipe.rank == "fit":
            rank = min(total, self._limit or total)
        else:
            # A merge of entries has no rank but that of its shape; one of coordinates has that of the bases.
            bound = min(rows, columns, total) if recipe.basis == "both" else min(rows, columns)
            rank = min(bound, self._rank_asked(factors))
        given = self._weights(name, present)
        if settings.auto is None:
            scalings, weights = tuple(f.scaling for f in factors), tuple(settings.scale * w for w in given)
        else:
            # The deltas themselves are balanced, so that the weak ones are heard in a basis and in a vote.
            scalings = tuple(w * f.scaling for w, f in zip(given, factors, strict=True))
            weights = (settings.scale,) * len(factors)
        shape = entries_of((rows, columns), total, rank, recipe.basis)
        return EntryModule(
            sources=factors,
            present=present,
            scalings=tuple(map(as_float32, scalings)),
            rule=self._rule(tuple(map(as_float32, weights)), name, "delta", present, shape),
            basis=recipe.basis,
            rank=rank,
            dtype=promoted([t.dtype for f in factors for t in (f.a, f.b)]),
            embedding=factors[0].embedding,
        )

    def _output_module(
        self, name: str, present: tuple[int, ...], factors: tuple[Factors, ...]
    ) -> OutputModule:
        settings = self._settings
        weights = [settings.scale * w for w in self._weights(name, present)]
        absent = [i for i in range(len(self._sources)) if i not in present]
        bystanders = {settings.names[i]: self._calibrations[i].inputs.get(name) for i in absent}
        for source, inputs in bystanders.items():
            width = factors[0].shape[1] if inputs is None else inputs.rest.shape[0]
            if width != factors[0].shape[1]:
                there, first = factors[0].shape[1], settings.names[present[0]]
                raise PlanError(
                    f"{name} takes {width} inputs in the calibration of {source} and {there} in {first}: "
                    "these adapters belong to different base models"
                )
        return OutputModule(
            sources=factors,
            present=present,
            inputs=(
                *(self._calibrations[i].inputs[name] for i in present),
                *(inputs for inputs in bystanders.values() if inputs is not None),
            ),
            scalings=tuple([as_float32(f.scaling) for f in factors]),
            weights=tuple(map(as_float32, weights)),
            shrink=settings.shrink,
            rank=min(sum(f.rank for f in factors), self._rank_asked(factors)),
            dtype=promoted([t.dtype for f in factors for t in (f.a, f.b)]),
            embedding=factors[0].embedding,
        )

    def _weights(self, name: str, present: Sequence[int]) -> tuple[float, ...]:
        """The weights of those sources that have a module."""
        settings = self._settings
        return tuple([settings.weights[i] for i in present]) if settings.auto is None else settings.auto[name]

    def _rank_asked(self, factors: Sequence[Factors]) -> int:
        """The option ``rank``, or the largest of the sources' ranks within the limit."""
        rank, limit = self._settings.rank, self._limit
        if rank is not None and limit is not None and rank > limit:
            raise PlanError(
                f"rank={rank} is over the limit of {limit}; ask for a smaller rank or raise the limit"
            )
        largest = max(f.rank for f in factors)
        return min(largest, limit or largest) if rank is None else rank

    def _rule(
        self,
        weights: tuple[float, ...],
        name: str,
        side: str,
        present: Sequence[int],
        shape: tuple[int, int],
    ) -> Rule:
        """How tensors of a shape are combined, one of each source that has the module."""
        size, alone = shape[0] * shape[1], len(present) == 1
        keeps = [self._keep(i, name, side, size, alone) for i in present]
        return Rule(weights, tuple(keeps), self._settings.blend)

    def _keep(self, index: int, name: str, side: str, size: int, alone: bool) -> Keep:
        """Which of ``size`` entries of one source take part.

        alone: whether no other source has the module.
        """
        settings, rule = self._settings, self.recipe.keep
        if rule == "all":
            return ALL
        density = settings.densities[index]
        match rule:
            case "largest" | "middle":
                if density == 1.0:
                    return ALL
                if settings.whole_model:
                    return LargestInModel()
                count, gamma = int(density * size), settings.gammas[index]
                return _largest(count, min(int(gamma * size), size - count) if gamma else 0)
            case "random" | "graded":
                source = self._sources[index]
                origin = source.origins.get(name, name)
                identity = f"{settings.seed}\0{source.digest}\0{origin}\0{side}"
                key = int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "little")
                return _drawn(density, settings.epsilons[index], key)
            case "varied":
                share = settings.select_topk
                return ALL if share is None or alone else Varied(int(share * size))
            case "important":
                return Important(*(size - int(share * (size - 1)) for share in (0.75, 0.5, 0.25)))


ALL = All()


@functools.lru_cache(1024)
def _largest(count: int, skip: int) -> Largest | Middle:
    return Middle(count, skip) if skip else Largest(count)


def _drawn(density: float, epsilon: float, key: int) -> Random | Graded:
    """Entries kept at random; shares are whole 65536ths, and density 1 switches epsilon off."""
    share = max(1, round(density * SHARES))
    spread = 0 if density == 1.0 else round(epsilon * SHARES)
    return Graded(share, key, spread) if spread else Random(share, key)


@functools.lru_cache(1024)  # most modules of an adapter have one scaling
def _factor_weights(
    lorax: bool, scale: float, weights: tuple[float, ...], scalings: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The numbers that each source's A and B are multiplied by, as float32 values."""
    if lorax:
        # LoRAX puts the raw weight on each factor and applies the first adapter's scaling to the product.
        root = _signed_root(scale * scalings[0])
        a, b = [w * root for w in weights], [w * abs(root) for w in weights]
    else:
        a = [_signed_root(as_float32(scale * w * s)) for w, s in zip(weights, scalings, strict=True)]
        b = [abs(w) for w in a]
    return tuple(map(as_float32, a)), tuple(map(as_float32, b))


def _is_zero(module: Module) -> bool:
    """Whether nothing is kept, or all of it is multiplied by 0."""
    if isinstance(module, SumModule | OutputModule):
        return not any(module.weights)
    rules = (module.a.rule, module.b.rule) if isinstance(module, FactorModule) else (module.rule,)
    return any(
        all(not weight or keep.empty for weight, keep in zip(rule.weights, rule.keeps, strict=True))
        for rule in rules
    )


def _signed_root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value) if value else 0.0
