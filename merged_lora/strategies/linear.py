"""Weighted sums, entry by entry. On the factors: fast, and an approximation (the product has cross terms)."""

from merged_lora.recipe import COMPAT, DENSITY, EVERYWHERE, RANK, Recipe, Strategy

LINEAR = Strategy(
    name="linear",
    summary="weighted sum of the factors",
    recipe=Recipe(space="factors"),
    options=(COMPAT, *EVERYWHERE),
    source="PEFT combination_type='linear'",
)
MAGNITUDE_PRUNE = Strategy(
    name="magnitude_prune",
    summary="keep each source's largest entries, then the weighted sum of the factors",
    recipe=Recipe(space="factors", keep="largest"),
    options=(DENSITY, *EVERYWHERE),
    source="PEFT combination_type='magnitude_prune'",
)
MAGNITUDE_PRUNE_SVD = Strategy(
    name="magnitude_prune_svd",
    summary="magnitude_prune on the entries of the deltas, then the best approximation of a given rank",
    recipe=Recipe(space="delta", keep="largest", rank="truncate"),
    options=(DENSITY, RANK, *EVERYWHERE),
    source="PEFT combination_type='magnitude_prune_svd'",
)
CORE_LINEAR = Strategy(
    name="core_linear",
    summary="weighted sum of the coordinates of the deltas in shared bases of the result's rank",
    recipe=Recipe(space="core", rank="truncate", basis="both"),
    options=(RANK, *EVERYWHERE),
    source="Compress then Merge, arXiv 2606.03723",
)
CORE_MAGNITUDE_PRUNE = Strategy(
    name="core_magnitude_prune",
    summary="magnitude_prune on the coordinates of the deltas in shared bases of the result's rank",
    recipe=Recipe(space="core", keep="largest", rank="truncate", basis="both"),
    options=(DENSITY, RANK, *EVERYWHERE),
    source="Compress then Merge, arXiv 2606.03723",
)
