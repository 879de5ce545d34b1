"""The Triton backend and the NumPy backend give the same bits wherever no matrix is decomposed."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings

from agreement.comparing import assert_same_bits, awkward_adapters, run
from agreement.test_bits import EXACT, plans, settings_of, spec_of
from merged_lora.adapters import Adapter
from merged_lora.plan import MergePlan, make_plan
from merged_lora.spec import MergeSpec
from merged_lora.strategies import TABLE

COUNTS = (1, 2, 3, 4, 8, 9, 16)
"""Of sources: unrolled, looped, and with and without a correction in the division."""
SHARE = 4  # of the modules of `awkward_adapters`, every so many


@cache
def sources(count: int) -> dict[str, Adapter]:
    """A share of the awkward modules, another one for each count; all counts together have them all."""
    first = COUNTS.index(count) % SHARE
    return {
        name: Adapter(dict(list(adapter.modules.items())[first::SHARE]))
        for name, adapter in awkward_adapters(count).items()
    }


def assert_triton_agrees(plan: MergePlan) -> None:
    assert_same_bits(run(plan, "triton"), run(plan, "numpy"))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("strategy", [strategy.name for strategy in EXACT])
def test_triton_gives_the_bits_of_the_reference(strategy: str, count: int) -> None:
    every = settings_of(strategy)
    # The defaults with every count, everything else with one of them.
    for options in (every[0], *every[1 + COUNTS.index(count) :: len(COUNTS)]):
        assert_triton_agrees(make_plan(spec_of(strategy, options, count), sources(count)))


def test_all_counts_together_meet_every_module() -> None:
    met = {module for count in COUNTS for module in sources(count)["a"].modules}
    assert met == set(awkward_adapters(1)["a"].modules)


@pytest.mark.parametrize("strategy", [strategy.name for strategy in EXACT])
def test_modules_that_some_sources_lack_merge_alike(strategy: str) -> None:
    parts = {
        name: Adapter({k: f for j, (k, f) in enumerate(adapter.modules.items()) if (i + j) % 3})
        for i, (name, adapter) in enumerate(sources(4).items())
    }
    assert_triton_agrees(make_plan(spec_of(strategy, {}, 4), parts))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(plans())
def test_any_plan_gives_the_same_bits(case: tuple[MergeSpec, dict[str, Adapter]]) -> None:
    assert_triton_agrees(make_plan(*case))


def test_every_strategy_in_factors_space_is_tried() -> None:
    assert {s.name for s in TABLE.values() if s.recipe.space == "factors"} <= {s.name for s in EXACT}
