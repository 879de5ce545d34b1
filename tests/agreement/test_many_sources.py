"""Merges of more sources than a server accepts by default."""

from __future__ import annotations

import functools

import pytest
import torch

from agreement.comparing import assert_same_bits, merged
from agreement.test_bits import EXACT
from making import SMALL, random_adapter
from merged_lora.adapters import Adapter
from merged_lora.spec import MAX_SOURCES
from merged_lora.strategies import TABLE

MANY = 24
SHAPES = {name: SMALL[name] for name in list(SMALL)[:2]}
BITS = [s.name for s in EXACT]
ANY_NUMBER = [s for s in TABLE.values() if s.sources_max is None]


@functools.cache
def sources(count: int = MANY, rank: int = 2) -> dict[str, Adapter]:
    """That many adapters, ``s000`` and so on."""
    return {f"s{i:03}": random_adapter(SHAPES, rank, seed=i) for i in range(count)}


def spec_of(strategy: str) -> str:
    """A merge of all 24 sources with weights from 0.5 to 1."""
    terms = [f"{0.5 + i / MANY / 2}*{name}" for i, name in enumerate(sources())]
    return f"{strategy}({', '.join(terms)})"


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", [s.name for s in ANY_NUMBER])
def test_every_strategy_merges_24_sources_as_the_reference_does(strategy: str, backend: str) -> None:
    spec = spec_of(strategy)
    ours, theirs = merged(spec, sources(), backend), merged(spec, sources(), "numpy")
    if strategy in BITS:
        assert_same_bits(ours, theirs)
    for name, expected in theirs.modules.items():
        got, target = ours.modules[name].delta(), expected.delta()
        if TABLE[strategy].recipe.space != "entries":
            assert float((got - target).norm() / target.norm()) <= 1e-5  # as float32 factors are rounded
        else:  # where the reference makes the least error that there is
            (kept, asked), (most, same) = ours.energy[name], theirs.energy[name]
            assert asked == pytest.approx(same, rel=1e-5)
            assert asked - kept <= 1.01**2 * (same - most) + 1e-5 * same


@pytest.mark.parametrize("count", [20, 50, 100, MAX_SOURCES])
def test_a_sum_of_many_sources_is_the_sum_of_their_deltas(count: int) -> None:
    adapters = sources(count, 1)
    made = merged(f"cat({', '.join(adapters)})", adapters)
    for name, factors in made.modules.items():
        expected = sum(adapter.modules[name].delta() for adapter in adapters.values())
        assert isinstance(expected, torch.Tensor)
        assert factors.rank == count
        # A is rounded once to float32, and no entry of a product is larger than the norms of its factors.
        bound = 2.0**-24 * sum(
            float(2 * a.modules[name].a.norm() * a.modules[name].b.norm()) for a in adapters.values()
        )
        assert float((factors.delta() - expected).abs().max()) <= bound
