"""THE table of strategies, in the order in which they are shown. A new strategy is one line here."""

from __future__ import annotations

from merged_lora.errors import UnknownStrategyError
from merged_lora.recipe import Strategy

from . import dare, exact, linear, ties

TABLE: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        exact.SUM,
        exact.CAT,
        exact.SVD,
        exact.SLERP,
        linear.LINEAR,
        ties.TIES,
        dare.DARE_LINEAR,
        dare.DARE_TIES,
        linear.MAGNITUDE_PRUNE,
    )
}


def find(name: str) -> Strategy:
    """The strategy of that name; raises UnknownStrategyError, listing those that exist."""
    strategy = TABLE.get(name)
    if strategy is None:
        raise UnknownStrategyError(f"unknown strategy {name[:64]!r}; there are: {', '.join(TABLE)}")
    return strategy
