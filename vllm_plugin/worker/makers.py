"""Two ways from the plan of a merge to what vLLM holds: host tensors that vLLM copies, or vLLM's own slots.

Knows plans and backends and nothing of vLLM: what it holds is built by a function given at construction.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from merged_lora.adapters import Adapter
from merged_lora.backends import Backend, Slot, SlotBackend
from merged_lora.engine import merge, plan, run
from merged_lora.factors import Factors
from merged_lora.plan import MergePlan, Module
from merged_lora.spec import parse
from merged_lora.vllm_plugin.rpc import Facts

logger = logging.getLogger("vllm.merged_lora")

WARMED = ("sum", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""The usual strategies: whatever else launches a kernel of its own is compiled when it is first asked for."""
WARMED_COUNTS = (2, 3, 4, 5)
"""Of sources: those for which a device backend has kernels of their own, and one for all that are more."""

Model = TypeVar("Model")
Made = TypeVar("Made", covariant=True)


class Maker(Protocol[Made]):
    """Makes of a plan what vLLM holds of a merge.

    light: whether that takes next to no memory; then it is kept, for a slot or for the next one.
    """

    light: bool

    @property
    def backend(self) -> Backend:
        """What merges."""
        ...

    def adopt(self, adapter: Adapter) -> Adapter:
        """The adapter as this maker takes it for a source; to be kept instead of the given one."""
        ...

    def prepare(self, number: int, plan: MergePlan) -> tuple[Made, Facts]:
        """The merge under vLLM's id ``number``, made and checked.  Raises MergeError where it cannot be."""
        ...

    def again(self, number: int, plan: MergePlan) -> Made:
        """A merge that was prepared before."""
        ...


class HostMaker(Generic[Model]):
    """Merges into host tensors, which vLLM copies into a slot.

    build: makes of an id and an adapter what vLLM holds; it raises where vLLM would refuse the adapter.
    """

    light = False

    def __init__(self, backend: Backend, build: Callable[[int, Adapter], Model]) -> None:
        self.backend = backend
        self._build = build

    def adopt(self, adapter: Adapter) -> Adapter:
        """The adapter as it is."""
        return adapter

    def prepare(self, number: int, plan: MergePlan) -> tuple[Model, Facts]:
        """The merge, whole."""
        start = time.perf_counter()
        merged = run(plan, self.backend.name)
        kept = float(merged.metadata.get("merged_lora.kept_energy", "1"))
        by_module = json.loads(merged.metadata.get("merged_lora.kept_energy_by_module", "{}"))
        facts = _facts(plan, self.backend, kept, by_module, start)
        return self._build(number, merged), facts

    def again(self, number: int, plan: MergePlan) -> Model:
        """The merge, made once more."""
        return self.prepare(number, plan)[0]


class SlotMaker(Generic[Model]):
    """Merges on a device, into slots; what vLLM holds until then has shapes and no values.

    build: makes of an id and a plan what vLLM holds; it raises where vLLM would refuse such an adapter.
    compile: compiles what filling a slot with it will launch.
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
        for note in plan.notes:
            logger.warning("%s: %s", plan.spec, note)
        model = self._build(number, plan)
        start = time.perf_counter()
        result = self.backend.check(plan)
        for note in result.notes():
            logger.warning("%s: %s", plan.spec, note)
        self._compile(model)
        return model, _facts(plan, self.backend, result.kept_energy(), result.kept_by_module(), start)

    def again(self, number: int, plan: MergePlan) -> Model:
        """A merge that was prepared before; it is not tried again, which would hold up the step it is for."""
        return self._build(number, plan)


def _facts(
    plan: MergePlan, backend: Backend, kept: float, by_module: dict[str, float], start: float
) -> Facts:
    rank = max(module.results[0][0][0] for module in plan.modules.values())
    seconds = time.perf_counter() - start
    return Facts(backend.name, rank, len(plan.modules), kept, by_module, seconds)


def outline(module: Module) -> Factors:
    """What a module of a plan will be, without its values: tensors on the device ``meta``."""
    a, b = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in module.results)
    return Factors(a, b, embedding=module.embedding)


def warm_up(backend: Backend, slot_dtype: torch.dtype) -> None:
    """Let the backend compile what most merges need, so that few requests wait for it.

    On a device that is every strategy that has kernels of its own, with its defaults, for sources in the
    dtype of the slots and in float32, which PEFT trains and saves in unless told otherwise; whatever else a
    merge needs is compiled when it is prepared.
    """
    start = time.perf_counter()
    if isinstance(backend, SlotBackend):
        dtypes = dict.fromkeys((slot_dtype, torch.float32))
        given = [(dtype,) * count for dtype in dtypes for count in WARMED_COUNTS]
        if len(dtypes) > 1:
            given.append(tuple(dtypes))  # one of each; more of them are rare
        for sources in given:
            for name in WARMED:
                _write_once(backend, name, sources, slot_dtype)
    else:
        for spec in ("ties(a, b)", "dare_linear(a, b)"):
            merge(spec, {"a": _tiny(), "b": _tiny()}, backend.name)
    logger.info("merge backend %s ready after %.1f s", backend.name, time.perf_counter() - start)


def _write_once(
    backend: SlotBackend, strategy: str, sources: Sequence[torch.dtype], slot_dtype: torch.dtype
) -> None:
    """Merge one small source of each of these dtypes into slots of another."""
    adapters = {}
    for name, dtype in zip("abcdefgh", sources, strict=False):
        one = torch.ones(8, 8, dtype=dtype)  # as even as the tensors of real adapters
        adapters[name] = backend.adopt(Adapter({"x": Factors(one, one)}))
    merges = plan(parse(f"{strategy}({', '.join(adapters)})"), adapters)
    slots = {
        name: Slot(
            *(torch.empty(shape, dtype=slot_dtype, device=backend.device) for shape, _ in module.results)
        )
        for name, module in merges.modules.items()
    }
    backend.check(merges)
    backend.write(merges, slots)


def _tiny() -> Adapter:
    """One module in float32, two in a half type: all that the CPU backend tells apart."""
    whole, half = (torch.ones(2, 2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    return Adapter({"x": Factors(whole, whole), "y": Factors(half, half), "z": Factors(half, half)})
