"""DARE's masks: their share, their mean, and what they depend on."""

from __future__ import annotations

import math

import pytest
import torch

from agreement.comparing import merged, plan_of, run
from merged_lora.adapters import Adapter
from merged_lora.factors import Factors
from merged_lora.plan import SHARES, Random

CERTAINTY = math.log(2 / 1e-9) / 2
"""Hoeffding: a sum of independent terms with ranges c_i leaves its mean by t with probability at most
2 exp(-2 t^2 / sum c_i^2), so t = sqrt(CERTAINTY * sum c_i^2) fails once in 10^9."""

COUNT = 40_000


def adapter(seed: int, modules: tuple[str, ...] = ("m",)) -> Adapter:
    """Square factors of COUNT entries, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    shape = (200, COUNT // 200)
    return Adapter(
        {
            name: Factors(
                1 + torch.rand(shape, generator=generator), -1 - torch.rand(shape, generator=generator).T
            )
            for name in modules
        }
    )


def mask(spec: str, adapters: dict[str, Adapter], module: str = "m", side: str = "a") -> torch.Tensor:
    """Which entries a merge kept, for sources whose entries have one sign."""
    f = merged(spec, adapters).modules[module]
    return (f.a if side == "a" else f.b) != 0


def assert_independent(x: torch.Tensor, y: torch.Tensor) -> None:
    """Two fair masks: they agree on half of the entries."""
    agreeing = (x.reshape(-1) == y.reshape(-1)).sum().item()
    assert abs(agreeing - COUNT / 2) <= math.sqrt(CERTAINTY * COUNT)


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_share_of_density_is_kept(density: float, side: str) -> None:
    kept = mask(f"dare_linear(a, density={density})", {"a": adapter(0)}, side=side).sum().item()
    # Shares are whole 65536ths; beyond that only chance.
    assert abs(kept - density * COUNT) <= math.sqrt(CERTAINTY * COUNT) + COUNT / (2 * SHARES)


def test_density_1_keeps_everything_unscaled() -> None:
    sources = {"a": adapter(0), "b": adapter(1)}
    dare, linear = merged("dare_linear(a, 0.3*b, density=1)", sources), merged("linear(a, 0.3*b)", sources)
    assert torch.equal(dare.modules["m"].a, linear.modules["m"].a)
    assert torch.equal(dare.modules["m"].b, linear.modules["m"].b)


@pytest.mark.parametrize("strategy", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_the_mean_of_the_entries_is_preserved(density: float, strategy: str) -> None:
    source = adapter(0)
    result = merged(f"{strategy}(a, density={density})", {"a": source}).modules["m"].a.double()
    x = source.modules["m"].a.double()
    # Each term is 0 or x * 65536/share, so its range is that; its mean is x except for the rounding of the
    # rescale and of the product to float32, 2^-24 each.
    ranges = x * SHARES / round(density * SHARES)
    slack = 2 * 2.0**-24 * ranges.sum()
    assert abs(result.sum() - x.sum()) <= torch.sqrt(CERTAINTY * (ranges**2).sum()) + slack


def test_what_is_kept_is_multiplied_by_the_inverse_of_the_share() -> None:
    source = adapter(0)
    result = merged("dare_linear(a, density=0.25)", {"a": source}).modules["m"].a
    kept = result != 0
    assert torch.equal(result[kept], 4 * source.modules["m"].a[kept])


def test_sources_have_different_masks() -> None:
    sources = {"a": adapter(0), "b": adapter(1)}
    assert_independent(mask("dare_linear(a)", sources), mask("dare_linear(b)", sources))


def test_modules_have_different_masks() -> None:
    # The same values under two names: what differs is the name alone.
    one = adapter(0).modules["m"]
    sources = {"a": Adapter({"m": one, "n": one})}
    assert_independent(mask("dare_linear(a)", sources, "m"), mask("dare_linear(a)", sources, "n"))


def test_the_two_factors_have_different_masks() -> None:
    one = adapter(0).modules["m"].a
    sources = {"a": Adapter({"m": Factors(one, one)})}
    assert_independent(mask("dare_linear(a)", sources), mask("dare_linear(a)", sources, side="b"))


def test_seeds_give_different_masks() -> None:
    sources = {"a": adapter(0)}
    assert_independent(mask("dare_linear(a)", sources), mask("dare_linear(a, seed=1)", sources))


def test_the_same_spec_gives_the_same_mask_every_time() -> None:
    assert torch.equal(mask("dare_linear(a)", {"a": adapter(0)}), mask("dare_linear(a)", {"a": adapter(0)}))


def test_a_mask_does_not_depend_on_the_other_sources_or_on_the_name() -> None:
    alone = mask("dare_linear(a)", {"a": adapter(0)})
    among = mask("dare_linear(0*a, x, 0*z)", {"a": adapter(1), "x": adapter(0), "z": adapter(2)})
    assert torch.equal(alone, among)


def test_a_larger_density_keeps_what_a_smaller_one_kept() -> None:
    sources = {"a": adapter(0)}
    fewer, more = mask("dare_linear(a, density=0.3)", sources), mask("dare_linear(a, density=0.6)", sources)
    assert not (fewer & ~more).any()


@pytest.mark.parametrize("backend", ["cpu", "numpy", "triton"])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 1023, 1024, 1025, 5000])
def test_an_entry_is_kept_or_not_whatever_follows_it(count: int, backend: str) -> None:
    def kept(size: int) -> torch.Tensor:
        keep = Random(share=SHARES // 2, key=0xFEDCBA9876543210)
        return run(plan_of(torch.ones(size), keep), backend).modules["m"].a[0]

    assert torch.equal(kept(count), kept(6000)[:count])
