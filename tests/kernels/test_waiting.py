"""No merge is placed by waiting for the device: on a device without values, any read of one fails.

Neither is one written straight into slots, except that decompositions wait by themselves, and sketched merges
read their counts.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from making import random_adapter
from merged_lora import strategies
from merged_lora.backends import Result, Slot, StagedMerge
from merged_lora.factors import DTYPES
from merged_lora.plan import MergePlan
from merged_lora.planning import make_plan
from merged_lora.spec import parse
from merged_lora.triton_kernels import backend as module
from merged_lora.triton_kernels import packed, transfer
from merged_lora.triton_kernels.factors import launch
from merged_lora.triton_kernels.factors.layout import is_launched
from merged_lora.triton_kernels.kernels import combine, trim
from merged_lora.triton_kernels.results import Outline

META = torch.device("meta")
SHAPES = {f"m{i}": (24, 40) for i in range(3)}


def plan(spec: str, dtype: torch.dtype = torch.bfloat16) -> MergePlan:
    return make_plan(parse(spec), {k: random_adapter(SHAPES, 4, dtype, i) for i, k in enumerate("abcd")})


LAUNCHED = [
    name for name in strategies.TABLE if all(is_launched(m) for m in plan(f"{name}(a, b)").modules.values())
]
DECOMPOSED = ["sum", "cat", "svd", "slerp", "knots", "core_linear", "core_ties", "core_dare_ties"]


def slots(dtype: torch.dtype = torch.bfloat16) -> dict[str, Slot]:
    return {
        name: Slot(*(torch.empty(shape, dtype=dtype, device=META) for shape in ((8, columns), (rows, 8))))
        for name, (rows, columns) in SHAPES.items()
    }


class UploadWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails on copies to the device that the host waits for.

    locked: page-locked tensors, whose copies are not waited for.
    """

    def __init__(self, locked: list[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uploads = 0
        self._locked = locked

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].device == META != args[1].device:
            self.uploads += 1
            assert args[2:] == (True,), "a copy that is waited for"
            addresses = {x.untyped_storage().data_ptr() for x in self._locked}
            assert args[1].untyped_storage().data_ptr() in addresses, "a copy from pageable memory"
            assert args[1].is_contiguous(), "a copy with gaps"
        assert func is not torch.ops.aten._to_copy.default, "a copy from pageable memory"
        return func(*args, **(kwargs or {}))


class Kernel:
    """A kernel that does nothing when it is launched."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda **_: None


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> UploadWatch:
    """Watches all uploads of a write; kernels are replaced."""
    for owner, name in (
        (combine, "_combine_kernel"),
        (trim, "_find_thresholds_kernel"),
        (trim, "_count_spans_kernel"),
        (trim, "_finish_spans_kernel"),
    ):
        monkeypatch.setattr(owner, name, Kernel())
    locked: list[torch.Tensor] = []
    real = transfer.host_memory

    def host_memory(nbytes: int, device: torch.device) -> torch.Tensor:
        assert device == META
        locked.append(real(nbytes, device))
        return locked[-1]

    for owner in (transfer, packed):
        monkeypatch.setattr(owner, "host_memory", host_memory)
    return UploadWatch(locked)


def write_all_ways(spec: str, dtype: torch.dtype, watch: contextlib.AbstractContextManager[object]) -> None:
    """Write a merge for the first time, again, and after its sources were evicted and loaded again."""
    backend = module.TritonBackend(META)
    backend.reserve(2 * int(packed.pack(random_adapter(SHAPES, 4, dtype), META).host.numel()))
    merge, others, written = plan(spec, dtype), plan("sum(c, d)", dtype), slots()
    empty = [written.pop("m2")]
    with watch:
        for _ in range(2):
            backend.write(merge, written, empty)
        backend.load_sources(others)
        backend.write(merge, written, empty)


def test_the_strategies_of_one_launch_are_those() -> None:
    assert LAUNCHED == ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


@pytest.mark.parametrize("large", [trim.LARGE, 8], ids=["whole", "in spans"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", LAUNCHED)
def test_a_merge_of_one_launch_waits_for_nothing(
    strategy: str, dtype: torch.dtype, large: int, watch: UploadWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "find_thresholds", functools.partial(trim.find_thresholds, large=large))
    write_all_ways(f"{strategy}(a, 0.5*b)", dtype, watch)
    assert watch.uploads >= 3 * 2 + 2  # of three pairs of sources, and of tables


@pytest.mark.parametrize("strategy", DECOMPOSED)
def test_a_merge_that_decomposes_looks_at_no_value_itself(strategy: str, watch: UploadWatch) -> None:
    assert strategy not in LAUNCHED
    write_all_ways(f"{strategy}(a, 0.5*b)", torch.float32, contextlib.nullcontext())


@pytest.mark.parametrize("reserved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merge_is_placed_by_copies_that_the_host_does_not_wait_for(
    dtype: torch.dtype, reserved: bool, watch: UploadWatch
) -> None:
    merge = plan("svd(a, b)")
    outline = Outline(merge, [list(merge.modules)], dtype)
    host = transfer.host_memory(outline.nbytes, META)
    staged = StagedMerge(host, outline.modules(host, list(merge.modules)), Result({}, {}))
    backend = module.TritonBackend(META)
    if reserved:
        backend.reserve(1 << 20, "", outline.nbytes)
    with watch:
        for filled in (first := slots(dtype), first, slots(torch.bfloat16)):
            rest = {name: slot for name, slot in filled.items() if name != "m2"}
            whole = backend.place(staged, rest, [filled["m2"]], ["m1"])
            assert whole["m1"].a.device == META
    assert watch.uploads == 3 + 2  # of the merge each time, and of tables for each slot
