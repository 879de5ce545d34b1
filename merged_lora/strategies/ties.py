"""TIES: trim, elect signs, and average only what agrees."""

from merged_lora.recipe import COMPAT, DENSITY, ELECT, EVERYWHERE, MAJORITY, RANK, SCOPE, Recipe, Strategy

TIES = Strategy(
    name="ties",
    summary="keep each source's largest entries, elect each entry's sign, average the sources that agree",
    recipe=Recipe(space="factors", keep="largest", blend="agreeing_mean"),
    options=(DENSITY, MAJORITY, ELECT, COMPAT, *EVERYWHERE),
    source="TIES-Merging, arXiv 2306.01708",
)
TIES_SVD = Strategy(
    name="ties_svd",
    summary="ties on the entries of the deltas, then the best approximation of a given rank",
    recipe=Recipe(space="delta", keep="largest", blend="agreeing_mean", rank="truncate"),
    options=(DENSITY, MAJORITY, ELECT, RANK, *EVERYWHERE),
    source="PEFT combination_type='ties_svd'",
)
KNOTS = Strategy(
    name="knots",
    summary="ties in the basis that a singular value decomposition of all deltas side by side gives",
    recipe=Recipe(space="core", keep="largest", blend="agreeing_mean", rank="fit", basis="output"),
    options=(DENSITY, MAJORITY, ELECT, SCOPE, *EVERYWHERE),
    source="KnOTS, arXiv 2410.19735",
)
CORE_TIES = Strategy(
    name="core_ties",
    summary="ties on the coordinates of the deltas in shared bases of the result's rank",
    recipe=Recipe(space="core", keep="largest", blend="agreeing_mean", rank="truncate", basis="both"),
    options=(DENSITY, MAJORITY, ELECT, RANK, *EVERYWHERE),
    source="Compress then Merge, arXiv 2606.03723",
)
