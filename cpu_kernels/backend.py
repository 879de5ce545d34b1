"""The backend ``cpu``: lays a plan out as tables of addresses and runs the compiled loops on every core."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
import torch
from numpy.typing import NDArray

from merged_lora.backends import Progress, Result
from merged_lora.factors import Factors
from merged_lora.lowrank import merge_module
from merged_lora.plan import FactorJob, FactorModule, MergePlan

from . import kernels

_KINDS = {torch.bfloat16: kernels.BF16, torch.float16: kernels.FP16, torch.float32: kernels.FP32}
_BATCHES_PER_CORE = 4  # enough to even out the load, few enough that handing them out costs nothing


class CpuBackend:
    """Merges in one compiled loop over all tensors, cut into batches for a pool of threads."""

    name = "cpu"

    def __init__(self) -> None:
        self._cores = (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )
        self._pool = ThreadPoolExecutor(self._cores, thread_name_prefix="merged-lora")

    def merge(self, plan: MergePlan, progress: Progress) -> Result:
        """See :class:`merged_lora.backends.Backend`."""
        modules: dict[str, Factors] = {}
        energy: dict[str, tuple[float, float]] = {}
        pairs = {name: module for name, module in plan.modules.items() if isinstance(module, FactorModule)}
        merged = self._merge_jobs([job for m in pairs.values() for job in (m.a, m.b)], progress)
        for i, (name, module) in enumerate(pairs.items()):
            modules[name] = Factors(merged[2 * i], merged[2 * i + 1], 1.0, module.embedding)
        for name, other in plan.modules.items():
            if not isinstance(other, FactorModule):
                result = merge_module(other)
                modules[name] = result.factors
                if result.energy is not None:
                    energy[name] = result.energy
                progress(1)
        return Result(modules, energy)

    def _merge_jobs(self, jobs: Sequence[FactorJob], progress: Progress) -> list[torch.Tensor]:
        if not jobs:
            return []
        inputs = [tensor.contiguous() for job in jobs for tensor in job.inputs]
        keeps = [keep for job in jobs for keep in job.keeps]
        counts = np.array([len(job.inputs) for job in jobs])
        outputs = _new_tensors([(job.inputs[0].shape, job.dtype) for job in jobs])
        size = np.array([t.numel() for t in outputs])

        vote = jobs[0].vote
        rule = (
            kernels.SUM if vote is None else kernels.VOTE_FREQUENCY if vote.frequency else kernels.VOTE_TOTAL
        )
        table = (
            _addresses(outputs),
            np.array([_KINDS[t.dtype] for t in outputs]),
            size,
            np.cumsum(counts) - counts,
            counts,
            _addresses(inputs),
            np.array([_KINDS[t.dtype] for t in inputs]),
            np.array([w for job in jobs for w in job.weights], np.float32),
            np.array([kernels.KEEP_ALL if keep.count is None else keep.count for keep in keeps]),
            np.array([kernels.NO_DRAW if keep.share is None else keep.share for keep in keeps]),
            np.array([keep.key or 0 for keep in keeps], np.uint64),
            np.array([keep.rescale for keep in keeps], np.float32),
            rule,
            vote is not None and vote.weighted,
        )
        self._run(size * counts, lambda some: kernels.combine_tensors(some, *table), _halved(progress))
        return outputs

    def _run(
        self, cost: NDArray[np.int64], work: Callable[[NDArray[np.int64]], None], progress: Progress
    ) -> None:
        """Call ``work`` on batches of item indices of about equal cost, on every core."""
        count = min(len(cost), self._cores * _BATCHES_PER_CORE)
        batches: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for item in np.argsort(-cost, kind="stable").tolist():
            lightest = loads.index(min(loads))
            batches[lightest].append(item)
            loads[lightest] += int(cost[item])
        futures = {self._pool.submit(work, np.array(batch)): len(batch) for batch in batches}
        for future in as_completed(futures):
            future.result()
            progress(futures[future])


def load() -> CpuBackend:
    """The backend; numba keeps its compiled loops on disk, so only the first use ever waits for them."""
    return CpuBackend()


def _halved(progress: Progress) -> Progress:
    """Progress in modules, told in tensors: two make a module."""
    done = 0

    def tell(tensors: int) -> None:
        nonlocal done
        before, done = done, done + tensors
        progress(done // 2 - before // 2)

    return tell


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


def _addresses(tensors: Sequence[torch.Tensor]) -> NDArray[np.int64]:
    return np.array([tensor.data_ptr() for tensor in tensors], np.int64)
