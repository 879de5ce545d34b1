"""The CPU backend and the NumPy backend give the same bits wherever no matrix is decomposed."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agreement.comparing import (
    FAMILIES,
    NAMES,
    SIZES,
    assert_backends_agree,
    awkward_adapters,
    awkward_views,
    entries,
    with_gaps,
)
from merged_lora.adapters import Adapter
from merged_lora.engine import merge
from merged_lora.errors import PlanError
from merged_lora.factors import DTYPES, Factors
from merged_lora.planning import make_plan
from merged_lora.spec import MergeSpec, Source
from merged_lora.strategies import TABLE

WEIGHTS = (1.0, -0.5, 0.25, 0.0, 2.0, 0.7, -1e-3, 1.0)
PER_SOURCE = (0.3, 1.0, 0.02, 0.77)
VALUES: dict[str, tuple[object, ...]] = {
    "density": (0.5, 0.01, 1.0, 1e-6, "per source"),
    "majority_sign_method": ("total", "frequency"),
    "elect": ("unweighted", "weighted"),
    "compat": ("none", "lorax"),
    "seed": (0, 2**63 - 1),
    "gamma": (0.01, 0.4),
    "epsilon": (0.15, 0.049),
    "select_topk": (1.0, 0.3),
    "scale": (1.0, -0.7),
    "normalize": (False, True),
}
TOGETHER = ("density", "majority_sign_method", "elect")
"""Options tried in every combination; of the others one is changed at a time."""
EXACT = [s for s in TABLE.values() if s.recipe.space == "factors" or s.name in ("cat", "sum")]


def settings_of(strategy: str) -> list[dict[str, object]]:
    """Settings of a strategy's options that between them take every path."""
    taken = [option.name for option in TABLE[strategy].options]
    crossed = [name for name in taken if name in TOGETHER]
    found = [
        dict(zip(crossed, values, strict=True)) for values in product(*(VALUES[name] for name in crossed))
    ]
    return found + [{name: VALUES[name][1]} for name in taken if name in VALUES and name not in TOGETHER]


def spec_of(strategy: str, options: dict[str, object], count: int) -> MergeSpec:
    """The spec with that many sources."""
    given_options = {
        k: tuple(PER_SOURCE[i % len(PER_SOURCE)] for i in range(count)) if v == "per source" else v
        for k, v in options.items()
    }
    if "epsilon" in given_options or TABLE[strategy].option("epsilon"):
        given_options["epsilon"] = room_for(given_options)
    sources = tuple(Source(name, WEIGHTS[i % len(WEIGHTS)]) for i, name in enumerate(NAMES[:count]))
    return MergeSpec(strategy, sources, tuple(given_options.items()))  # type: ignore[arg-type]


def room_for(options: dict[str, Any]) -> object:
    """The epsilon asked for, where density leaves room, else half of the room."""
    density, epsilon = options.get("density", 0.5), options.get("epsilon", 0.15)
    rooms = [min(d, 1 - d) for d in (density if isinstance(density, tuple) else (density,))]
    chosen = tuple(epsilon if epsilon < room else room / 2 for room in rooms)
    return chosen if isinstance(density, tuple) else chosen[0]


@cache
def sources(count: int) -> dict[str, Adapter]:
    """Adapters that hold every kind of tensor."""
    return awkward_adapters(count)


@pytest.mark.parametrize("count", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 5, 8, 16))])
@pytest.mark.parametrize("strategy", [strategy.name for strategy in EXACT])
def test_both_backends_give_the_same_bits(strategy: str, count: int) -> None:
    count = max(count, TABLE[strategy].sources_min)
    for options in settings_of(strategy):
        assert_backends_agree(make_plan(spec_of(strategy, options, count), sources(count)))


def test_every_family_meets_every_size() -> None:
    met = {
        (family, f.b.shape[0], f.a.shape[1])
        for count in (1, 2, 3, 8)
        for name, f in sources(count)["a"].modules.items()
        for family in FAMILIES
        if name.startswith(family)
    }
    assert met == {(family, *size) for family in FAMILIES for size in SIZES}


@pytest.mark.parametrize("strategy", [strategy.name for strategy in EXACT])
def test_views_and_unaligned_tensors_merge_like_their_copies(strategy: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        views = awkward_views(dtype, generator)
        spec = spec_of(strategy, {}, 3)
        assert_backends_agree(make_plan(spec, views))


@pytest.mark.parametrize("strategy", [strategy.name for strategy in EXACT])
def test_modules_that_some_sources_lack_merge_alike(strategy: str) -> None:
    assert_backends_agree(make_plan(spec_of(strategy, {}, 5), with_gaps(sources(5))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_finite_values_merge_alike_as_long_as_they_fit(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    full = Factors(
        torch.full((1, 1030), largest, dtype=dtype), torch.full((9, 1), -largest, dtype=dtype), 1.0
    )
    pair = {"a": Adapter({"m": full}), "b": Adapter({"m": full})}
    for strategy in ("linear", "ties", "magnitude_prune"):
        spec = MergeSpec(strategy, (Source("a", 0.25), Source("b", 0.25)))
        assert_backends_agree(make_plan(spec, pair))


@pytest.mark.parametrize("backend", ["cpu", "numpy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_result_that_overflows_is_refused_by_name(dtype: torch.dtype, backend: str) -> None:
    largest = torch.finfo(dtype).max
    full = Factors(torch.full((1, 9), largest, dtype=dtype), torch.ones(9, 1, dtype=dtype), 1.0)
    pair = {"a": Adapter({"up_proj": full}), "b": Adapter({"up_proj": full})}
    with pytest.raises(PlanError, match="overflows its dtype in up_proj; use smaller weights"):
        merge("linear(a, b)", pair, backend)


@st.composite
def plans(draw: st.DrawFn) -> tuple[MergeSpec, dict[str, Adapter]]:
    """A spec with its sources: any strategy, options, sizes, dtypes, families and missing modules."""
    strategy = draw(st.sampled_from(EXACT))
    count = draw(st.integers(strategy.sources_min, 6))
    options = {
        option.name: draw(st.sampled_from(VALUES[option.name]))
        for option in strategy.options
        if option.name in VALUES and option.name != "normalize"
    }
    weights = draw(st.lists(st.floats(-2, 2, width=16), min_size=count, max_size=count))
    shapes = [draw(st.tuples(st.integers(1, 2100), st.integers(1, 1300), st.integers(1, 3))) for _ in "12"]
    adapters = {}
    for name in NAMES[:count]:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        present = draw(st.sampled_from([(0,), (1,), (0, 1), (0, 1)]))
        modules = {}
        for i in present:
            rows, columns, rank = shapes[i]
            a, b = (
                entries(draw(st.sampled_from(FAMILIES)), n * rank, draw(st.sampled_from(DTYPES)), generator)
                for n in (columns, rows)
            )
            modules[f"m{i}"] = Factors(a.view(rank, -1), b.view(-1, rank), draw(st.sampled_from([2.0, 0.3])))
        adapters[name] = Adapter(modules)
    spec = spec_of(strategy.name, options, count)
    given_weights = (
        Source(s.name, w if abs(w) > 1e-3 else 0.0) for s, w in zip(spec.sources, weights, strict=True)
    )
    return MergeSpec(spec.strategy, tuple(given_weights), spec.options), adapters


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(plans())
def test_any_plan_gives_the_same_bits(case: tuple[MergeSpec, dict[str, Adapter]]) -> None:
    assert_backends_agree(make_plan(*case))
