"""Merges of some of the sources' modules: the options ``modules`` and ``without``."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agreement.comparing import assert_same_bits, merged
from making import SMALL, random_adapter
from merged_lora.adapters import Adapter
from merged_lora.backends import Result
from merged_lora.cost import cost_of, cost_of_module
from merged_lora.engine import merge
from merged_lora.errors import PlanError
from merged_lora.plan import MergePlan
from merged_lora.planning import make_plan
from merged_lora.spec import parse
from merged_lora.strategies import TABLE

Q_PROJ = "model.layers.0.self_attn.q_proj"
ATTENTION = [name for name in SMALL if "self_attn" in name]
HEAD = "lm_head"


def pair(**shapes: tuple[int, int]) -> dict[str, Adapter]:
    """Two adapters; ``shapes`` of the head in either."""
    heads = {name: {HEAD: shapes[name]} if name in shapes else {} for name in "ab"}
    return {name: random_adapter(SMALL | heads[name], seed=seed) for seed, name in enumerate("ab")}


def planned(spec: str, adapters: dict[str, Adapter]) -> MergePlan:
    return make_plan(parse(spec), adapters)


@pytest.mark.parametrize("backend", ["cpu", "numpy"])
@pytest.mark.parametrize("strategy", TABLE)
def test_chosen_modules_come_out_as_in_the_merge_of_all(strategy: str, backend: str) -> None:
    adapters = pair()
    whole = merged(f"{strategy}(a, b)", adapters, backend)
    some = merged(f'{strategy}(a, b, modules="*.self_attn.*")', adapters, backend)
    assert list(some.modules) == sorted(ATTENTION)
    energy = {name: energy for name, energy in whole.energy.items() if name in ATTENTION}
    assert_same_bits(some, Result({name: whole.modules[name] for name in some.modules}, energy))
    assert some.energy == energy


@pytest.mark.parametrize("strategy", TABLE)
def test_a_plan_of_some_modules_costs_what_these_cost(strategy: str) -> None:
    adapters = pair()
    some = planned(f'{strategy}(a, b, without="mlp k_proj")', adapters)
    whole = planned(f"{strategy}(a, b)", adapters)
    expected = sum(cost_of_module(m).operations for name, m in whole.modules.items() if "q_proj" in name)
    assert cost_of(some).operations == pytest.approx(expected)
    assert some.nbytes < whole.nbytes


def test_density_over_the_model_counts_the_chosen_modules_alone() -> None:
    adapters = pair()
    cut = {name: Adapter({module: a.modules[module] for module in ATTENTION}) for name, a in adapters.items()}
    some = merged("knots(a, b, density=0.2, scope=model, modules=self_attn)", adapters)
    assert_same_bits(some, merged("knots(a, b, density=0.2, scope=model)", cut))


@pytest.mark.parametrize("strategy", TABLE)
def test_modules_that_do_not_fit_together_can_be_left_out(strategy: str) -> None:
    adapters = pair(a=(96, 32), b=(100, 32))
    for options in ("", ", weights=auto"):
        with pytest.raises(PlanError, match="lm_head has delta shapes"):
            planned(f"{strategy}(a, b{options})", adapters)
        assert planned(f"{strategy}(a, b{options}, without=lm_head)", adapters).modules.keys() == SMALL.keys()


def test_a_source_with_none_of_the_chosen_modules_is_noted() -> None:
    adapters = pair(a=(96, 32))
    plan = planned(f"ties(a, b, modules={HEAD})", adapters)
    assert plan.notes == ("b has none of the chosen modules; it takes no part",)
    assert plan.modules.keys() == {HEAD}


def test_modules_that_are_missing_are_counted_among_those_chosen() -> None:
    adapters = pair(a=(96, 32))
    assert planned("a + b", adapters).notes[0].startswith("1 of 5 modules are not in b")
    assert planned(f"sum(a, b, without={HEAD})", adapters).notes == ()
    assert planned(f'sum(a, b, modules="q_proj {HEAD}")', adapters).notes[0].startswith("1 of 3 modules")


def test_automatic_weights_are_those_of_each_module_whatever_else_is_merged() -> None:
    adapters = pair()
    for some in ("self_attn", "k_proj", "*"):
        made = merged(f'sum(a, b, weights=auto, modules="{some}")', adapters)
        whole = merged("sum(a, b, weights=auto)", adapters)
        assert_same_bits(made, Result({name: whole.modules[name] for name in made.modules}, {}))


def test_a_calibration_serves_merges_of_some_modules() -> None:
    adapters = pair()
    lacking = {name: f for name, f in adapters["b"].modules.items() if name != Q_PROJ}
    adapters["b"] = replace(random_adapter({n: SMALL[n] for n in lacking}, seed=1))
    whole, some = (merged(f"regmean(a, b{o})", adapters) for o in ("", ", modules=q_proj"))
    assert_same_bits(some, Result({name: whole.modules[name] for name in some.modules}, some.energy))


def test_the_result_says_which_modules_were_chosen() -> None:
    made = merge('sum(a, b, modules="self_attn k_proj", without=q_proj)', pair())
    assert made.metadata["merged_lora.spec"] == 'sum(a, b, modules="k_proj self_attn", without="q_proj")'
    assert made.modules.keys() == {"model.layers.0.self_attn.k_proj"}
