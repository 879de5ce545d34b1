"""Strategies on the factors equal PEFT's to rounding, wherever no two magnitudes of a tensor tie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from peft.utils import merge_utils

from agreement.comparing import jobs, run
from merged_lora.adapters import Adapter
from merged_lora.bench import peers
from merged_lora.bench.agreement import allowed_difference
from merged_lora.bench.cases import SMALL, distinct_sources
from merged_lora.factors import DTYPES
from merged_lora.plan import MergePlan, Random
from merged_lora.planning import make_plan
from merged_lora.reference.philox import draws
from merged_lora.spec import MergeSpec, Source

pytestmark = pytest.mark.filterwarnings("ignore:The density 1.0 is greater")  # PEFT's, where it keeps all

DENSITIES = (0.1, 0.3, 0.5, 0.77, 0.999, 1.0)
WEIGHTS = ((1.0,) * 5, (0.7, -0.4, 1.3, 0.0, 0.25), (0.0, -1.0, 0.5, 2.0, -0.1))
METHODS = ("total", "frequency")


def planned(
    strategy: str, weights: Sequence[float], sources: Mapping[str, Adapter], **options: float | str
) -> MergePlan:
    named = tuple(Source(name, w) for name, w in zip(sources, weights, strict=True))
    return make_plan(MergeSpec(strategy, named, tuple(options.items())), sources)


def peft_tensors(
    strategy: str,
    weights: Sequence[float],
    sources: Mapping[str, Adapter],
    density: float | None = None,
    majority_sign_method: str = "total",
) -> list[torch.Tensor]:
    """A and B of every module in order, by PEFT."""
    found: list[torch.Tensor] = []
    for module in sorted(SMALL):
        layer = {name: adapter.modules[module] for name, adapter in sources.items()}
        found += peers.merge_factors(strategy, layer, weights, density, majority_sign_method)
    return found


def assert_equal_to_rounding(plan: MergePlan, expected: Sequence[torch.Tensor]) -> None:
    for (job, ours), theirs in zip(jobs(plan, run(plan)), expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ((ours.double() - theirs.double()).abs() <= allowed_difference(job, theirs)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_linear_equals_peft(count: int, dtype: torch.dtype) -> None:
    sources = distinct_sources(SMALL, count, 8, dtype)
    for weights in WEIGHTS:
        w = weights[:count]
        assert_equal_to_rounding(planned("linear", w, sources), peft_tensors("linear", w, sources))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("density", DENSITIES)
def test_magnitude_prune_equals_peft(density: float, count: int, dtype: torch.dtype) -> None:
    sources = distinct_sources(SMALL, count, 8, dtype)
    for weights in WEIGHTS:
        w = weights[:count]
        plan = planned("magnitude_prune", w, sources, density=density)
        assert_equal_to_rounding(plan, peft_tensors("magnitude_prune", w, sources, density))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("density", DENSITIES)
def test_ties_equals_peft(density: float, count: int, dtype: torch.dtype) -> None:
    sources = distinct_sources(SMALL, count, 8, dtype)
    for weights in WEIGHTS:
        for method in METHODS:
            w = weights[:count]
            plan = planned("ties", w, sources, density=density, majority_sign_method=method)
            assert_equal_to_rounding(plan, peft_tensors("ties", w, sources, density, method))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", ["linear", "magnitude_prune", "ties"])
def test_two_sources_give_exactly_the_values_of_peft(strategy: str, dtype: torch.dtype) -> None:
    # Two terms have one sum, whatever the order, and dividing by 1 or 2 is exact: no rounding differs.
    sources = distinct_sources(SMALL, 2, 8, dtype)
    for a, b, *_ in WEIGHTS:
        plan = planned(strategy, (a, b), sources)
        for (_, ours), theirs in zip(
            jobs(plan, run(plan)), peft_tensors(strategy, (a, b), sources, 0.5), strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.25, 0.5])
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("dare_linear", {}),
        ("dare_ties", {"majority_sign_method": "total"}),
        ("dare_ties", {"majority_sign_method": "frequency"}),
    ],
)
def test_dare_equals_peft_under_the_same_masks(
    strategy: str,
    options: dict[str, str],
    density: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # PEFT draws its masks from a global generator; here it is handed ours.  The densities are powers of two,
    # because PEFT divides by them in the sources' dtype, and nothing else is exact there.
    sources, weights = distinct_sources(SMALL, 4, 8, dtype), WEIGHTS[1][:4]
    plan = planned(strategy, weights, sources, density=density, **options)
    masks = iter(
        [
            torch.from_numpy(draws(tensor.numel(), keep.key) < keep.share).reshape(tensor.shape)
            for job, _ in jobs(plan, run(plan))
            for tensor, keep in zip(job.inputs, job.rule.keeps, strict=True)
            if isinstance(keep, Random)
        ]
    )
    monkeypatch.setattr(
        merge_utils, "random_pruning", lambda tensor, density, rescale: tensor * next(masks) / density
    )
    expected = peft_tensors(strategy, weights, sources, density, **options)
    assert next(masks, None) is None
    assert_equal_to_rounding(plan, expected)
