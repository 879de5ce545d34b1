"""SCE: select the entries on which the sources differ, weigh them by energy, erase minority signs."""

from merged_lora.recipe import EVERYWHERE, RANK, SELECT, Recipe, Strategy

SCE = Strategy(
    name="sce",
    summary="keep the entries that vary most between sources, average those that agree, by their energy",
    recipe=Recipe(space="factors", keep="varied", blend="energy_mean"),
    options=(SELECT, *EVERYWHERE),
    source="SCE in FuseChat, arXiv 2408.07990",
    sources_min=2,
)
SCE_SVD = Strategy(
    name="sce_svd",
    summary="sce on the entries of the deltas, then the best approximation of a given rank",
    recipe=Recipe(space="delta", keep="varied", blend="energy_mean", rank="truncate"),
    options=(SELECT, RANK, *EVERYWHERE),
    source="SCE in FuseChat, arXiv 2408.07990",
    sources_min=2,
)
