"""From a spec and its sources to a plan: checks what can be checked, and decides every number."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from .adapters import Adapter
from .errors import PlanError, UnknownAdapterError, listed
from .factors import Factors, promoted
from .peft_files import Header
from .plan import (
    SHARES,
    DeltaModule,
    EntryModule,
    FactorJob,
    FactorModule,
    Keep,
    Mean,
    MergePlan,
    Module,
    Rule,
    Vote,
    as_float32,
)
from .recipe import MEANS, Recipe, Value
from .spec import MergeSpec
from .strategies import TABLE, find
from .weighing import auto_weights


def make_plan(spec: MergeSpec, adapters: Mapping[str, Adapter], limit: int | None = None) -> MergePlan:
    """The plan of a merge; raises PlanError or UnknownAdapterError where it cannot be done.

    adapters: by source name; further ones are ignored.  limit: largest rank of the result, None for any.
    """
    check_names(spec, adapters)
    sources = [adapters[name] for name in spec.names]
    for name, adapter in zip(spec.names, sources, strict=True):
        if adapter.nonfinite:
            raise PlanError(f"{name}: {adapter.nonfinite} holds NaN or infinity")
    said = _Said.by(spec, sources)
    header, notes = _header(sources)
    recipe = said.recipe
    build = (
        _factor_module if recipe.space == "factors" else _entry_module if recipe.entrywise else _delta_module
    )
    modules: dict[str, Module] = {}
    for module in sorted({name for adapter in sources for name in adapter.modules}):
        present = [i for i, adapter in enumerate(sources) if module in adapter.modules]
        _check_shapes(module, {said.names[i]: sources[i].modules[module] for i in present})
        modules[module] = build(said, module, sources, present, limit)
    counts = _whole_counts(said, modules)
    notes += _missing_notes(spec, sources, len(modules)) + _result_notes(said, modules, counts)
    return MergePlan(spec, recipe, header, modules, tuple(sources), tuple(notes), counts)


def check_names(spec: MergeSpec, known: Collection[str]) -> None:
    """Raise UnknownAdapterError where the spec names a source that is not known."""
    missing = [name for name in spec.names if name not in known]
    if missing:
        way_out = f"known: {listed(sorted(known))}" if known else "none is known"
        raise UnknownAdapterError(f"unknown adapter {listed(repr(name) for name in missing)}; {way_out}")


@dataclass(frozen=True)
class _Said:
    """What a spec says, read once for all modules.  None where its strategy takes no such option."""

    strategy: str
    recipe: Recipe
    names: tuple[str, ...]
    weights: tuple[float, ...]
    auto: Mapping[str, tuple[float, ...]] | None
    scale: float
    densities: tuple[float, ...] | None
    gammas: tuple[float, ...] | None
    epsilons: tuple[float, ...] | None
    select: float | None
    seed: Value | None
    rank: int | None
    t: float | None
    lorax: bool
    whole: bool
    vote: Vote | None

    def weights_of(self, module: str, present: Sequence[int]) -> tuple[float, ...]:
        """The weights of those sources that have a module."""
        return tuple(self.weights[i] for i in present) if self.auto is None else self.auto[module]

    @classmethod
    def by(cls, spec: MergeSpec, sources: Sequence[Adapter]) -> _Said:
        strategy = find(spec.strategy)
        rank, t, select = (spec.option(name) for name in ("rank", "t", "select_topk"))
        vote, blend = None, strategy.recipe.blend
        if blend == "agreeing_mean":
            vote = Vote(
                frequency=spec.option("majority_sign_method") == "frequency",
                # Balanced deltas vote with their new lengths; trimming does not know the difference.
                weighted=spec.option("elect") == "weighted" or spec.automatic,
            )
        if blend == "energy_mean":
            vote = Vote(frequency=False, weighted=False, energy=True)

        def shares(name: str) -> tuple[float, ...] | None:
            return spec.per_source(name) if strategy.option(name) else None

        return cls(
            strategy=strategy.name,
            recipe=strategy.recipe,
            names=spec.names,
            weights=spec.weights(),
            auto=auto_weights(sources, blend == "sum") if spec.automatic else None,
            scale=float(spec.option("scale")),  # type: ignore[arg-type]
            densities=shares("density"),
            gammas=shares("gamma"),
            epsilons=shares("epsilon"),
            select=select if isinstance(select, float) and select < 1.0 else None,
            seed=spec.option("seed"),
            rank=rank if isinstance(rank, int) else None,
            t=t if isinstance(t, float) else None,
            lorax=spec.option("compat") == "lorax",
            whole=spec.option("scope") == "model",
            vote=vote,
        )


def _factor_module(
    said: _Said, module: str, sources: Sequence[Adapter], present: Sequence[int], limit: int | None
) -> FactorModule:
    factors = [sources[i].modules[module] for i in present]
    if len({f.rank for f in factors}) > 1:
        ranks = {said.names[i]: f.rank for i, f in zip(present, factors, strict=True)}
        others = [s.name for s in TABLE.values() if s.recipe.space != "factors"]
        raise PlanError(
            f"{said.strategy} needs equal ranks, but {module} has "
            f"{listed(f'{rank} in {name}' for name, rank in ranks.items())}; "
            f"these strategies take different ranks: {', '.join(others)}"
        )
    if limit is not None and factors[0].rank > limit:
        raise PlanError(f"{module} has rank {factors[0].rank}, the limit is {limit}; svd can reduce the rank")
    jobs = []
    both = _factor_weights(
        said.lorax, said.scale, said.weights_of(module, present), tuple(f.scaling for f in factors)
    )
    for side, weights in zip("ab", both, strict=True):
        inputs = tuple(f.a if side == "a" else f.b for f in factors)
        rule = _rule(said, weights, sources, present, module, side, inputs[0].numel())
        jobs.append(FactorJob(inputs, rule, promoted([t.dtype for t in inputs])))
    return FactorModule(jobs[0], jobs[1], tuple(present), factors[0].embedding)


@functools.lru_cache(1024)  # most modules of an adapter have one scaling
def _factor_weights(
    lorax: bool, scale: float, weights: tuple[float, ...], scalings: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What each source's A and B are multiplied with, as float32 values."""
    if lorax:
        # LoRAX puts the raw weight on each factor and applies the first adapter's scaling to the product.
        root = _signed_root(scale * scalings[0])
        a, b = [w * root for w in weights], [w * abs(root) for w in weights]
    else:
        a = [_signed_root(as_float32(scale * w * s)) for w, s in zip(weights, scalings, strict=True)]
        b = [abs(w) for w in a]
    return tuple(map(as_float32, a)), tuple(map(as_float32, b))


