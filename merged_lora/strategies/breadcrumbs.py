"""Model breadcrumbs: leave out the smallest entries, and the few largest too."""

from merged_lora.recipe import DENSITY, ELECT, EVERYWHERE, GAMMA, MAJORITY, RANK, Recipe, Strategy

BREADCRUMBS = Strategy(
    name="breadcrumbs",
    summary="leave out each source's outliers and its smallest entries, then the weighted sum",
    recipe=Recipe(space="factors", keep="middle"),
    options=(DENSITY, GAMMA, *EVERYWHERE),
    source="Model Breadcrumbs, arXiv 2312.06795",
)
BREADCRUMBS_TIES = Strategy(
    name="breadcrumbs_ties",
    summary="leave out each source's outliers and its smallest entries, then as ties",
    recipe=Recipe(space="factors", keep="middle", blend="agreeing_mean"),
    options=(DENSITY, GAMMA, MAJORITY, ELECT, *EVERYWHERE),
    source="Model Breadcrumbs, arXiv 2312.06795, with TIES, arXiv 2306.01708",
)
BREADCRUMBS_SVD = Strategy(
    name="breadcrumbs_svd",
    summary="breadcrumbs on the entries of the deltas, then the best approximation of a given rank",
    recipe=Recipe(space="delta", keep="middle", rank="truncate"),
    options=(DENSITY, GAMMA, RANK, *EVERYWHERE),
    source="Model Breadcrumbs, arXiv 2312.06795",
)
BREADCRUMBS_TIES_SVD = Strategy(
    name="breadcrumbs_ties_svd",
    summary="breadcrumbs_ties on the entries of the deltas, then the best approximation of a given rank",
    recipe=Recipe(space="delta", keep="middle", blend="agreeing_mean", rank="truncate"),
    options=(DENSITY, GAMMA, MAJORITY, ELECT, RANK, *EVERYWHERE),
    source="Model Breadcrumbs, arXiv 2312.06795, with TIES, arXiv 2306.01708",
)
