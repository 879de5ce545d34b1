"""PEFT's own merges, called as its ``LoraModel.add_weighted_adapter`` calls them, without a model around."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from merged_lora.factors import Factors


def _model() -> Any:
    """PEFT's class; its methods are called without an instance, which they do not use."""
    from peft.tuners.lora.model import LoraModel  # takes seconds

    return LoraModel


def merge_factors(
    strategy: str,
    sources: Mapping[str, Factors],
    weights: Sequence[float],
    density: float | None = None,
    majority_sign_method: str = "total",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``A [rank, in]`` and ``B [out, rank]`` of one module, by a strategy that works on the factors."""
    a, b = _model()._generalized_task_arithmetic_weighted_adapter(
        None, strategy, list(sources), list(weights), _layer(sources), density, majority_sign_method
    )
    return a, b


def merge_svd(
    sources: Mapping[str, Factors],
    weights: Sequence[float],
    rank: int,
    strategy: str = "svd",
    density: float | None = None,
    majority_sign_method: str = "total",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``A [rank, in]`` and ``B [out, rank]`` of one module, by an SVD of the dense merged delta."""
    a, b = _model()._svd_generalized_task_arithmetic_weighted_adapter(
        None,
        strategy,
        list(sources),
        list(weights),
        rank,
        _layer(sources),
        None,
        None,
        density,
        majority_sign_method,
    )
    return a, b


def svd_work(shape: tuple[int, int]) -> float:
    """Operations of :func:`merge_svd`'s full SVD (Golub and Van Loan, 4th edition, figure 8.6.1)."""
    n, m = sorted(shape)
    return float(4 * m * m * n + 8 * m * n * n + 9 * n**3)


def _layer(sources: Mapping[str, Factors]) -> SimpleNamespace:
    """The attributes of a ``LoraLayer`` that those methods read."""
    return SimpleNamespace(
        lora_A={name: SimpleNamespace(weight=f.a) for name, f in sources.items()},
        lora_B={name: SimpleNamespace(weight=f.b) for name, f in sources.items()},
        lora_embedding_A={},
        scaling={name: f.scaling for name, f in sources.items()},
        get_delta_weight=lambda name: sources[name].b @ sources[name].a * sources[name].scaling,
    )
