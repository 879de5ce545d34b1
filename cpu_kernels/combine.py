"""From jobs and rules to tables of addresses for the compiled loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from merged_lora.backends import Progress
from merged_lora.plan import (
    AgreeingMean,
    All,
    Blend,
    EnergyMean,
    FactorJob,
    Keep,
    Largest,
    LargestInModel,
    Random,
    Rule,
    Sum,
)

from . import kernels
from .entries import addresses, energies_of, find_in, keep_entries
from .pool import Integers, Pool, batches

FUSED = (All, Largest, LargestInModel, Random), (Sum, AgreeingMean)
"""Keep rules and blends that ``combine_tensors`` does itself, for any mix of them."""
KINDS = {torch.bfloat16: kernels.BF16, torch.float16: kernels.FP16, torch.float32: kernels.FP32}
COPY_BYTES = 64 << 20  # of the float32 copies that keep rules beyond FUSED work on
NO_THRESHOLDS = np.zeros((0, 2), np.int64)


def combine(
    pool: Pool, jobs: Sequence[FactorJob], progress: Progress, thresholds: Sequence[Integers] = ()
) -> list[torch.Tensor]:
    """The merged tensor of every job, all of one strategy.

    progress:   called with the number of tensors finished since the last call.
    thresholds: for each job ``(value, cut)`` of each input ``[inputs, 2]``, used instead of the counts.
    """
    if not jobs:
        return []
    if all(job.rule.consists_of(*FUSED) for job in jobs):
        return _combine(pool, jobs, [1.0] * sum(len(job.inputs) for job in jobs), progress, thresholds)
    if thresholds:
        raise TypeError("given thresholds need rules that the compiled loops know")
    outputs: list[torch.Tensor] = []
    for batch in batches(jobs, _copied_bytes, COPY_BYTES):
        prepared = pool.each(_prepare, batch)
        coefficients = [c for _, given in prepared for c in given]
        outputs += _combine(pool, [job for job, _ in prepared], coefficients, progress, ())
    return outputs


def _combine(
    pool: Pool,
    jobs: Sequence[FactorJob],
    coefficients: Sequence[float],
    progress: Progress,
    thresholds: Sequence[Integers],
) -> list[torch.Tensor]:
    """The merged tensors by one table, for rules in FUSED or inputs whose entries are kept already.

    coefficients: of an energy mean, one for every input of every job.
    """
    inputs = [tensor.contiguous() for job in jobs for tensor in job.inputs]
    counts = np.array([len(job.inputs) for job in jobs])
    outputs = _new_tensors([(job.inputs[0].shape, job.dtype) for job in jobs])
    size = np.array([t.numel() for t in outputs])
    table = (
        addresses(outputs),
        np.array([KINDS[t.dtype] for t in outputs]),
        size,
        np.zeros_like(size),
        np.cumsum(counts) - counts,
        counts,
        addresses(inputs),
        np.array([KINDS[t.dtype] for t in inputs]),
        *source_tables([job.rule for job in jobs], coefficients),
        np.concatenate(thresholds) if thresholds else NO_THRESHOLDS,
    )
    pool.run(size * counts, lambda batch: kernels.combine_tensors(batch, *table), progress)
    return outputs


def source_tables(rules: Sequence[Rule], coefficients: Sequence[float]) -> tuple[Any, ...]:
    """The arguments of ``combine_tensors`` from ``weight`` to ``weighted``, for rules of one strategy."""
    counts, shares, keys, rescales = zip(*(_row(keep) for rule in rules for keep in rule.keeps), strict=True)
    blend = rules[0].blend
    return (
        np.array([w for rule in rules for w in rule.weights], np.float32),
        np.array(counts),
        np.array(shares),
        np.array(keys, np.uint64),
        np.array(rescales, np.float32),
        np.array(coefficients, np.float32),
        blend_code(blend),
        isinstance(blend, AgreeingMean) and blend.weighted,
    )


def _row(keep: Keep) -> tuple[int, int, int, float]:
    """Count, share, key and rescale of a keep rule that ``combine_tensors`` knows."""
    match keep:
        case All() | LargestInModel():  # thresholds are given for the latter
            return kernels.KEEP_ALL, kernels.NO_DRAW, 0, 1.0
        case Largest(count):
            return count, kernels.NO_DRAW, 0, 1.0
        case Random(share, key):
            return kernels.KEEP_ALL, share, key, keep.rescale
    raise TypeError(f"the compiled loops have no rule for {keep}")


def blend_code(blend: Blend) -> int:
    """The code of ``combine_tensors`` for how entries are blended."""
    match blend:
        case Sum():
            return kernels.SUM
        case EnergyMean():
            return kernels.VOTE_ENERGY
        case AgreeingMean(frequency):
            return kernels.VOTE_FREQUENCY if frequency else kernels.VOTE_TOTAL


def _prepare(job: FactorJob) -> tuple[FactorJob, Sequence[float]]:
    """The same job on float32 copies that hold the kept entries, and the coefficients of its energy mean."""
    rule = job.rule
    values = tuple([x.to(torch.float32, copy=True).contiguous() for x in job.inputs])
    buffer = torch.empty(values[0].numel())
    keep_entries(values, 0, rule.keeps, find_in(values, rule.keeps, buffer), buffer)
    coefficients = energies_of(values) if isinstance(rule.blend, EnergyMean) else [1.0] * len(values)
    return FactorJob(values, Rule(rule.weights, (All(),) * len(values), rule.blend), job.dtype), coefficients


def _copied_bytes(job: FactorJob) -> int:
    return 4 * sum(x.numel() for x in job.inputs)


def _new_tensors(kinds: Sequence[tuple[torch.Size, torch.dtype]]) -> list[torch.Tensor]:
    """Tensors without values; those of one dtype share a buffer, which takes a fraction of the time."""
    sizes: dict[torch.dtype, list[int]] = {}
    for shape, dtype in kinds:
        sizes.setdefault(dtype, []).append(shape.numel())
    parts = {
        dtype: iter(torch.split(torch.empty(sum(counts), dtype=dtype), counts))
        for dtype, counts in sizes.items()
    }
    return [next(parts[dtype]).view(shape) for shape, dtype in kinds]
