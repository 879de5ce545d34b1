"""Sums of factors whose A are alike: the product of two sums has cross terms, which double the deltas."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from agreement.comparing import merged
from making import SMALL, random_adapter
from merged_lora.adapters import Adapter
from merged_lora.factors import Factors
from merged_lora.planning import make_plan
from merged_lora.spec import parse
from merged_lora.strategies import TABLE

ADDING = [s.name for s in TABLE.values() if s.recipe.space == "factors" and s.recipe.blend == "sum"]
WORDS = " are alike (cosine "


def trained_apart(*seeds: int) -> dict[str, Adapter]:
    """Adapters ``a``, ``b``, ... with factors of their own."""
    return {name: random_adapter(SMALL, seed=seed) for name, seed in zip("abcd", seeds, strict=False)}


def with_one_start(adapters: Mapping[str, Adapter], drift: float = 0.0) -> dict[str, Adapter]:
    """The adapters with the A of the first one, and a share of their own: trainings with one seed."""
    first = next(iter(adapters.values())).modules
    return {
        name: Adapter(
            {m: Factors(first[m].a + drift * f.a, f.b, f.scaling) for m, f in adapter.modules.items()}
        )
        for name, adapter in adapters.items()
    }


def notes(spec: str, adapters: Mapping[str, Adapter]) -> list[str]:
    """The notes of a plan about factors that are alike."""
    return [note for note in make_plan(parse(spec), adapters).notes if WORDS in note]


@pytest.mark.parametrize("weight", [0.5, 1.0, 0.1])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_sum_of_factors_with_one_a_is_that_many_times_the_sum_of_deltas(count: int, weight: float) -> None:
    adapters = with_one_start(trained_apart(*range(count)))
    terms = ", ".join(f"{weight}*{name}" for name in adapters)
    made, asked = merged(f"linear({terms})", adapters), merged(f"sum({terms})", adapters)
    for name, factors in asked.modules.items():
        assert torch.allclose(made.modules[name].delta(), count * factors.delta(), rtol=1e-4, atol=1e-5)
    (note,) = notes(f"linear({terms})", adapters)
    assert note.startswith(
        f"the A of {', '.join(adapters)} are alike (cosine 1.00 in model.layers.0.mlp.down_"
    )
    assert f"makes up to {count} times the weighted sum of their deltas; use sum or svd" in note


def test_copies_at_half_of_their_weight_double_the_adapter_and_a_mean_does_not() -> None:
    (one,) = trained_apart(1).values()
    both = {"a": one, "b": one}
    times = {"linear(0.5*a, 0.5*b)": 2, "0.5*a + 0.5*b": 1, "linear(0.5*a, 0.5*b, compat=lorax)": 1}
    for spec, factor in times.items():
        for name, factors in merged(spec, both).modules.items():
            assert torch.allclose(factors.delta(), factor * one.modules[name].delta(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", [s.name for s in TABLE.values() if s.recipe.space != "outputs"])
def test_strategies_that_add_factors_are_noted_and_no_others(strategy: str) -> None:
    adapters = with_one_start(trained_apart(1, 2), drift=0.3)
    assert bool(notes(f"{strategy}(0.5*a, 0.5*b)", adapters)) == (strategy in ADDING)


@pytest.mark.parametrize("strategy", ADDING)
def test_correct_use_is_not_noted(strategy: str) -> None:
    assert not notes(f"{strategy}(0.5*a, 0.5*b, c)", trained_apart(1, 2, 3))
    alike = with_one_start(trained_apart(1, 2))
    assert not notes(f"{strategy}(a, 0*b)", alike)
    assert not notes(f"{strategy}(a)", alike)


def test_raw_weights_on_both_factors_are_not_noted() -> None:
    assert not notes("linear(0.5*a, 0.5*b, compat=lorax)", with_one_start(trained_apart(1, 2)))


def test_the_note_names_those_that_are_alike_and_a_module_that_is_merged() -> None:
    adapters = with_one_start(trained_apart(1, 2)) | {"z": random_adapter(SMALL, seed=9)}
    (note,) = notes("linear(a, b, z, modules=q_proj)", adapters)
    assert note.startswith("the A of a, b are alike (cosine 1.00 in model.layers.0.self_attn.q_proj)")
    assert "up to 2 times" in note
