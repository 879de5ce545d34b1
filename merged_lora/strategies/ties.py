"""TIES: trim, elect signs, and average only what agrees."""

from merged_lora.recipe import COMPAT, DENSITY, ELECT, EVERYWHERE, MAJORITY, Recipe, Strategy

TIES = Strategy(
    name="ties",
    summary="keep each source's largest entries, elect each entry's sign, average the sources that agree",
    recipe=Recipe(space="factors", keep="largest", blend="agreeing_mean"),
    options=(DENSITY, MAJORITY, ELECT, COMPAT, *EVERYWHERE),
    source="TIES-Merging, arXiv 2306.01708",
)
