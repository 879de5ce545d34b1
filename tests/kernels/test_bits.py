"""The Triton backend and the NumPy backend give the same bits wherever no matrix is decomposed."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from agreement.comparing import (
    assert_backends_agree,
    awkward_adapters,
    awkward_views,
    entries,
    plan_of,
    with_gaps,
)
from agreement.test_bits import EXACT, plans, settings_of, spec_of
from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.engine import merge
from merged_lora.errors import PlanError
from merged_lora.factors import DTYPES, Factors
from merged_lora.plan import Largest
from merged_lora.planning import make_plan
from merged_lora.spec import MergeSpec, parse
from merged_lora.strategies import TABLE
from merged_lora.triton_kernels.kernels.combine import BLOCK

COUNTS = (1, 2, 3, 4, 8, 9, 16)
"""Source counts: unrolled, looped, and with and without a correction in the division."""


@cache
def sources(count: int, share: int) -> dict[str, Adapter]:
    """That many sources of a share of the awkward modules; all shares together have them all."""
    return {
        name: Adapter(dict(list(adapter.modules.items())[share :: len(COUNTS)]))
        for name, adapter in awkward_adapters(count).items()
    }


USUAL = ("sum", "cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Strategies that are one launch; the others are torch operations, and as many sources more of the same."""


def mark(strategy: str, count: int) -> Any:
    """Where a case runs: those that take long and tell little in ``make soak``, the fast ones everywhere."""
    if strategy not in USUAL and count not in (2, 9):
        return pytest.mark.soak
    return () if count == 2 else pytest.mark.slow


def cases() -> list[Any]:
    """Each strategy with each count of sources."""
    return [pytest.param(s.name, n, marks=mark(s.name, n)) for s in EXACT for n in COUNTS]


@pytest.mark.parametrize(("strategy", "count"), cases())
def test_triton_gives_the_bits_of_the_reference(strategy: str, count: int) -> None:
    every, share = settings_of(strategy), COUNTS.index(count)
    count = max(count, TABLE[strategy].sources_min)
    # The defaults with every count, everything else with one of them.
    for options in (every[0], *every[1 + share :: len(COUNTS)]):
        assert_backends_agree(make_plan(spec_of(strategy, options, count), sources(count, share)), "triton")


def test_all_counts_together_meet_every_module() -> None:
    met = {module for share, count in enumerate(COUNTS) for module in sources(count, share)["a"].modules}
    assert met == set(awkward_adapters(1)["a"].modules)


@pytest.mark.parametrize("strategy", [strategy.name for strategy in EXACT])
def test_chosen_modules_merge_alike(strategy: str) -> None:
    spec = parse(f'{strategy}(a, b, c, modules="q.0 *.2", without="v")')
    names = [f"{part}.{layer}" for part in "qkv" for layer in range(4)]
    adapters = {n: random_adapter(dict.fromkeys(names, (24, 40)), seed=i) for i, n in enumerate("abc")}
    plan = make_plan(spec, adapters)
    assert list(plan.modules) == ["k.2", "q.0", "q.2"]
    assert_backends_agree(plan, "triton")


@pytest.mark.parametrize("strategy", [strategy.name for strategy in EXACT])
def test_modules_that_some_sources_lack_merge_alike(strategy: str) -> None:
    assert_backends_agree(make_plan(spec_of(strategy, {}, 4), with_gaps(sources(4, 3))), "triton")


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(plans())
def test_any_plan_gives_the_same_bits(case: tuple[MergeSpec, dict[str, Adapter]]) -> None:
    assert_backends_agree(make_plan(*case), "triton")


def test_every_strategy_in_factors_space_is_tried() -> None:
    assert {s.name for s in TABLE.values() if s.recipe.space == "factors"} <= {s.name for s in EXACT}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", ["linear(a, -0.5*b, c)", "ties(a, b, 0.3*c)", "dare_ties(a, b, c)"])
def test_every_size_around_groups_and_blocks(spec: str, dtype: torch.dtype) -> None:
    sizes = (1, 7, 8, 9, 15, 16, 17, BLOCK - 1, BLOCK, BLOCK + 1)
    generator = torch.Generator().manual_seed(0)

    def adapter() -> Adapter:
        return Adapter(
            {
                f"m{n}": Factors(
                    entries("normal", n, dtype, generator)[None, :],
                    entries("few values", n, dtype, generator)[:, None],
                )
                for n in sizes
            }
        )

    assert_backends_agree(make_plan(parse(spec), {name: adapter() for name in "abc"}), "triton")


@pytest.mark.slow
@pytest.mark.parametrize("ties", ["smallest", "largest"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_are_cut_at_every_place_of_a_group(dtype: torch.dtype, ties: str) -> None:
    info = torch.finfo(dtype)
    magnitude = {"smallest": info.smallest_normal * info.eps, "largest": info.max}[ties]
    tensor = torch.tensor([magnitude, -magnitude] * 9 + [0.0, -0.0] * 3, dtype=dtype)
    assert bool((tensor[:18] != 0).all())
    for count in range(tensor.numel() + 1):
        assert_backends_agree(plan_of(tensor, Largest(count)), "triton")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_and_unaligned_tensors_merge_like_their_copies(dtype: torch.dtype) -> None:
    views = awkward_views(dtype, torch.Generator().manual_seed(0))
    assert_backends_agree(make_plan(parse("ties(a, 0.4*b, -1*c)"), views), "triton")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_an_error_before_anything_is_launched(value: float) -> None:
    good = random_adapter({"m": (8, 8)}, 2)
    a = good.modules["m"].a.clone()
    a[1, 3] = value
    bad = Adapter({"m": Factors(a, good.modules["m"].b)})
    with pytest.raises(PlanError, match="b: m holds NaN or infinity"):
        merge("ties(a, b)", {"a": good, "b": bad}, backend="triton")
