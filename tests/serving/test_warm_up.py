"""What a server compiles at its start: the kernels of usual merges, in the dtypes of usual adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from making import random_adapter
from merged_lora.backends import Slot
from merged_lora.planning import make_plan
from merged_lora.spec import parse
from merged_lora.triton_kernels import backend as module
from merged_lora.triton_kernels.factors import launch
from merged_lora.triton_kernels.warm_up import STRATEGIES

SHAPES = {"m": (24, 40)}
HALF, WHOLE = torch.bfloat16, torch.float32


@pytest.fixture
def needed(monkeypatch: pytest.MonkeyPatch) -> set[object]:
    """The kernels that merges of factors ask for; none of them is run."""
    kernels: set[object] = set()

    def combine(tables: Any, variant: Any, programs: int) -> None:
        sources = tables.sources.shape[1]
        kernels.add((variant, sources if sources <= 4 else "more"))

    def find_thresholds(tasks: Any, kinds: Any, device: torch.device) -> None:
        kernels.update(("trim", kind) for kind in kinds.tolist())

    monkeypatch.setattr(launch, "combine", combine)
    monkeypatch.setattr(launch, "find_thresholds", find_thresholds)
    return kernels


def served(strategy: str, dtypes: Sequence[torch.dtype], slot_dtype: torch.dtype) -> None:
    """Make and place a merge of one source of each dtype, as a server does."""
    backend = module.TritonBackend(torch.device("cpu"))
    adapters = {
        name: random_adapter(SHAPES, 8, dtype, seed)
        for seed, (name, dtype) in enumerate(zip("abcdefgh", dtypes, strict=False))
    }
    plan = make_plan(parse(f"{strategy}({', '.join(adapters)})"), adapters)
    slots = {
        name: Slot(*(torch.empty(shape, dtype=slot_dtype) for shape, _ in made.results))
        for name, made in plan.modules.items()
    }
    staged = backend.stage(plan, slot_dtype)
    backend.compile(staged, slots)
    backend.place(staged, slots)


@pytest.mark.parametrize("slot_dtype", [HALF, torch.float16, WHOLE], ids=str)
def test_usual_merges_need_no_kernel_that_was_not_compiled_at_the_start(
    needed: set[object], slot_dtype: torch.dtype
) -> None:
    module.TritonBackend(torch.device("cpu")).warm_up(slot_dtype)
    warmed = set(needed)
    needed.clear()
    given = [(dtype,) * count for dtype in (slot_dtype, WHOLE) for count in (2, 3, 4, 5, 8)]
    for dtypes in (*given, (slot_dtype, WHOLE), (WHOLE, slot_dtype)):
        for strategy in STRATEGIES:
            served(strategy, dtypes, slot_dtype)
    assert needed
    assert needed <= warmed


@pytest.mark.parametrize(("slot_dtype", "count"), [(HALF, 94), (WHOLE, 42)], ids=str)
def test_a_start_compiles_so_many_kernels(needed: set[object], slot_dtype: torch.dtype, count: int) -> None:
    # For each of five rules (linear, ties, dare_linear, dare_ties, magnitude_prune) one that checks and one
    # that writes, for 2, 3, 4 and more sources: 40; a trim and a copy, for results of groups: 42 a dtype.
    # A merge of one source of each dtype adds 10.
    module.TritonBackend(torch.device("cpu")).warm_up(slot_dtype)
    assert len(needed) == count
