"""Proposals of merges: each is one that the strategy takes, and the defaults are what users are advised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from merged_lora.judging.proposals import DEFAULTS, STRATEGIES, defaults, proposal
from merged_lora.spec import parse
from merged_lora.strategies import TABLE, find

SOURCES = ("chat", "sql")


class Drawn:
    """Suggests what a seed draws; one in four numbers is an end of its range."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.ranges: dict[str, tuple[float, float]] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return choices[int(self._rng.integers(len(choices)))]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        del log
        self.ranges[name] = low, high
        ends = [low, high, *self._rng.uniform(low, high, 6)]
        return float(ends[int(self._rng.integers(len(ends)))])


@pytest.mark.parametrize("strategy", TABLE)
def test_a_proposal_is_a_merge_that_can_be_written_and_read(strategy: str) -> None:
    for seed in range(40):
        made = proposal(Drawn(seed), SOURCES, [strategy], [4, 8])
        assert parse(str(made)) == made
        assert (made.strategy, set(made.names)) == (strategy, set(SOURCES))


@pytest.mark.parametrize("strategy", TABLE)
def test_a_default_is_within_the_ranges_of_the_search(strategy: str) -> None:
    for made, params in defaults(SOURCES, [strategy], []):
        assert made.strategy == strategy
        drawn = Drawn(0)
        for seed in range(20):  # until every branch was drawn
            drawn._rng = np.random.default_rng(seed)
            proposal(drawn, SOURCES, [strategy], [])
        for name, value in params.items():
            if name in drawn.ranges:
                low, high = drawn.ranges[name]
                assert low <= value <= high, name


def test_a_strategy_without_advice_begins_with_its_own_defaults() -> None:
    ((made, _),) = defaults(SOURCES, ["dare_ties"], [])
    assert str(made) == "dare_ties(chat, sql)"


def test_defaults_are_those_that_are_advised() -> None:
    made = [str(spec) for spec, _ in defaults(SOURCES, STRATEGIES, [8])]
    assert len(made) == len(DEFAULTS)
    assert made[0] == "regmean(chat, sql)"
    assert 'knots(chat, sql, weights="auto")' in made


def test_automatic_weights_leave_the_sources_none_and_scale_what_they_make() -> None:
    for seed in range(40):
        made = proposal(Drawn(seed), SOURCES, ["sum"], [])
        if made.option("weights") == "auto":
            assert [source.weight for source in made.sources] == [1.0, 1.0]
        else:
            assert "scale" not in dict(made.options)
    assert find("sum").option("scale") is not None
