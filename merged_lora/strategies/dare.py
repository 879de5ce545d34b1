"""DARE: drop entries at random and rescale the rest, so that the mean stays."""

from merged_lora.recipe import DENSITY, ELECT, EVERYWHERE, MAJORITY, SEED, Recipe, Strategy

DARE_LINEAR = Strategy(
    name="dare_linear",
    summary="drop entries at random, rescale the rest, then the weighted sum of the factors",
    recipe=Recipe(space="factors", keep="random"),
    options=(DENSITY, SEED, *EVERYWHERE),
    source="DARE, arXiv 2311.03099",
)
DARE_TIES = Strategy(
    name="dare_ties",
    summary="drop entries at random, rescale the rest, elect signs, average the sources that agree",
    recipe=Recipe(space="factors", keep="random", blend="agreeing_mean"),
    options=(DENSITY, MAJORITY, ELECT, SEED, *EVERYWHERE),
    source="DARE, arXiv 2311.03099, with TIES, arXiv 2306.01708",
)
