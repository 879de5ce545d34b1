"""From jobs and rules to tables of addresses for the compiled loops, and a pool of threads to run them."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from merged_lora.backends import Progress
from merged_lora.plan import FactorJob, Keep, Rule, Vote

from . import kernels

Integers = NDArray[np.int64]
Item = TypeVar("Item")
Made = TypeVar("Made")

KINDS = {torch.bfloat16: kernels.BF16, torch.float16: kernels.FP16, torch.float32: kernels.FP32}
BATCHES_PER_CORE = 4  # enough to even out the load, few enough that handing them out costs nothing
COPY_BYTES = 64 << 20  # of the float32 copies that rules which are not simple work on
UNKNOWN = np.zeros((0, 2), np.int64)
EVERYTHING = (0, 1 << 62)
"""The pair ``(thr, cut)`` that keeps every entry."""


class Combiner:
    """Runs the compiled loops on every core."""

    def __init__(self) -> None:
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._pool = _start_pool(self.cores)

    def merge(
        self, jobs: Sequence[FactorJob], progress: Progress, known: Sequence[Integers] = ()
    ) -> list[torch.Tensor]:
        """The merged tensor of every job, all of one strategy; progress is told in tensors.

        known: per job ``(thr, cut)`` of each input ``[inputs, 2]``, used instead of the counts.
        """
        if not jobs:
            return []
        if all(job.rule.simple for job in jobs):
            return self._merge(jobs, [1.0] * sum(len(job.inputs) for job in jobs), progress, known)
        outputs: list[torch.Tensor] = []
        for some in batches(jobs, _copied_bytes, COPY_BYTES):
            prepared = self.each(prepare, some)
            coefficients = [c for _, given in prepared for c in given]
            outputs += self._merge([job for job, _ in prepared], coefficients, progress, ())
        return outputs

    def _merge(
        self,
        jobs: Sequence[FactorJob],
        coefficients: Sequence[float],
        progress: Progress,
        known: Sequence[Integers],
    ) -> list[torch.Tensor]:
        """The same in one go.  coefficients: in an energy mean, of every input of every job."""
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
            np.concatenate(known) if known else UNKNOWN,
        )
        self.run(size * counts, lambda some: kernels.combine_tensors(some, *table), progress)
        return outputs

    def each(self, function: Callable[[Item], Made], items: Sequence[Item], /) -> list[Made]:
        """What a function makes of every item, on every core, in the inference mode of the caller."""
        # The mode is a thread's own, and tensors made in it, as in a server, must not be written to outside.
        mode = torch.is_inference_mode_enabled()

        def call(item: Item) -> Made:
            with torch.inference_mode(mode):
                return function(item)

        return list(self._pool.map(call, items))

    def run(self, cost: Integers, work: Callable[[Integers], None], progress: Progress) -> None:
        """Call ``work`` on batches of item indices of about equal cost, on every core."""
        count = min(len(cost), self.cores * BATCHES_PER_CORE)
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


def _start_pool(cores: int) -> ThreadPoolExecutor:
    """Threads in each of which torch uses one core, as they are one for each core already.

    With more, torch's helpers of every one would spin on the cores that the others need.
    """
    # torch keeps a number for each thread, but the first operation of one sets it to the last that was set in
    # any: so each is asked before another sets its own, and what was the last one is put back.
    before = torch.get_num_threads()
    started = threading.Barrier(cores)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()
        started.wait()

    pool = ThreadPoolExecutor(cores, "merged-lora", start)
    wait([pool.submit(int) for _ in range(cores)])
    torch.set_num_threads(before)
    return pool


def batches(items: Iterable[Item], nbytes: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Items in their order, those of a batch of ``limit`` bytes together at most, or a single one."""
    batch: list[Item] = []
    size = 0
    for item in items:
        here = nbytes(item)
        if batch and size + here > limit:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += here
    if batch:
        yield batch


def _copied_bytes(job: FactorJob) -> int:
    return 4 * sum(x.numel() for x in job.inputs)


def source_tables(rules: Sequence[Rule], coefficients: Sequence[float]) -> tuple[Any, ...]:
    """What ``combine_tensors`` takes from ``weight`` to ``weighted``, for rules of one strategy."""
    keeps = [keep for rule in rules for keep in rule.keeps]
    vote = rules[0].vote
    return (
        np.array([w for rule in rules for w in rule.weights], np.float32),
        np.array([kernels.KEEP_ALL if keep.count is None else keep.count for keep in keeps]),
        np.array([kernels.NO_DRAW if keep.share is None else keep.share for keep in keeps]),
        np.array([keep.key or 0 for keep in keeps], np.uint64),
        np.array([keep.rescale for keep in keeps], np.float32),
        np.array(coefficients, np.float32),
        blend(vote),
        vote is not None and vote.weighted,
    )


def blend(vote: Vote | None) -> int:
    """The word of ``combine_tensors`` for how entries are blended."""
    if vote is None:
        return kernels.SUM
    if vote.energy:
        return kernels.VOTE_ENERGY
    return kernels.VOTE_FREQUENCY if vote.frequency else kernels.VOTE_TOTAL


def addresses(tensors: Sequence[torch.Tensor]) -> Integers:
    """Where the tensors begin."""
    return np.array([tensor.data_ptr() for tensor in tensors], np.int64)


def prepare(job: FactorJob) -> tuple[FactorJob, Sequence[float]]:
    """The same job on float32 copies that hold what is kept, and the coefficients of its energy mean."""
    rule = job.rule
    values = tuple([x.to(torch.float32, copy=True).contiguous() for x in job.inputs])
    size = values[0].numel()
    bins = np.zeros(2 * kernels.BINS, np.uint32)

    def threshold(x: torch.Tensor, count: int) -> tuple[int, int]:
        return kernels.find_threshold(x.data_ptr(), size, kernels.FP32, count, bins)  # type: ignore[no-any-return]

    for x, keep in zip(values, rule.keeps, strict=True):
        if keep.share is not None:
            rows, columns = x.shape
            kernels.keep_graded(
                x.data_ptr(), rows, columns, 0, keep.share, keep.spread, np.uint64(keep.key or 0)
            )
        elif keep.count is not None:
            low, high = threshold(x, keep.skip + keep.count), threshold(x, keep.skip)
            kernels.keep_between(x.data_ptr(), size, *low, *high)
    if rule.select is not None:
        score = torch.empty_like(values[0])
        kernels.deviations(addresses(values), size, score.data_ptr())
        pair = threshold(score, rule.select)
        for x in values:
            kernels.keep_where(x.data_ptr(), size, score.data_ptr(), *pair)
    coefficients = [1.0] * len(values)
    if rule.vote is not None and rule.vote.energy:
        exponent = math.frexp(max(float(x.abs().max()) for x in values))[1]
        bits = 62 - max(size - 1, 1).bit_length()
        coefficients = energy_shares(
            [kernels.sum_squares(x.data_ptr(), size, exponent, bits) for x in values]
        )
    return FactorJob(values, Rule(rule.weights, (Keep(),) * len(values), rule.vote), job.dtype), coefficients


def energy_shares(squares: Sequence[float]) -> list[float]:
    """Each one's share of the sum, equal shares where that is zero."""
    total = sum(squares)
    return [one / total if total else 1.0 / len(squares) for one in squares]


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
