"""Two ways from a plan to what vLLM holds of a merge: tensors in host memory, or shapes and a plan.

Knows plans and backends and nothing of vLLM, whose objects are built by functions given at construction.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch

from merged_lora.adapters import Adapter
from merged_lora.backends import Backend, Result, SlotBackend
from merged_lora.engine import run, warn
from merged_lora.factors import Factors
from merged_lora.plan import MergePlan, Module
from merged_lora.vllm_plugin.rpc import Facts

logger = logging.getLogger("vllm.merged_lora")

Model = TypeVar("Model")
Made = TypeVar("Made", covariant=True)


class Maker(Protocol[Made]):
    """Makes what vLLM holds of a merge.

    light: whether that takes next to no memory; then it is kept after it was loaded, for the next slot.
    """

    light: bool

    @property
    def backend(self) -> Backend:
        """The backend that merges."""
        ...

    def adopt(self, adapter: Adapter) -> Adapter:
        """The adapter in the memory that this maker needs, to be kept instead of the given one."""
        ...

    def prepare(self, number: int, plan: MergePlan) -> tuple[Made, Facts]:
        """The merge, made and checked, and the facts about it.  Raises MergeError if it cannot be made.

        number: vLLM's id of it.
        plan:   its plan.
        """
        ...

    def remake(self, number: int, plan: MergePlan) -> Made:
        """A merge that was prepared before."""
        ...


class HostMaker(Generic[Model]):
    """Merges into host tensors, which vLLM copies into a slot.

    backend: merges in host memory.
    build:   makes what vLLM holds from an id and an adapter; raises PlanError if vLLM would refuse it.
    """

    light = False

    def __init__(self, backend: Backend, build: Callable[[int, Adapter], Model]) -> None:
        self.backend = backend
        self._build = build

    def adopt(self, adapter: Adapter) -> Adapter:
        """The adapter as it is."""
        return adapter

    def prepare(self, number: int, plan: MergePlan) -> tuple[Model, Facts]:
        """The whole merge."""
        start = time.perf_counter()
        merged = run(plan, self.backend.name)
        facts = _facts(plan, self.backend, merged.result, start)
        return self._build(number, merged.adapter), facts

    def remake(self, number: int, plan: MergePlan) -> Model:
        """The whole merge once more."""
        return self.prepare(number, plan)[0]


class SlotMaker(Generic[Model]):
    """Merges on a device, into slots; what vLLM holds before has shapes and no values.

    backend: merges on the device.
    build:   makes what vLLM holds from an id and a plan; raises PlanError if vLLM would refuse the merge.
    compile: compiles the kernels that fill a slot with it.
    """

    light = True

    def __init__(
        self,
        backend: SlotBackend,
        build: Callable[[int, MergePlan], Model],
        compile: Callable[[Model], None],
    ) -> None:
        self.backend = backend
        self._build = build
        self._compile = compile

    def adopt(self, adapter: Adapter) -> Adapter:
        """The adapter in page-locked memory."""
        return self.backend.adopt(adapter)

    def prepare(self, number: int, plan: MergePlan) -> tuple[Model, Facts]:
        """The merge, tried on the device, so that writing it into a slot cannot fail."""
        warn(plan.spec, plan.notes, logger)
        model = self._build(number, plan)
        start = time.perf_counter()
        result = self.backend.check(plan)
        warn(plan.spec, result.notes(), logger)
        self._compile(model)
        return model, _facts(plan, self.backend, result, start)

    def remake(self, number: int, plan: MergePlan) -> Model:
        """A merge that was prepared before; it is not tried again, because a step would wait for that."""
        return self._build(number, plan)


def _facts(plan: MergePlan, backend: Backend, result: Result, start: float) -> Facts:
    rank = max(module.results[0][0][0] for module in plan.modules.values())
    seconds = time.perf_counter() - start
    return Facts(
        backend.name, rank, len(plan.modules), result.kept_energy(), result.kept_by_module(), seconds
    )


def outline(module: Module) -> Factors:
    """The shapes and dtypes of a module's result, without values: tensors on the device ``meta``."""
    a, b = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in module.results)
    return Factors(a, b, embedding=module.embedding)


def warm_up(backend: Backend, dtype: torch.dtype) -> None:
    """Let the backend compile what the usual merges need, and log how long that took."""
    start = time.perf_counter()
    backend.warm_up(dtype)
    logger.info("merge backend %s ready after %.1f s", backend.name, time.perf_counter() - start)
