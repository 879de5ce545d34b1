"""THE table of strategies, in the order in which they are shown. A new strategy is one line here."""

from __future__ import annotations

from difflib import get_close_matches

from merged_lora.errors import UnknownStrategyError
from merged_lora.recipe import Strategy

from . import breadcrumbs, dare, della, exact, linear, means, sce, ties

TABLE: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        exact.SUM,
        exact.CAT,
        exact.SVD,
        exact.SLERP,
        means.NUSLERP,
        means.KARCHER,
        means.MULTISLERP,
        means.MODEL_STOCK,
        linear.LINEAR,
        ties.TIES,
        dare.DARE_LINEAR,
        dare.DARE_TIES,
        linear.MAGNITUDE_PRUNE,
        della.DELLA,
        della.DELLA_LINEAR,
        breadcrumbs.BREADCRUMBS,
        breadcrumbs.BREADCRUMBS_TIES,
        sce.SCE,
        ties.TIES_SVD,
        dare.DARE_LINEAR_SVD,
        dare.DARE_TIES_SVD,
        linear.MAGNITUDE_PRUNE_SVD,
        della.DELLA_SVD,
        della.DELLA_LINEAR_SVD,
        breadcrumbs.BREADCRUMBS_SVD,
        breadcrumbs.BREADCRUMBS_TIES_SVD,
        sce.SCE_SVD,
        ties.KNOTS,
        linear.CORE_LINEAR,
        ties.CORE_TIES,
        dare.CORE_DARE_LINEAR,
        dare.CORE_DARE_TIES,
        linear.CORE_MAGNITUDE_PRUNE,
    )
}


def find(name: str) -> Strategy:
    """The strategy of that name; raises UnknownStrategyError, listing those that exist."""
    strategy = TABLE.get(name)
    if strategy is None:
        alike = get_close_matches(name[:64].lower().replace("-", "_"), TABLE, 1)
        hint = f"did you mean {alike[0]}? There are" if alike else "there are"
        raise UnknownStrategyError(f"unknown strategy {name[:64]!r}; {hint}: {', '.join(TABLE)}")
    return strategy
