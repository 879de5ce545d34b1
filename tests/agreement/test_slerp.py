"""``slerp`` equals the closed form on dense deltas in float64, though it never forms one."""

from __future__ import annotations

import math

import pytest
import torch

from agreement.comparing import merged
from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.factors import Factors

U = 2.0**-24
"""Unit roundoff of float32."""
SHAPES = {"m": (40, 56), "n": (24, 30)}


def closed_form(x: torch.Tensor, y: torch.Tensor, t: float) -> tuple[float, float]:
    """Shoemake's weights of the ends at ``t``."""
    angle = math.acos(float((x * y).sum() / (x.norm() * y.norm())))
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def assert_interpolates(result: Factors, ends: tuple[Factors, Factors], weights: tuple[float, float]) -> None:
    """The result is ``sum_i weights[i] * scaling_i B_i A_i``.

    An entry of A is rounded at w*s, at the interpolation weight and at the product: three times u.  The
    angle is found in float64 and adds nothing that counts beside it.
    """
    expected = weights[0] * ends[0].delta() + weights[1] * ends[1].delta()
    magnitude = sum(
        abs(w * f.scaling) * (f.b.double().abs() @ f.a.double().abs())
        for w, f in zip(weights, ends, strict=True)
    )
    assert ((result.delta() - expected).abs() <= 3.01 * U * magnitude).all()


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_slerp_equals_the_closed_form(t: float) -> None:
    x, y = random_adapter(SHAPES, 4, seed=0, scaling=0.5), random_adapter(SHAPES, 6, seed=1, scaling=3.0)
    result = merged(f"slerp(x, y, t={t})", {"x": x, "y": y}).modules
    for module in SHAPES:
        ends = x.modules[module], y.modules[module]
        weights = closed_form(ends[0].delta(), ends[1].delta(), t)
        assert_interpolates(result[module], ends, weights)


def test_weights_apply_before_the_interpolation() -> None:
    x, y = random_adapter(SHAPES, 4, seed=0), random_adapter(SHAPES, 4, seed=1)
    result = merged("slerp(0.7*x, -2*y, t=0.3)", {"x": x, "y": y}).modules
    for module in SHAPES:
        ends = x.modules[module], y.modules[module]
        at_x, at_y = closed_form(0.7 * ends[0].delta(), -2 * ends[1].delta(), 0.3)
        assert_interpolates(result[module], ends, (0.7 * at_x, -2 * at_y))


def test_the_first_source_is_the_end_at_0_whatever_its_name() -> None:
    z, a = random_adapter(SHAPES, 4, seed=0), random_adapter(SHAPES, 4, seed=1)
    at_0 = merged("slerp(z, a, t=0)", {"z": z, "a": a}).modules
    at_1 = merged("slerp(z, a, t=1)", {"z": z, "a": a}).modules
    for module in SHAPES:
        ends = z.modules[module], a.modules[module]
        assert_interpolates(at_0[module], ends, (1, 0))
        assert_interpolates(at_1[module], ends, (0, 1))


@pytest.mark.parametrize("factor", [1.0, 2.0, -0.5])
def test_parallel_deltas_are_interpolated_on_a_straight_line(factor: float) -> None:
    x = random_adapter(SHAPES, 4)
    y = Adapter({k: Factors(f.a, f.b * factor, f.scaling) for k, f in x.modules.items()})
    result = merged("slerp(x, y, t=0.25)", {"x": x, "y": y}).modules
    for module in SHAPES:
        assert_interpolates(result[module], (x.modules[module], y.modules[module]), (0.75, 0.25))


def test_a_delta_of_zero_is_approached_on_a_straight_line() -> None:
    x = random_adapter(SHAPES, 4)
    zero = Adapter({k: Factors(f.a, torch.zeros_like(f.b), f.scaling) for k, f in x.modules.items()})
    result = merged("slerp(x, zero, t=0.25)", {"x": x, "zero": zero}).modules
    for module in SHAPES:
        assert_interpolates(result[module], (x.modules[module], zero.modules[module]), (0.75, 0.25))


def test_a_module_of_one_source_alone_fades_towards_zero() -> None:
    x, y = random_adapter(SHAPES, 4, seed=0), random_adapter({"m": SHAPES["m"]}, 4, seed=1)
    only = x.modules["n"]
    fading = merged("slerp(x, y, t=0.25)", {"x": x, "y": y}).modules["n"]
    growing = merged("slerp(y, x, t=0.25)", {"x": x, "y": y}).modules["n"]
    assert_interpolates(fading, (only, only), (0.75, 0))
    assert_interpolates(growing, (only, only), (0.25, 0))


def test_both_backends_agree_on_a_limited_rank() -> None:
    x, y = random_adapter(SHAPES, 4, seed=0), random_adapter(SHAPES, 4, seed=1)
    ours = merged("slerp(x, y, t=0.3)", {"x": x, "y": y}, "cpu", limit=5)
    dense = merged("slerp(x, y, t=0.3)", {"x": x, "y": y}, "numpy", limit=5)
    for module in SHAPES:
        got, expected = ours.modules[module], dense.modules[module]
        assert got.rank == expected.rank == 5
        # Each stores A and B once rounded: the products differ by at most four times u of their magnitudes,
        # and those by no more than the norms of the factors.
        size = got.a.norm() * got.b.norm() + expected.a.norm() * expected.b.norm()
        assert (got.delta() - expected.delta()).norm() <= 2 * U * size
        assert ours.energy[module] == pytest.approx(dense.energy[module], rel=1e-10)
