"""Merges equal those of PEFT's own ``add_weighted_adapter`` on a model with adapters loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from agreement.comparing import merged
from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.bench import peers
from merged_lora.factors import Factors

SHAPES = {"embed": (32, 80), "q_proj": (48, 32), "down_proj": (16, 48)}
"""``(out, in)`` of each module; ``embed`` has 80 tokens."""
U = 2.0**-24
"""Unit roundoff of float32."""

pytestmark = pytest.mark.filterwarnings("ignore:Adapter name")  # PEFT's, about a name that is part of "lora_"


class Tiny(torch.nn.Module):
    """An embedding and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(80, 32)
        self.q_proj = torch.nn.Linear(32, 48, bias=False)
        self.down_proj = torch.nn.Linear(48, 16, bias=False)


def sources(*ranks: int) -> dict[str, Adapter]:
    return {
        name: random_adapter(SHAPES, rank, seed=i, scaling=float(i + 1), embeddings=["embed"])
        for i, (name, rank) in enumerate(zip("abcde", ranks, strict=False))
    }


def peft_merge(adapters: Mapping[str, Adapter], weights: list[float], **options: Any) -> dict[str, Factors]:
    """What ``add_weighted_adapter`` makes of the adapters, by module."""
    model: Any = None
    for name, adapter in adapters.items():
        scaling = adapter.modules["q_proj"].scaling
        config = LoraConfig(
            r=adapter.rank, lora_alpha=int(adapter.rank * scaling), target_modules=list(SHAPES)
        )
        if model is None:
            model = get_peft_model(Tiny(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        for module, f in adapter.modules.items():
            a, b = peft_factors(model, module, name)
            a.data.copy_(f.a)
            b.data.copy_(f.b)
    model.base_model.add_weighted_adapter(list(adapters), weights, "merged", **options)
    found = {}
    for module in SHAPES:
        a, b = peft_factors(model, module, "merged")
        scaling = getattr(model.base_model.model, module).scaling["merged"]
        found[module] = Factors(a.detach(), b.detach(), scaling, module == "embed")
    return found


def peft_factors(model: Any, module: str, name: str) -> tuple[Any, Any]:
    layer = getattr(model.base_model.model, module)
    if module == "embed":
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def dense(adapters: Mapping[str, Adapter], weights: list[float], module: str) -> torch.Tensor:
    """The weighted sum of the deltas in float64."""
    return sum(
        (w * a.modules[module].delta() for a, w in zip(adapters.values(), weights, strict=True)),
        torch.zeros(SHAPES[module], dtype=torch.float64),
    )


def text(weights: list[float]) -> str:
    return ", ".join(f"{w}*{name}" for w, name in zip(weights, "abcde", strict=False))


@pytest.mark.parametrize("strategy", ["cat", "sum"])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -0.4, 0.3], [0.0, 2.0, -1.0, 0.1, 0.5]], ids=str)
def test_cat_and_sum_have_the_delta_of_peft_cat(weights: list[float], strategy: str) -> None:
    adapters = sources(*(4, 6, 3, 1, 5)[: len(weights)])
    ours = merged(f"{strategy}({text(weights)})", adapters).modules
    theirs = peft_merge(adapters, weights, combination_type="cat")
    for module in SHAPES:
        assert ours[module].rank == theirs[module].rank == sum(a.rank for a in adapters.values())
        # B is copied; entries of A are rounded by us at w*s and at the product, by PEFT at w, at s and at two
        # products: six times u, which is 3.6e-7 of the sum of magnitudes.
        magnitude = sum(
            abs(w) * f.scaling * (f.b.double().abs() @ f.a.double().abs())
            for w, f in ((w, a.modules[module]) for w, a in zip(weights, adapters.values(), strict=True))
        )
        assert ((ours[module].delta() - theirs[module].delta()).abs() <= 6.01 * U * magnitude).all()


@pytest.mark.parametrize("rank", [1, 3, 6, 9])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -0.4, 0.3]], ids=str)
def test_svd_truncates_as_closely_as_peft(weights: list[float], rank: int) -> None:
    adapters = sources(*(4, 6, 3)[: len(weights)])
    ours = merged(f"svd({text(weights)}, rank={rank})", adapters).modules
    theirs = peft_merge(adapters, weights, combination_type="svd", svd_rank=rank)
    for module in SHAPES:
        target = dense(adapters, weights, module)
        assert ours[module].rank == rank
        our_error = (target - ours[module].delta()).norm()
        peft_error = (target - theirs[module].delta()).norm()
        assert abs(our_error - peft_error) <= 1e-4 * peft_error


def test_svd_without_a_rank_takes_the_largest_as_peft_does() -> None:
    adapters = sources(4, 6)
    theirs = peft_merge(adapters, [1.0, 1.0], combination_type="svd")
    ours = merged("svd(a, b)", adapters).modules
    assert {name: f.rank for name, f in ours.items()} == {name: f.rank for name, f in theirs.items()}


@pytest.mark.parametrize("strategy", ["linear", "ties", "magnitude_prune"])
def test_the_peer_of_the_other_tests_is_what_add_weighted_adapter_does(strategy: str) -> None:
    adapters, weights = sources(4, 4, 4), [1.0, -0.5, 0.0]
    real = peft_merge(adapters, weights, combination_type=strategy, density=0.5)
    for module in ("q_proj", "down_proj"):
        layer = {name: adapter.modules[module] for name, adapter in adapters.items()}
        a, b = peers.merge_factors(strategy, layer, weights, 0.5)
        assert torch.equal(real[module].a, a)
        assert torch.equal(real[module].b, b)
