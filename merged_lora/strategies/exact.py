"""Strategies on the deltas themselves: what is asked for is what comes out, by small linear algebra."""

from merged_lora.recipe import EVERYWHERE, RANK, Recipe, Strategy, T

SUM = Strategy(
    name="sum",
    summary="weighted sum of the deltas; exact where the ranks fit the limit, else the best approximation",
    recipe=Recipe(space="delta", rank="fit"),
    options=EVERYWHERE,
    source="task arithmetic, arXiv 2212.04089",
)
CAT = Strategy(
    name="cat",
    summary="weighted sum of the deltas, always exact; refused where the ranks exceed the limit",
    recipe=Recipe(space="delta", rank="exact"),
    options=EVERYWHERE,
    source="PEFT combination_type='cat'",
)
SVD = Strategy(
    name="svd",
    summary="weighted sum of the deltas, the best approximation of a given rank",
    recipe=Recipe(space="delta", rank="truncate"),
    options=(RANK, *EVERYWHERE),
    source="PEFT combination_type='svd'; Eckart and Young 1936",
)
SLERP = Strategy(
    name="slerp",
    summary="spherical interpolation of exactly two deltas",
    recipe=Recipe(space="delta", blend="slerp", rank="fit"),
    options=(T, *EVERYWHERE),
    source="Shoemake 1985; per module, straight line where |cos| > 0.9995",
    sources_min=2,
    sources_max=2,
    ordered=True,
)
