"""Means on a sphere and towards the base: one scalar per source and module, from the deltas' inner products.

Weights are relative to their sum, and a source that lacks a module counts as a delta of zeros there.
"""

from merged_lora.recipe import EVERYWHERE, Recipe, Strategy

KARCHER = Strategy(
    name="karcher",
    summary="weighted Karcher mean of the deltas' directions, at the weighted mean of their lengths",
    recipe=Recipe(space="delta", blend="karcher", rank="fit"),
    options=EVERYWHERE,
    source="Karcher 1977; arXiv 2603.04972",
    sources_min=2,
)
MULTISLERP = Strategy(
    name="multislerp",
    summary="as karcher, in a single step from the mean of the directions",
    recipe=Recipe(space="delta", blend="multislerp", rank="fit"),
    options=EVERYWHERE,
    source="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    sources_min=2,
)
NUSLERP = Strategy(
    name="nuslerp",
    summary="slerp of exactly two deltas at the position that their weights give",
    recipe=Recipe(space="delta", blend="nuslerp", rank="fit"),
    options=EVERYWHERE,
    source="mergekit's NuSLERP",
    sources_min=2,
    sources_max=2,
)
MODEL_STOCK = Strategy(
    name="model_stock",
    summary="weighted mean of the deltas, shortened the more they point apart",
    recipe=Recipe(space="delta", blend="model_stock", rank="fit"),
    options=EVERYWHERE,
    source="Model Stock, arXiv 2403.19522",
    sources_min=2,
)