def _rule(
    said: _Said,
    weights: Sequence[float],
    sources: Sequence[Adapter],
    present: Sequence[int],
    module: str,
    side: str,
    size: int,
) -> Rule:
    """How tensors of ``size`` entries are combined, those of the present sources."""
    # Where only one source has the module there is nothing that its entries could differ from.
    select = int(said.select * size) if said.select is not None and len(present) > 1 else None
    keeps = tuple([_keep(said, i, size, sources[i], module, side) for i in present])
    return Rule(tuple(weights), keeps, said.vote, select)


_ALL = Keep()


def _keep(said: _Said, index: int, size: int, source: Adapter, module: str, side: str) -> Keep:
    rule = said.recipe.keep
    if rule in ("all", "varied") or said.densities is None or said.whole:
        return _ALL
    density = said.densities[index]
    if density == 1.0 and rule not in ("random", "graded"):
        return _ALL
    if rule == "largest":
        return _largest(int(density * size), 0)
    if rule == "middle" and said.gammas is not None:
        count = int(density * size)
        return _largest(count, min(int(said.gammas[index] * size), size - count))
    identity = f"{said.seed}\0{source.digest}\0{module}\0{side}"
    key = int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "little")
    share, spread = _drawn(density, None if said.epsilons is None else said.epsilons[index])
    return Keep(share=share, key=key, spread=spread)


def _drawn(density: float, epsilon: float | None) -> tuple[int, int]:
    """The share of entries kept at random and its spread within a row, both in 65536ths."""
    spread = 0 if epsilon is None or density == 1.0 else round(epsilon * SHARES)
    return max(1, round(density * SHARES)), spread


