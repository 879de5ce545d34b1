"""Weighted sums on the factors: fast, and an approximation (the product has cross terms)."""

from merged_lora.recipe import COMPAT, DENSITY, EVERYWHERE, Recipe, Strategy

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
