"""What will be computed, with every number decided, before anything is.

A plan holds the sources' tensors untouched and, for each module, a job with exact scalars: weights,
kept counts, random keys.  Backends follow it to the letter; that is why they can agree to the bit.
"""

from __future__ import annotations

import functools
import hashlib
import math
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from .adapters import Adapter
from .errors import PlanError, UnknownAdapterError, listed
from .factors import Factors, promoted
from .peft_files import Header
from .recipe import Recipe, Value
from .spec import MergeSpec
from .strategies import TABLE, find

SHARES = 65536
"""Random masks compare 16-bit draws, so a share is a whole number of 65536ths."""


@dataclass(frozen=True)
class Keep:
    """Which entries of an input take part: its ``count`` largest, or ``share`` of 65536 at random."""

    count: int | None = None
    share: int | None = None
    key: int | None = None

    @property
    def rescale(self) -> float:
        """What a random share is multiplied by, so that the mean stays; a float32 value."""
        return 1.0 if self.share is None else _float32(SHARES / self.share)


@dataclass(frozen=True)
class Vote:
    """How signs are elected: by count instead of by sum, and on weighted instead of plain values."""

    frequency: bool
    weighted: bool


@dataclass(frozen=True, eq=False)
class FactorJob:
    """One result tensor in ``factors`` space: same-shaped inputs, combined entry by entry.

    inputs: tensors of one shape.  weights: one float32 value per input.  keeps: one per input.
    vote: None for the weighted sum, else the mean of those that agree with the elected sign.
    """

    inputs: tuple[torch.Tensor, ...]
    weights: tuple[float, ...]
    keeps: tuple[Keep, ...]
    vote: Vote | None
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
    def results(self) -> tuple[tuple[tuple[int, int], torch.dtype], ...]:
        """Shape and dtype of the merged A and B."""
        return tuple(
            ((job.inputs[0].shape[0], job.inputs[0].shape[1]), job.dtype) for job in (self.a, self.b)
        )


@dataclass(frozen=True, eq=False)
class DeltaModule:
    """A module merged in ``delta`` space: ``sum_i weights[i] * B_i A_i`` in at most ``rank`` dimensions.

    weights hold the sources' scalings.  slerp: position between the two sources, None elsewhere.
    present: indices into the plan's sources of those that have the module, in the order of ``sources``.
    """

    sources: tuple[Factors, ...]
    present: tuple[int, ...]
    weights: tuple[float, ...]
    rank: int
    slerp: float | None
    dtype: torch.dtype
    embedding: bool

    @property
    def results(self) -> tuple[tuple[tuple[int, int], torch.dtype], ...]:
        """Shape and dtype of the merged A and B."""
        rows, columns = self.sources[0].shape
        return ((self.rank, columns), self.dtype), ((rows, self.rank), self.dtype)


