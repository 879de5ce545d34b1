"""Merges that are watched, stopped in the middle, or interrupted by another merge."""

from __future__ import annotations

import functools

import pytest

from agreement.comparing import assert_same_bits, run
from making import SMALL, random_adapter
from merged_lora.adapters import Adapter
from merged_lora.backends import Result, load_backend
from merged_lora.plan import MergePlan
from merged_lora.planning import make_plan
from merged_lora.spec import parse

BACKENDS = ["numpy", "cpu", "triton"]
SHAPES = {f"layers.{i}.{name}": shape for i in range(3) for name, shape in SMALL.items()}
SPECS = [
    "linear(a, b)",
    "ties(a, b)",
    "della(a, b)",
    "sum(a, b)",
    "svd(a, b, rank=3)",
    "karcher(a, b)",
    "regmean(a, b)",
    "ties_svd(a, b)",
    "della_svd(a, b)",
    "knots(a, b)",
    "knots(a, b, scope=model)",
    "core_ties(a, b)",
]
"""One for every way that a backend takes."""


class StopError(Exception):
    """Raised in tests to stop a merge."""


@functools.cache
def plan_of(spec: str) -> MergePlan:
    sources: dict[str, Adapter] = {n: random_adapter(SHAPES, 4, seed=i) for i, n in enumerate("ab")}
    return make_plan(parse(spec), sources)


def with_triton_slow(specs: list[str]) -> list[object]:
    """Every spec with every backend; those that take seconds under Triton's interpreter are slow."""
    slow = ("ties_svd", "della_svd")
    return [
        pytest.param(spec, backend, marks=pytest.mark.slow)
        if backend == "triton" and spec.startswith(slow)
        else (spec, backend)
        for spec in specs
        for backend in BACKENDS
    ]


@pytest.mark.parametrize(("spec", "backend"), with_triton_slow(SPECS))
def test_progress_adds_up_to_the_number_of_modules(spec: str, backend: str) -> None:
    done: list[int] = []
    result = load_backend(backend).merge(plan_of(spec), done.append)
    assert sum(done) == len(plan_of(spec).modules)
    assert min(done) >= 0
    assert list(result.modules) == list(plan_of(spec).modules)


@pytest.mark.parametrize(("spec", "backend"), with_triton_slow(SPECS))
def test_what_progress_raises_stops_a_merge_and_the_next_one_is_whole(spec: str, backend: str) -> None:
    def stop(_: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        load_backend(backend).merge(plan_of(spec), stop)
    assert_same_bits(run(plan_of(spec), backend), whole(spec, backend))


@functools.cache
def whole(spec: str, backend: str) -> Result:
    return run(plan_of(spec), backend)


@pytest.mark.parametrize("inner", ["ties(a, b)", "ties_svd(a, b)", "knots(a, b)"])
@pytest.mark.parametrize("outer", SPECS)
def test_a_merge_inside_the_progress_of_another_leaves_the_bits_of_both(outer: str, inner: str) -> None:
    made: list[Result] = []

    def interrupt(_: int) -> None:
        made.append(run(plan_of(inner), "cpu"))

    result = load_backend("cpu").merge(plan_of(outer), interrupt)
    assert_same_bits(result, whole(outer, "cpu"))
    assert made
    for other in made:
        assert_same_bits(other, whole(inner, "cpu"))


@pytest.mark.parametrize("backend", ["numpy", "triton"])
def test_other_backends_may_be_entered_again_too(backend: str) -> None:
    made: list[Result] = []
    outer = load_backend(backend).merge(
        plan_of("ties(a, b)"), lambda _: made.append(run(plan_of("sum(a, b)"), backend))
    )
    assert_same_bits(outer, whole("ties(a, b)", backend))
    assert made
    for other in made:
        assert_same_bits(other, whole("sum(a, b)", backend))
