"""Two ways from a plan to what vLLM holds of a merge: tensors, or shapes and what a device has made.

Knows plans and backends and nothing of vLLM, whose objects are built by functions given at construction.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from merged_lora.adapters import Adapter
from merged_lora.backends import Backend, Progress, Result, SlotBackend, StagedMerge, no_progress
from merged_lora.engine import run, warn
from merged_lora.factors import Factors
from merged_lora.plan import MergePlan, Module

logger = logging.getLogger("vllm.merged_lora")

Model = TypeVar("Model")


@dataclass(frozen=True)
class Made(Generic[Model]):
    """A merge that was made.

    model:   what vLLM holds of it.
    result:  what the backend reported, without the tensors.
    rank:    largest rank of a module.
    modules: number of modules.
    nbytes:  bytes that ``model`` takes in host memory.
    """

    model: Model
    result: Result
    rank: int
    modules: int
    nbytes: int


class Maker(Protocol[Model]):
    """Makes what vLLM holds of a merge."""

    @property
    def backend(self) -> Backend:
        """The backend that merges."""
        ...

    def adopt(self, adapter: Adapter) -> Adapter:
        """The adapter in the memory that this maker needs, to be kept instead of the given one."""
        ...

    def make(self, number: int, plan: MergePlan, progress: Progress = no_progress) -> Made[Model]:
        """The merge, made and checked.  Raises MergeError if it cannot be made.

        number:   vLLM's id of it.
        plan:     its plan.
        progress: called with the number of modules finished since the last call; what it raises passes on.
        """
        ...


class HostMaker(Generic[Model]):
    """Merges into host tensors, which vLLM copies into a slot.

    backend: merges in host memory.
    build:   makes what vLLM holds from an id and an adapter; raises PlanError if vLLM would refuse it.
    size:    bytes of what was built.
    """

    def __init__(
        self, backend: Backend, build: Callable[[int, Adapter], Model], size: Callable[[Model], int]
    ) -> None:
        self.backend = backend
        self._build = build
        self._size = size

    def adopt(self, adapter: Adapter) -> Adapter:
        """The adapter as it is."""
        return adapter

    def make(self, number: int, plan: MergePlan, progress: Progress = no_progress) -> Made[Model]:
        """The whole merge."""
        merged = run(plan, self.backend.name, progress)
        model = self._build(number, merged.adapter)
        return _made(model, plan, merged.result, self._size(model))


class SlotMaker(Generic[Model]):
    """Merges on a device; vLLM holds shapes without values, and beside them the merge in host memory.

    backend: merges on the device.
    dtype:   of vLLM's slots.
    build:   makes what vLLM holds from an id and a plan; raises PlanError if vLLM would refuse the merge.
    equip:   gives it the merge, and compiles what brings that into a slot.
    """

    def __init__(
        self,
        backend: SlotBackend,
        dtype: torch.dtype,
        build: Callable[[int, MergePlan], Model],
        equip: Callable[[Model, StagedMerge], None],
    ) -> None:
        self.backend = backend
        self._dtype = dtype
        self._build = build
        self._equip = equip

    def adopt(self, adapter: Adapter) -> Adapter:
        """The adapter in page-locked memory."""
        return self.backend.adopt(adapter)

    def make(self, number: int, plan: MergePlan, progress: Progress = no_progress) -> Made[Model]:
        """The whole merge, so that nothing but copies is left for the step that activates it."""
        warn(plan.spec, plan.notes, logger)
        model = self._build(number, plan)
        staged = self.backend.stage(plan, self._dtype, progress)
        warn(plan.spec, staged.result.notes(), logger)
        self._equip(model, staged)
        return _made(model, plan, staged.result, staged.nbytes)


def _made(model: Model, plan: MergePlan, result: Result, nbytes: int) -> Made[Model]:
    rank = max(module.results[0][0][0] for module in plan.modules.values())
    reported = Result({}, result.energy, result.repeated)  # without the tensors, which the model has
    return Made(model, reported, rank, len(plan.modules), nbytes)


def outline(module: Module) -> Factors:
    """The shapes and dtypes of a module's result, without values: tensors on the device ``meta``."""
    a, b = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in module.results)
    return Factors(a, b, embedding=module.embedding)


def warm_up(backend: Backend, dtype: torch.dtype) -> None:
    """Let the backend compile what the usual merges need, and log how long that took."""
    start = time.perf_counter()
    backend.warm_up(dtype)
    logger.info("merge backend %s ready after %.1f s", backend.name, time.perf_counter() - start)