@dataclass(frozen=True, eq=False)
class MergePlan:
    """A merge ready to run: its spec, its recipe, one entry per module, and what the user should know.

    sources: the adapters in the order of ``spec.names``.
    """

    spec: MergeSpec
    recipe: Recipe
    header: Header
    modules: Mapping[str, FactorModule | DeltaModule]
    sources: tuple[Adapter, ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        results = [result for module in self.modules.values() for result in module.results]
        return sum(rows * columns * dtype.itemsize for (rows, columns), dtype in results)

    @property
    def digests(self) -> dict[str, str]:
        """Content digest of every source, by name."""
        return {name: adapter.digest for name, adapter in zip(self.spec.names, self.sources, strict=True)}


def make_plan(spec: MergeSpec, adapters: Mapping[str, Adapter], limit: int | None = None) -> MergePlan:
    """The plan of a merge; raises PlanError or UnknownAdapterError where it cannot be done.

    adapters: by source name; further ones are ignored.  limit: largest rank of the result, None for any.
    """
    check_names(spec, adapters)
    sources = [adapters[name] for name in spec.names]
    for name, adapter in zip(spec.names, sources, strict=True):
        if adapter.nonfinite:
            raise PlanError(f"{name}: {adapter.nonfinite} holds NaN or infinity")
    said = _Said.by(spec)
    header, notes = _header(sources)
    build = _factor_module if said.recipe.space == "factors" else _delta_module
    modules: dict[str, FactorModule | DeltaModule] = {}
    for module in sorted({name for adapter in sources for name in adapter.modules}):
        present = [i for i, adapter in enumerate(sources) if module in adapter.modules]
        _check_shapes(module, {said.names[i]: sources[i].modules[module] for i in present})
        modules[module] = build(said, module, sources, present, limit)
    notes += _missing_notes(spec, sources, len(modules))
    return MergePlan(spec, said.recipe, header, modules, tuple(sources), tuple(notes))


def overflow(spec: MergeSpec, module: str) -> PlanError:
    """What to raise where a module's merged factors are larger than their dtype can hold."""
    return PlanError(f"{spec}: the result overflows its dtype in {module}; use smaller weights")


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
    scale: float
    densities: tuple[float, ...] | None
    seed: Value | None
    rank: int | None
    t: float | None
    lorax: bool
    vote: Vote | None

    @classmethod
    def by(cls, spec: MergeSpec) -> _Said:
        strategy = find(spec.strategy)
        rank, t = spec.option("rank"), spec.option("t")
        vote = None
        if strategy.recipe.blend == "agreeing_mean":
            vote = Vote(
                spec.option("majority_sign_method") == "frequency", spec.option("elect") == "weighted"
            )
        return cls(
            strategy=strategy.name,
            recipe=strategy.recipe,
            names=spec.names,
            weights=spec.weights(),
            scale=float(spec.option("scale")),  # type: ignore[arg-type]
            densities=spec.per_source("density") if strategy.option("density") else None,
            seed=spec.option("seed"),
            rank=rank if isinstance(rank, int) else None,
            t=t if isinstance(t, float) else None,
            lorax=spec.option("compat") == "lorax",
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
        said.lorax, said.scale, tuple(said.weights[i] for i in present), tuple(f.scaling for f in factors)
    )
    for side, weights in zip("ab", both, strict=True):
        inputs = tuple(f.a if side == "a" else f.b for f in factors)
        keeps = tuple(
            [
                _keep(said, i, tensor, sources[i], module, side)
                for i, tensor in zip(present, inputs, strict=True)
            ]
        )
        jobs.append(FactorJob(inputs, weights, keeps, said.vote, promoted([t.dtype for t in inputs])))
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
        a = [_signed_root(_float32(scale * w * s)) for w, s in zip(weights, scalings, strict=True)]
        b = [abs(w) for w in a]
    return tuple(map(_float32, a)), tuple(map(_float32, b))


_ALL = Keep()


def _keep(said: _Said, index: int, tensor: torch.Tensor, source: Adapter, module: str, side: str) -> Keep:
    if said.recipe.keep == "all" or said.densities is None:
        return _ALL
    density = said.densities[index]
    if said.recipe.keep == "largest":
        return _largest(int(density * tensor.numel())) if density < 1.0 else _ALL
    identity = f"{said.seed}\0{source.digest}\0{module}\0{side}"
    key = hashlib.blake2b(identity.encode(), digest_size=8).digest()
    return Keep(share=max(1, round(density * SHARES)), key=int.from_bytes(key, "little"))


@functools.lru_cache(1024)
def _largest(count: int) -> Keep:
    return Keep(count=count)


def _delta_module(
    said: _Said, module: str, sources: Sequence[Adapter], present: Sequence[int], limit: int | None
) -> DeltaModule:
    rule = said.recipe.rank
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
        if said.rank is not None and limit is not None and said.rank > limit:
            raise PlanError(
                f"rank={said.rank} is over the limit of {limit}; ask for a smaller rank or raise the limit"
            )
        largest = max(f.rank for f in factors)
        rank = min(total, min(largest, limit or largest) if said.rank is None else said.rank)
    weights = tuple(
        _float32(said.scale * said.weights[i] * f.scaling) for i, f in zip(present, factors, strict=True)
    )
    slerp = None
    if said.recipe.blend == "slerp" and said.t is not None:
        slerp = said.t
        if len(present) == 1:  # the other source's delta is zero here, and the path to it is a straight line
            weights, slerp = (_float32(weights[0] * (slerp if present[0] else 1.0 - slerp)),), None
    dtype = promoted([t.dtype for f in factors for t in (f.a, f.b)])
    return DeltaModule(factors, tuple(present), weights, rank, slerp, dtype, factors[0].embedding)


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


def _missing_notes(spec: MergeSpec, sources: Sequence[Adapter], total: int) -> list[str]:
    return [
        f"{total - len(adapter.modules)} of {total} modules are not in {name}; "
        "they are merged from the other sources"
        for name, adapter in zip(spec.names, sources, strict=True)
        if len(adapter.modules) < total
    ]


def _signed_root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value) if value else 0.0


def _float32(value: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        raise PlanError(
            "weight, scaling and scale multiply to more than float32 can hold; make them smaller"
        ) from None
