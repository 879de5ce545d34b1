"""THE table of strategies, in the order in which they are shown.

A strategy is a recipe, the options that follow from it, and where it comes from. Rows on entries of deltas
and on coordinates are derived from the rows on factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches

from .errors import UnknownStrategyError
from .recipe import (
    COMPAT,
    DENSITY,
    ELECT,
    EPSILON,
    EVERYWHERE,
    GAMMA,
    MAJORITY,
    RANK,
    SCOPE,
    SEED,
    SELECT,
    SHRINK,
    KeepRule,
    Option,
    Recipe,
    Strategy,
    T,
)

BREADCRUMBS = "Model Breadcrumbs, arXiv 2312.06795"
COMPRESS = "Compress then Merge, arXiv 2606.03723"
DARE = "DARE, arXiv 2311.03099"
DELLA = "DELLA-Merging, arXiv 2406.11617"
SCE = "SCE in FuseChat, arXiv 2408.07990"
TIES = "TIES, arXiv 2306.01708"

KEPT_BY: dict[KeepRule, tuple[Option, ...]] = {
    "all": (),
    "largest": (DENSITY,),
    "middle": (DENSITY, GAMMA),
    "random": (DENSITY,),
    "graded": (DENSITY, EPSILON),
    "varied": (SELECT,),
    "important": (),
}
"""The options that each keep rule takes."""


def options_of(recipe: Recipe, *own: Option) -> tuple[Option, ...]:
    """The options that follow from a recipe.

    own: those that no recipe implies.
    """
    vote = (MAJORITY, ELECT) if recipe.blend == "agreeing_mean" else ()
    seed = (SEED,) if recipe.keep in ("random", "graded") else ()
    rank = (RANK,) if recipe.rank == "truncate" else ()
    return (*KEPT_BY[recipe.keep], *vote, *seed, *own, *rank, *EVERYWHERE)


def row(
    name: str,
    recipe: Recipe,
    summary: str,
    source: str,
    *own: Option,
    sources: tuple[int, int | None] = (1, None),
    ordered: bool = False,
) -> Strategy:
    """A row of the table.

    own:     options that no recipe implies.
    sources: the least and the greatest number of sources, None for any.
    ordered: whether the order of the sources matters.
    """
    return Strategy(name, summary, recipe, options_of(recipe, *own), source, *sources, ordered)


def on_entries(base: Strategy, source: str | None = None) -> Strategy:
    """The strategy on the entries of the deltas instead of on the factors.

    source: where that comes from, if not from where the base does.
    """
    recipe = replace(base.recipe, space="entries", rank="truncate")
    return replace(
        base,
        name=f"{base.name}_svd",
        summary=f"{base.name} on the entries of the deltas, then the best approximation of a given rank",
        recipe=recipe,
        options=options_of(recipe),
        source=source or base.source,
    )


def on_coordinates(base: Strategy, summary: str | None = None, source: str = COMPRESS) -> Strategy:
    """The strategy on the coordinates of the deltas in bases that the sources share.

    summary: what it does, if not what the base does on the coordinates.
    source:  where that comes from.
    """
    recipe = replace(base.recipe, space="core", rank="truncate", basis="both")
    what = summary or f"{base.name} on the coordinates"
    return replace(
        base,
        name=f"core_{base.name}",
        summary=f"{what} of the deltas in shared bases of the result's rank",
        recipe=recipe,
        options=options_of(recipe),
        source=source,
    )


def _rows() -> Iterator[Strategy]:
    # Weighted sums of the deltas: what is asked for is what comes out.
    yield row(
        "sum",
        Recipe("sums", rank="fit"),
        "weighted sum of the deltas; exact if the ranks fit the limit, else the best approximation",
        "task arithmetic, arXiv 2212.04089",
    )
    yield row(
        "cat",
        Recipe("sums", rank="exact"),
        "weighted sum of the deltas, always exact; refused if the ranks exceed the limit",
        "PEFT combination_type='cat'",
    )
    yield row(
        "svd",
        Recipe("sums", rank="truncate"),
        "weighted sum of the deltas, the best approximation of a given rank",
        "PEFT combination_type='svd'; Eckart and Young 1936",
    )

    # Means on a sphere or towards the base: one scalar for each source and module, from inner products.
    # All but slerp take the weights relative to their sum.
    yield row(
        "slerp",
        Recipe("sums", blend="slerp", rank="fit"),
        "spherical interpolation of exactly two deltas",
        "Shoemake 1985; per module, straight line where |cos| > 0.9995",
        T,
        sources=(2, 2),
        ordered=True,
    )
    yield row(
        "nuslerp",
        Recipe("sums", blend="nuslerp", rank="fit"),
        "slerp of exactly two deltas at the position that their weights give",
        "mergekit's NuSLERP",
        sources=(2, 2),
    )
    yield row(
        "karcher",
        Recipe("sums", blend="karcher", rank="fit"),
        "weighted Karcher mean of the deltas' directions, at the weighted mean of their lengths",
        "Karcher 1977; arXiv 2603.04972",
        sources=(2, None),
    )
    yield row(
        "multislerp",
        Recipe("sums", blend="multislerp", rank="fit"),
        "as karcher, in a single step from the mean of the directions",
        "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        sources=(2, None),
    )
    yield row(
        "model_stock",
        Recipe("sums", blend="model_stock", rank="fit"),
        "weighted mean of the deltas, shortened the more they point apart",
        "Model Stock, arXiv 2403.19522",
        sources=(2, None),
    )

    yield row(
        "iso",
        Recipe("sums", blend="balanced", rank="truncate", flat=True),
        "sum of the deltas at equal lengths, with all singular values made equal: 1.3 times their mean",
        "isotropic merging, arXiv 2502.04959; the balance and the factor are ours",
    )

    # On the outputs for each source's own inputs: needs a calibration of every source.
    yield row(
        "regmean",
        Recipe("outputs", rank="truncate"),
        "the delta whose outputs are closest to those of each source on its own inputs, by least squares",
        "RegMean, arXiv 2212.09849, on deltas, with the inputs in compact form",
        SHRINK,
    )

    # Entry by entry on the factors: fast, and an approximation, because the product has cross terms.
    linear = row(
        "linear",
        Recipe("factors"),
        "weighted sum of the factors",
        "PEFT combination_type='linear'",
        COMPAT,
    )
    ties = row(
        "ties",
        Recipe("factors", keep="largest", blend="agreeing_mean"),
        "keep each source's largest entries, elect each entry's sign, average the sources that agree",
        "TIES-Merging, arXiv 2306.01708",
        COMPAT,
    )
    dare_linear = row(
        "dare_linear",
        Recipe("factors", keep="random"),
        "drop entries at random, rescale the rest, then the weighted sum of the factors",
        DARE,
    )
    dare_ties = row(
        "dare_ties",
        Recipe("factors", keep="random", blend="agreeing_mean"),
        "drop entries at random, rescale the rest, elect signs, average the sources that agree",
        f"{DARE}, with {TIES}",
    )
    magnitude_prune = row(
        "magnitude_prune",
        Recipe("factors", keep="largest"),
        "keep each source's largest entries, then the weighted sum of the factors",
        "PEFT combination_type='magnitude_prune'",
    )
    della = row(
        "della",
        Recipe("factors", keep="graded", blend="agreeing_mean"),
        "drop entries at random, the smaller of a row more often, rescale, then as ties",
        DELLA,
    )
    della_linear = row(
        "della_linear",
        Recipe("factors", keep="graded"),
        "drop entries at random, the smaller of a row more often, rescale, then the weighted sum",
        DELLA,
    )
    breadcrumbs = row(
        "breadcrumbs",
        Recipe("factors", keep="middle"),
        "leave out each source's outliers and its smallest entries, then the weighted sum",
        BREADCRUMBS,
    )
    breadcrumbs_ties = row(
        "breadcrumbs_ties",
        Recipe("factors", keep="middle", blend="agreeing_mean"),
        "leave out each source's outliers and its smallest entries, then as ties",
        f"{BREADCRUMBS}, with {TIES}",
    )
    sce = row(
        "sce",
        Recipe("factors", keep="varied", blend="energy_mean"),
        "keep the entries that vary most between sources, average those that agree, by their energy",
        SCE,
        sources=(2, None),
    )
    yield from (linear, ties, dare_linear, dare_ties, magnitude_prune, della, della_linear)
    yield from (breadcrumbs, breadcrumbs_ties, sce)

    # The same on the entries of the deltas.
    yield on_entries(ties, "PEFT combination_type='ties_svd'")
    yield on_entries(dare_linear, "PEFT combination_type='dare_linear_svd'")
    yield on_entries(dare_ties, "PEFT combination_type='dare_ties_svd'")
    yield on_entries(magnitude_prune, "PEFT combination_type='magnitude_prune_svd'")
    yield from map(on_entries, (della, della_linear, breadcrumbs, breadcrumbs_ties, sce))

    yield row(
        "arcee_fusion",
        Recipe("entries", keep="important", rank="truncate"),
        "keep the entries of each delta that stand out in importance, sum, then the best approximation",
        "mergekit's Arcee Fusion, on deltas over a base of zeros",
    )

    # On coordinates in bases that the sources share.
    yield row(
        "knots",
        Recipe("core", keep="largest", blend="agreeing_mean", rank="fit", basis="output"),
        "ties in the basis that a singular value decomposition of all deltas side by side gives",
        "KnOTS, arXiv 2410.19735",
        SCOPE,
    )
    yield on_coordinates(linear, "weighted sum of the coordinates")
    yield on_coordinates(ties)
    yield on_coordinates(dare_linear, source=f"{COMPRESS}, with {DARE}")
    yield on_coordinates(dare_ties, source=f"{COMPRESS}, with {DARE}")
    yield on_coordinates(magnitude_prune)


TABLE: dict[str, Strategy] = {strategy.name: strategy for strategy in _rows()}


def find(name: str) -> Strategy:
    """The strategy of that name; raises UnknownStrategyError, which lists those that exist."""
    strategy = TABLE.get(name)
    if strategy is None:
        alike = get_close_matches(name[:64].lower().replace("-", "_"), TABLE, 1)
        hint = f"did you mean {alike[0]}? There are" if alike else "there are"
        raise UnknownStrategyError(f"unknown strategy {name[:64]!r}; {hint}: {', '.join(TABLE)}")
    return strategy