def amplification(spec: MergeSpec) -> float:
    """The largest factor by which the spec itself multiplies an entry of a source's delta.

    It covers weights, ``scale`` and the rescaling of entries kept at random. What the strategy makes of the
    adapters' own lengths and angles is not in it.
    """
    strategy = find(spec.strategy)
    rescales = [1.0] * len(spec.sources)
    if strategy.recipe.keep in ("random", "graded"):
        epsilons = spec.per_source("epsilon") if strategy.option("epsilon") else (None,) * len(spec.sources)
        drawn = [_drawn(d, e) for d, e in zip(spec.per_source("density"), epsilons, strict=True)]
        times = 2 if strategy.recipe.space == "factors" else 1  # A and B are rescaled each on its own
        rescales = [(SHARES / max(1, share - spread)) ** times for share, spread in drawn]
    power = 2 if spec.option("compat") == "lorax" else 1  # raw weights on both factors
    largest = max(abs(w) ** power * rescale for w, rescale in zip(spec.weights(), rescales, strict=True))
    return largest * abs(float(spec.option("scale")))  # type: ignore[arg-type]


@functools.lru_cache(1024)
def _largest(count: int, skip: int) -> Keep:
    return Keep(count=count, skip=skip)


def _delta_module(
    said: _Said, module: str, sources: Sequence[Adapter], present: Sequence[int], limit: int | None
) -> DeltaModule:
    rule, blend = said.recipe.rank, said.recipe.blend
    factors = tuple(sources[i].modules[module] for i in present)
    total = sum(f.rank for f in factors)
    rank = total
    if rule == "exact" and limit is not None and total > limit:
        raise PlanError(
            f"cat needs rank {total} for {module}, the limit is {limit}; "
            "use sum, which approximates, or raise the limit"
        )
    if rule == "fit" and limit is not None:
        rank = min(total, limit)
    if rule == "truncate":
        rank = min(total, _rank_asked(said, factors, limit))
    given = said.weights_of(module, present)
    relative = blend in MEANS
    weights = tuple(
        as_float32(said.scale * (1.0 if relative else w) * f.scaling)
        for w, f in zip(given, factors, strict=True)
    )
    mean = None
    if relative:
        mean = Mean("slerp" if blend == "nuslerp" else blend, given, len(sources))
        if blend == "karcher" and abs(math.fsum(given)) <= 1e-6 * math.fsum(map(abs, given)):
            raise PlanError(
                f"the weights of those sources that have {module} add up to 0, and karcher divides by that; "
                "change the weights"
            )
    if blend == "slerp" and said.t is not None:
        shares = (1.0 - said.t, said.t)
        mean = Mean("slerp", tuple(shares[i] for i in present), len(sources))
    if mean is not None and mean.rule == "slerp" and len(present) == 1:
        # The other source's delta is zero here, and the path to it is a straight line.
        weights, mean = (as_float32(weights[0] * mean.shares[0]),), None
    dtype = promoted([t.dtype for f in factors for t in (f.a, f.b)])
    return DeltaModule(factors, tuple(present), weights, rank, mean, dtype, factors[0].embedding)


def _entry_module(
    said: _Said, module: str, sources: Sequence[Adapter], present: Sequence[int], limit: int | None
) -> EntryModule:
    recipe = said.recipe
    factors = tuple(sources[i].modules[module] for i in present)
    rows, columns = factors[0].shape
    total = sum(f.rank for f in factors)
    if recipe.rank == "fit":
        rank = min(total, limit or total)
    else:
        # A merge of entries has no rank but that of its shape; one of coordinates has that of the bases.
        bound = min(rows, columns, total) if recipe.basis == "both" else min(rows, columns)
        rank = min(bound, _rank_asked(said, factors, limit))
    size = rows * columns
    if recipe.basis == "output":
        size = min(total, rows) * columns
    elif recipe.basis == "both":
        size = rank * rank
    given = said.weights_of(module, present)
    if said.auto is None:
        scalings, weights = tuple(f.scaling for f in factors), tuple(said.scale * w for w in given)
    else:
        # The deltas themselves are balanced, so that the weak ones are heard in a basis and in a vote.
        scalings = tuple(w * f.scaling for w, f in zip(given, factors, strict=True))
        weights = (said.scale,) * len(factors)
    return EntryModule(
        sources=factors,
        present=tuple(present),
        scalings=tuple(map(as_float32, scalings)),
        rule=_rule(said, tuple(map(as_float32, weights)), sources, present, module, "delta", size),
        basis=recipe.basis,
        rank=rank,
        dtype=promoted([t.dtype for f in factors for t in (f.a, f.b)]),
        embedding=factors[0].embedding,
    )


