"""Writes mergekit_values.safetensors: what mergekit 0.1.5 makes of three small deltas and of their factors.

    pip install --no-deps mergekit==0.1.5
    python tests/agreement/mergekit_values.py

mergekit pins releases that vLLM does not go with, so the tests read these values instead of calling it.  Its
own functions make them, on float64 if they allow it; the weights are 1 where its conventions for other
weights are not ours.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mergekit.merge_methods.arcee_fusion import (  # type: ignore[import-not-found]
    arcee_fusion_merge_method,
)
from mergekit.merge_methods.base import TensorGroup  # type: ignore[import-not-found]
from mergekit.merge_methods.generalized_task_arithmetic import (  # type: ignore[import-not-found]
    ConsensusMethod,
    GeneralizedTaskArithmeticMerge,
)
from mergekit.merge_methods.karcher import karcher_merge_tensors  # type: ignore[import-not-found]
from mergekit.merge_methods.model_stock import model_stock_merge_method  # type: ignore[import-not-found]
from mergekit.merge_methods.multislerp import multislerp  # type: ignore[import-not-found]
from mergekit.merge_methods.nuslerp import nuslerp_merge_method  # type: ignore[import-not-found]
from mergekit.merge_methods.sce import sce_merge  # type: ignore[import-not-found]
from mergekit.sparsify import (  # type: ignore[import-not-found]
    SparsificationMethod,
    della_magprune,
)
from safetensors.torch import save_file

FILE = Path(__file__).with_suffix(".safetensors")
ROWS, COLUMNS, RANK = 24, 40, 4
SHARES = (0.5, 0.3, 0.2)


def merged(method: Any, tensors: Sequence[torch.Tensor], **parameters: object) -> torch.Tensor:
    """What a method of mergekit makes of the tensors, over a base of zeros."""
    base = torch.zeros_like(tensors[0])
    group = TensorGroup.from_tensors([base, *tensors], ids=["base", *range(len(tensors))], base_index=0)
    return method([group], parameters=parameters)[0]  # type: ignore[no-any-return]


def breadcrumbs(tensors: Sequence[torch.Tensor], consensus: ConsensusMethod | None) -> torch.Tensor:
    """Breadcrumbs, alone or with elected signs and the mean of those that agree."""
    method = GeneralizedTaskArithmeticMerge(
        consensus_method=consensus,
        sparsification_method=SparsificationMethod.magnitude_outliers,
        default_normalize=consensus is not None,
        default_rescale=False,
        method_name="breadcrumbs",
        method_pretty_name=None,
        method_reference_url=None,
    )
    return merged(method, tensors, weight=1.0, density=0.5, gamma=0.05)


def main() -> None:
    if version("mergekit") != "0.1.5":
        sys.exit(f"these are the values of mergekit 0.1.5, found {version('mergekit')}")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    a, b = [normal(RANK, COLUMNS) for _ in SHARES], [normal(ROWS, RANK) for _ in SHARES]
    deltas = [y.double() @ x.double() for x, y in zip(a, b, strict=True)]
    found: dict[str, torch.Tensor] = {f"a{i}": x for i, x in enumerate(a)}
    found |= {f"b{i}": x for i, x in enumerate(b)}
    for name, tensors in (("delta", deltas), ("a", [x.double() for x in a]), ("b", [x.double() for x in b])):
        found[f"{name} breadcrumbs"] = breadcrumbs(tensors, None)
        found[f"{name} breadcrumbs_ties"] = breadcrumbs(tensors, ConsensusMethod.sum)
        found[f"{name} sce"] = merged(sce_merge, tensors, select_topk=0.4)
    # Deltas of a usual size; the rows of larger ones are far from uniform, whatever they hold.
    found |= {f"arcee_fusion {i}": merged(arcee_fusion_merge_method, [x * 0.1]) for i, x in enumerate(deltas)}
    found["karcher"] = karcher_merge_tensors(deltas, SHARES, max_iter=500, tol=1e-13)
    found["multislerp"] = merged(multislerp, deltas, weight=dict(enumerate(SHARES)))
    found["nuslerp"] = merged(nuslerp_merge_method, deltas[:2], weight={0: 0.7, 1: 0.3})
    found["model_stock"] = merged(model_stock_merge_method, deltas)
    # Its random numbers are torch's: what is asked for is the chance with which each entry is kept.
    asked: list[torch.Tensor] = []
    torch.bernoulli = lambda chances: asked.append(chances) or chances  # type: ignore[assignment, func-returns-value]
    for x in (*a, *b):
        della_magprune(x, 0.5, 0.15)
    found |= {f"della {side}{i}": chance for (side, i), chance in zip(sides(), asked, strict=True)}
    save_file({name: x.contiguous() for name, x in found.items()}, FILE)
    print(f"{FILE}: {len(found)} tensors")


def sides() -> list[tuple[str, int]]:
    """The factors, in the order in which they are drawn."""
    return [(side, i) for side in "ab" for i in range(len(SHARES))]


if __name__ == "__main__":
    main()
