"""Merges on the entries of the deltas truncate as closely to PEFT's target as PEFT does."""

from __future__ import annotations

import pytest
import torch
from peft.utils import merge_utils

from agreement.comparing import merged
from making import SMALL, random_adapter
from merged_lora.adapters import Adapter
from merged_lora.bench import peers
from merged_lora.plan import EntryModule, Random
from merged_lora.planning import make_plan
from merged_lora.reference.philox import draws
from merged_lora.spec import parse

WEIGHTS = {"a": 1.0, "b": -0.5, "c": 0.7}
TERMS = "a, -0.5*b, 0.7*c"


def sources() -> dict[str, Adapter]:
    return {name: random_adapter(SMALL, 4 + i, seed=i, scaling=0.5 + i) for i, name in enumerate("abc")}


def assert_as_close(spec: str, strategy: str, density: float, method: str, rank: int, backend: str) -> None:
    """The same truncation error to 1e-3, both measured from the dense delta that PEFT merges."""
    adapters = sources()
    ours = merged(spec, adapters, backend).modules
    rule = getattr(merge_utils, strategy.removesuffix("_svd"))
    options = (density, method) if "ties" in strategy else (density,)
    for module in SMALL:
        layer = {name: adapter.modules[module] for name, adapter in adapters.items()}
        target = rule([f.delta() for f in layer.values()], torch.tensor(list(WEIGHTS.values())), *options)
        a, b = peers.merge_svd(layer, list(WEIGHTS.values()), rank, strategy, density, method)
        our_error = (target - ours[module].delta()).norm()
        peft_error = (target - b.double() @ a.double()).norm()
        assert abs(our_error - peft_error) <= 1e-3 * peft_error


@pytest.mark.parametrize("backend", ["cpu", "numpy", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("density", [0.5, 0.2])
@pytest.mark.parametrize("rank", [3, 6])
@pytest.mark.parametrize("method", ["total", "frequency"])
def test_ties_svd(method: str, rank: int, density: float, backend: str) -> None:
    spec = f'ties_svd({TERMS}, density={density}, majority_sign_method="{method}", rank={rank})'
    assert_as_close(spec, "ties_svd", density, method, rank, backend)


@pytest.mark.parametrize("backend", ["cpu", "numpy", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("density", [0.5, 0.2])
def test_magnitude_prune_svd(density: float, backend: str) -> None:
    spec = f"magnitude_prune_svd({TERMS}, density={density}, rank=5)"
    assert_as_close(spec, "magnitude_prune_svd", density, "total", 5, backend)


@pytest.mark.parametrize("strategy", ["dare_linear_svd", "dare_ties_svd"])
def test_dare_with_the_same_masks(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, rank = f"{strategy}({TERMS}, density=0.5, rank=5)", 5
    plan = make_plan(parse(spec), sources())
    ours = merged(spec, sources()).modules
    rule = getattr(merge_utils, strategy.removesuffix("_svd"))
    for name, module in plan.modules.items():
        assert isinstance(module, EntryModule)
        masks = [
            torch.from_numpy(draws(x.size, keep.key).reshape(x.shape) < keep.share).double()
            for x, keep in (
                (f.delta().numpy(), keep) for f, keep in zip(module.sources, module.rule.keeps, strict=True)
            )
            if isinstance(keep, Random)
        ]
        given = iter(masks)
        monkeypatch.setattr(torch, "bernoulli", lambda chances, given=given: next(given))
        deltas = [f.delta() for f in module.sources]
        target = rule(deltas, torch.tensor(list(WEIGHTS.values())), 0.5)
        least = float(torch.linalg.svdvals(target)[rank:].norm())
        assert float((target - ours[name].delta()).norm()) == pytest.approx(least, rel=1e-3)
