"""Staging finds out whether a merge can be made, before any slot is touched."""

from __future__ import annotations

import pytest
import torch

from agreement.comparing import run
from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.backends import SlotBackend, load_backend
from merged_lora.errors import PlanError
from merged_lora.factors import DTYPES, Factors
from merged_lora.planning import make_plan
from merged_lora.spec import parse

SHAPES = {"m.q": (24, 40), "m.down": (40, 24)}


def kept(spec: str, adapters: dict[str, Adapter], dtype: torch.dtype = torch.float32) -> float:
    """The share of the squared norm that a staged merge reports; of slots of that dtype."""
    backend = load_backend("triton")
    assert isinstance(backend, SlotBackend)
    return backend.stage(make_plan(parse(spec), adapters), dtype).result.kept_energy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("spec", "full"),
    [
        ("linear(a, b)", "a"),
        ("linear(a, b)", "b"),
        ("ties(2*a, 2*b)", "a"),
        ("ties(2*a, 2*b)", "b"),
        ("cat(4*a, b)", "a"),  # a concatenation has its weights on A
        ("svd(a, b, rank=1)", "ab"),  # singular values are split evenly
    ],
)
def test_an_overflow_is_found_and_its_module_named(spec: str, full: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    a = torch.full((1, 9), largest if "a" in full else 1.0, dtype=dtype)
    b = torch.full((9, 1), largest if "b" in full else 1.0, dtype=dtype)
    good = random_adapter({"good": (9, 9)}, 1, dtype).modules["good"]
    adapter = Adapter({"good": good, "up_proj": Factors(a, b)})
    with pytest.raises(PlanError, match="overflows its dtype in up_proj; use smaller weights"):
        kept(spec, {"a": adapter, "b": adapter})


@pytest.mark.parametrize("spec", ["linear(a, 0.25*b)", "cat(a, b)", "svd(a, 0.25*b)"])
def test_a_result_that_fits_its_own_dtype_is_not_refused_for_that_of_the_slots(spec: str) -> None:
    # As for an adapter on disk: what overflows there is the slot's affair.
    large = Adapter({"m": Factors(torch.full((1, 9), 1e6), torch.ones(9, 1))})
    assert kept(spec, {"a": large, "b": large}, torch.float16) == pytest.approx(1.0)


@pytest.mark.parametrize("spec", ["linear(a, 0.5*b)", "cat(a, b)", "sum(a, b)", "dare_ties(a, b)"])
def test_where_no_rank_is_cut_everything_is_kept(spec: str) -> None:
    adapters = {name: random_adapter(SHAPES, 4, torch.bfloat16, i) for i, name in enumerate("ab")}
    assert kept(spec, adapters) == 1.0


def test_the_kept_energy_is_that_of_the_merge() -> None:
    adapters = {name: random_adapter(SHAPES, 4, torch.float32, i) for i, name in enumerate("ab")}
    spec = "svd(a, 0.5*b, rank=3)"
    expected = run(make_plan(parse(spec), adapters), "numpy").kept_energy()
    assert 0.1 < expected < 0.99
    # Squares of singular values, here good to a few float64 roundings (2e-16) of the largest, eight of them.
    assert kept(spec, adapters) == pytest.approx(expected, rel=1e-13)
