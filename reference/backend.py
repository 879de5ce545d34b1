"""The backend ``numpy``: follows a plan with the reference functions, one module after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from merged_lora.backends import Progress, Result, no_progress
from merged_lora.factors import Factors, bits
from merged_lora.plan import (
    AgreeingMean,
    All,
    DeltaModule,
    EnergyMean,
    EntryModule,
    FactorJob,
    FactorModule,
    Graded,
    Important,
    Keep,
    Largest,
    LargestInModel,
    MergePlan,
    Middle,
    OutputModule,
    Random,
    Rule,
    Sum,
    SumModule,
    Varied,
)

from . import delta, entries
from .numbers import STORAGE, Array, narrow, widen

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class NumpyBackend:
    """Slow and plain; what the other backends are measured against."""

    name = "numpy"

    def warm_up(self, dtype: torch.dtype) -> None:
        """See :class:`merged_lora.backends.Backend`; nothing is compiled here."""

    def confine(self, threads: int, nice: int) -> None:
        """See :class:`merged_lora.backends.Backend`; does nothing, because this has no threads of its own."""

    def make_room(self, progress: Progress) -> None:
        """See :class:`merged_lora.backends.Backend`; does nothing, because a merge takes seconds."""

    def merge(self, plan: MergePlan, progress: Progress = no_progress) -> Result:
        """See :class:`merged_lora.backends.Backend`."""
        modules: dict[str, Factors] = {}
        energy: dict[str, tuple[float, float]] = {}
        kept_in_model = _whole_model(plan)
        for name, module in plan.modules.items():
            if isinstance(module, FactorModule):
                modules[name] = Factors(_merge_job(module.a), _merge_job(module.b), 1.0, module.embedding)
            else:
                if isinstance(module, SumModule):
                    modules[name], cut = _merge_delta(module)
                elif isinstance(module, OutputModule):
                    modules[name], cut = _merge_outputs(module)
                else:
                    modules[name], cut = _merge_entries(module, kept_in_model.get(name))
                if cut is not None:
                    energy[name] = cut
            progress(1)
        return Result(modules, energy)


def load() -> NumpyBackend:
    """The backend."""
    return NumpyBackend()


def to_bits(tensor: torch.Tensor) -> tuple[Array, str]:
    """The bit patterns of a tensor, and the name of its dtype."""
    name = _NAMES[tensor.dtype]
    return bits(tensor).numpy().view(STORAGE[name]), name


def from_bits(words: Array, dtype: torch.dtype) -> torch.Tensor:
    """The tensor that these bit patterns store."""
    return torch.from_numpy(np.ascontiguousarray(words).view(f"i{words.itemsize}")).view(dtype)


def _merge_job(job: FactorJob) -> torch.Tensor:
    values = [widen(*to_bits(tensor)) for tensor in job.inputs]
    merged = combine(values, job.rule, np.float32)
    return from_bits(narrow(merged, _NAMES[job.dtype]), job.dtype)


def combine(values: Sequence[Array], rule: Rule, number: type[Any]) -> Array:
    """The merged values of a rule, whose every operation rounds to ``number`` (float32 or float64).

    values: of every source ``[rows, columns]``.
    """
    kept = kept_values([x.astype(number) for x in values], rule.keeps)
    match rule.blend:
        case Sum():
            return entries.weighted_sum(kept, rule.weights)
        case AgreeingMean(frequency, weighted):
            return entries.agreeing_mean(kept, rule.weights, frequency, weighted)
        case EnergyMean():
            return entries.agreeing_mean(kept, rule.weights, energy=True)


def kept_values(values: Sequence[Array], keeps: Sequence[Keep]) -> list[Array]:
    """The values of every source, with 0 for the entries that are not kept."""
    if isinstance(keeps[0], Varied):
        return entries.keep_varied(values, keeps[0].count)
    return [_keep(x, keep) for x, keep in zip(values, keeps, strict=True)]


def _keep(values: Array, keep: Keep) -> Array:
    match keep:
        case All() | LargestInModel():  # the latter are chosen for the whole model before
            return values
        case Largest(count):
            return entries.keep_largest(values, count)
        case Middle(count, skip):
            return entries.keep_largest(values, count, skip)
        case Important():
            return entries.keep_important(values)
        case Random(share, key):
            return entries.keep_random(values, share, key)
        case Graded(share, key, spread):
            return entries.keep_random(values, share, key, spread)
    raise TypeError(f"the reference has no rule for {keep}")


def _merge_delta(module: SumModule) -> tuple[Factors, tuple[float, float] | None]:
    pairs = _factor_pairs(module)
    total = sum(f.rank for f in module.sources)
    exact = module.rank == total and not module.flat
    if module.mean is None and exact:
        dtype = _NAMES[module.dtype]
        a = np.concatenate(
            [narrow(a * np.float32(w), dtype) for (a, _), w in zip(pairs, module.weights, strict=True)]
        )
        b = np.concatenate([narrow(b, dtype) for _, b in pairs], axis=1)
        return Factors(from_bits(a, module.dtype), from_bits(b, module.dtype), 1.0, module.embedding), None
    deltas = delta.dense(pairs, module.weights)
    if module.mean is None:
        target = np.asarray(np.sum(deltas, axis=0))
    else:
        target = delta.MEANS[module.mean.rule](deltas, module.mean.shares, module.mean.count)
    flat = min(total, *target.shape) if module.flat else None
    new_a, new_b, energy = delta.truncate(target, module.rank, flat)
    return _factors(new_a, new_b, module), None if exact else energy


def _merge_outputs(module: OutputModule) -> tuple[Factors, tuple[float, float] | None]:
    inputs = [
        (i.values.double().numpy(), i.vectors.double().numpy(), i.rest.double().numpy())
        for i in module.inputs
    ]
    a, b, energy = delta.fitted(
        _factor_pairs(module), inputs, module.scalings, module.weights, module.shrink, module.rank
    )
    exact = module.rank == sum(f.rank for f in module.sources)
    return _factors(a, b, module), None if exact else energy


def _merge_entries(
    module: EntryModule, chosen: Sequence[Array] | None
) -> tuple[Factors, tuple[float, float] | None]:
    """The factors of a module merged entry by entry, and its energy if the rank was cut.

    chosen: the entries of each source that are kept, if they are counted over the whole model.
    """
    deltas = delta.dense(_factor_pairs(module), module.scalings)
    if module.basis is None:
        merged = combine(deltas, module.rule, np.float64)
        new_a, new_b, energy = delta.truncate(merged, module.rank)
        return _factors(new_a, new_b, module), energy
    if module.basis == "both":
        left, right = delta.both_bases(deltas, module.rank)
        coordinates = [left.T @ x @ right for x in deltas]
        squares = np.square(module.rule.weights)
        kept, asked = (float(squares @ [np.sum(x * x) for x in xs]) for xs in (coordinates, deltas))
        return _factors(combine(coordinates, module.rule, np.float64) @ right.T, left, module), (kept, asked)
    coordinates = _in_output_basis(module)
    if chosen is not None:
        coordinates = [np.where(mask, x, 0.0) for mask, x in zip(chosen, coordinates, strict=True)]
    left = delta.output_basis(deltas, module.entries[0])
    merged = combine(coordinates, module.rule, np.float64)
    new_a, new_b, energy = delta.truncate(left @ merged, module.rank)
    return _factors(new_a, new_b, module), energy if module.rank < module.entries[0] else None


def _in_output_basis(module: EntryModule) -> list[Array]:
    deltas = delta.dense(_factor_pairs(module), module.scalings)
    left = delta.output_basis(deltas, module.entries[0])
    return [left.T @ x for x in deltas]


def _whole_model(plan: MergePlan) -> dict[str, list[Array]]:
    """The entries of each source that are kept, by module, if they are counted over all modules."""
    if plan.counts is None:
        return {}
    modules = {name: m for name, m in plan.modules.items() if isinstance(m, EntryModule)}
    values = {name: dict(zip(m.present, _in_output_basis(m), strict=True)) for name, m in modules.items()}
    masks: dict[str, list[Array]] = {name: [] for name in modules}
    for i, count in enumerate(plan.counts):
        own = {name: x[i] for name, x in values.items() if i in x}
        chosen = entries.largest(
            np.concatenate([x.reshape(-1) for x in own.values()] or [np.zeros(0)]), count
        )
        start = 0
        for name, x in own.items():
            masks[name].append(chosen[start : start + x.size].reshape(x.shape))
            start += x.size
    return masks


def _factor_pairs(module: DeltaModule) -> list[delta.FactorPair]:
    return [(widen(*to_bits(f.a)), widen(*to_bits(f.b))) for f in module.sources]


def _factors(a: Array, b: Array, module: DeltaModule) -> Factors:
    new_a, new_b = (torch.from_numpy(np.ascontiguousarray(x)).to(module.dtype) for x in (a, b))
    return Factors(new_a, new_b, 1.0, module.embedding)