def _rank_asked(said: _Said, factors: Sequence[Factors], limit: int | None) -> int:
    """The option ``rank``, or the largest of the sources' ranks within the limit."""
    if said.rank is not None and limit is not None and said.rank > limit:
        raise PlanError(
            f"rank={said.rank} is over the limit of {limit}; ask for a smaller rank or raise the limit"
        )
    largest = max(f.rank for f in factors)
    return min(largest, limit or largest) if said.rank is None else said.rank


def _whole_counts(said: _Said, modules: Mapping[str, Module]) -> tuple[int, ...] | None:
    """How many entries of each source are kept over all modules, where that is how they are counted."""
    if not said.whole or said.densities is None:
        return None
    sizes = [0] * len(said.names)
    for module in modules.values():
        if isinstance(module, EntryModule):
            for i in module.present:
                sizes[i] += math.prod(module.entries)
    return tuple(int(density * size) for density, size in zip(said.densities, sizes, strict=True))


def _header(sources: Sequence[Adapter]) -> tuple[Header, list[str]]:
    headers = [adapter.header for adapter in sources]
    if len({h.fan_in_fan_out for h in headers}) > 1:
        raise PlanError("the sources disagree about fan_in_fan_out: they were trained on different layouts")
    notes = []
    bases = sorted({h.base_model for h in headers if h.base_model})
    if len(bases) > 1:
        notes.append(f"the sources name different base models: {listed(bases)}")
    tasks = {h.task_type for h in headers if h.task_type}
    return Header(
        base_model=bases[0] if bases else None,
        task_type=tasks.pop() if len(tasks) == 1 else None,
        fan_in_fan_out=headers[0].fan_in_fan_out,
    ), notes


def _check_shapes(module: str, factors: Mapping[str, Factors]) -> None:
    shapes = {name: (f.shape, f.embedding) for name, f in factors.items()}
    if len(set(shapes.values())) > 1:
        found = listed(f"{shape} in {name}" for name, (shape, _) in shapes.items())
        raise PlanError(f"{module} has delta shapes {found}: these adapters belong to different base models")


def _result_notes(said: _Said, modules: Mapping[str, Module], counts: tuple[int, ...] | None) -> list[str]:
    notes = []
    largest = max((module.results[0][0][0] for module in modules.values()), default=0)
    if said.rank is not None and largest < said.rank:
        notes.append(f"rank={said.rank} is more than there is to keep: the result has rank {largest}")
    if all(map(_is_zero, modules.values())) or (counts is not None and not any(counts)):
        notes.append("the merge is zero: its weights, scale or density leave nothing")
    return notes


def _is_zero(module: Module) -> bool:
    """Whether nothing is kept, or all of it is multiplied by 0."""
    if isinstance(module, DeltaModule):
        return not any(module.weights)
    rules = (module.a.rule, module.b.rule) if isinstance(module, FactorModule) else (module.rule,)
    return any(
        rule.select == 0
        or all(not weight or keep.count == 0 for weight, keep in zip(rule.weights, rule.keeps, strict=True))
        for rule in rules
    )


def _missing_notes(spec: MergeSpec, sources: Sequence[Adapter], total: int) -> list[str]:
    return [
        f"{total - len(adapter.modules)} of {total} modules are not in {name}; "
        "they are merged from the other sources"
        for name, adapter in zip(spec.names, sources, strict=True)
        if len(adapter.modules) < total
    ]


def _signed_root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value) if value else 0.0
