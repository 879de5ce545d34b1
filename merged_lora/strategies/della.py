"""DELLA: drop entries at random, small ones more often, and rescale each by its own chance to stay."""

from merged_lora.recipe import DENSITY, ELECT, EPSILON, EVERYWHERE, MAJORITY, RANK, SEED, Recipe, Strategy

DELLA = Strategy(
    name="della",
    summary="drop entries at random, the smaller of a row more often, rescale, then as ties",
    recipe=Recipe(space="factors", keep="graded", blend="agreeing_mean"),
    options=(DENSITY, EPSILON, MAJORITY, ELECT, SEED, *EVERYWHERE),
    source="DELLA-Merging, arXiv 2406.11617",
)
DELLA_LINEAR = Strategy(
    name="della_linear",
    summary="drop entries at random, the smaller of a row more often, rescale, then the weighted sum",
    recipe=Recipe(space="factors", keep="graded"),
    options=(DENSITY, EPSILON, SEED, *EVERYWHERE),
    source="DELLA-Merging, arXiv 2406.11617",
)
DELLA_SVD = Strategy(
    name="della_svd",
    summary="della on the entries of the deltas, then the best approximation of a given rank",
    recipe=Recipe(space="delta", keep="graded", blend="agreeing_mean", rank="truncate"),
    options=(DENSITY, EPSILON, MAJORITY, ELECT, SEED, RANK, *EVERYWHERE),
    source="DELLA-Merging, arXiv 2406.11617",
)
DELLA_LINEAR_SVD = Strategy(
    name="della_linear_svd",
    summary="della_linear on the entries of the deltas, then the best approximation of a given rank",
    recipe=Recipe(space="delta", keep="graded", rank="truncate"),
    options=(DENSITY, EPSILON, SEED, RANK, *EVERYWHERE),
    source="DELLA-Merging, arXiv 2406.11617",
)
