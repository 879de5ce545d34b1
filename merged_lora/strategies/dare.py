"""DARE: drop entries at random and rescale the rest, so that the mean stays."""

from merged_lora.recipe import DENSITY, ELECT, EVERYWHERE, MAJORITY, RANK, SEED, Recipe, Strategy

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
DARE_LINEAR_SVD = Strategy(
    name="dare_linear_svd",
    summary="dare_linear on the entries of the deltas, then the best approximation of a given rank",
    recipe=Recipe(space="delta", keep="random", rank="truncate"),
    options=(DENSITY, SEED, RANK, *EVERYWHERE),
    source="PEFT combination_type='dare_linear_svd'",
)
DARE_TIES_SVD = Strategy(
    name="dare_ties_svd",
    summary="dare_ties on the entries of the deltas, then the best approximation of a given rank",
    recipe=Recipe(space="delta", keep="random", blend="agreeing_mean", rank="truncate"),
    options=(DENSITY, MAJORITY, ELECT, SEED, RANK, *EVERYWHERE),
    source="PEFT combination_type='dare_ties_svd'",
)
CORE_DARE_LINEAR = Strategy(
    name="core_dare_linear",
    summary="dare_linear on the coordinates of the deltas in shared bases of the result's rank",
    recipe=Recipe(space="core", keep="random", rank="truncate", basis="both"),
    options=(DENSITY, SEED, RANK, *EVERYWHERE),
    source="Compress then Merge, arXiv 2606.03723, with DARE, arXiv 2311.03099",
)
CORE_DARE_TIES = Strategy(
    name="core_dare_ties",
    summary="dare_ties on the coordinates of the deltas in shared bases of the result's rank",
    recipe=Recipe(space="core", keep="random", blend="agreeing_mean", rank="truncate", basis="both"),
    options=(DENSITY, MAJORITY, ELECT, SEED, RANK, *EVERYWHERE),
    source="Compress then Merge, arXiv 2606.03723, with DARE, arXiv 2311.03099",
)
