"""Interpreters of old Tritons round quotients by three in float32 twice, and nothing else."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import triton

from agreement.comparing import entries
from kernels import rounding
from kernels.test_divide import SIZE, divided
from merged_lora.backends import load_backend
from merged_lora.bench.device_agreement import groups
from merged_lora.triton_kernels.backend import TritonBackend

interpreter = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="the kernels run on a GPU")


def words(seed: int, count: int = 4000) -> rounding.Array:
    """Finite float32 numbers of every exponent, and of exponents near each other."""
    rng = np.random.default_rng(seed)
    anything = rng.integers(0, 2**32, count, np.uint32).view(np.float32)
    near = rng.standard_normal(count).astype(np.float32)
    found = np.concatenate([np.where(np.abs(anything) < 2**62, anything, np.float32(0.75)), near])
    return np.asarray(found, np.float32)


def test_the_fused_operation_gives_the_nearest_number_or_one_of_two() -> None:
    x, y, z = words(1), words(2), words(3)
    z[::3] = -(x * y)[::3]  # what is left is the rounding of the product
    got = rounding.fuse(x, y, z)
    beside = [np.nextafter(got, np.float32(side)) for side in (-np.inf, np.inf)]
    for a, b, c, found, below, above in zip(*(v.tolist() for v in (x, y, z, got, *beside)), strict=True):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        error = abs(exact - Fraction(found))
        assert error <= min(abs(exact - Fraction(below)), abs(exact - Fraction(above))), (a, b, c)


def test_what_only_float64_takes_for_a_tie_is_none() -> None:
    one, step, half = (np.full(1, value, np.float32) for value in (1, 2**-23, 2**-24))
    assert rounding.fuse(half, one, one + step) == one + 2 * step  # a tie, and the even number
    # 1 + 2^-23 + 2^-24 - 2^-70
    assert rounding.fuse((one - step) * half, one + step, one + step) == one + step


@interpreter
def test_interpreters_before_triton_3_9_round_twice() -> None:
    release = tuple(map(int, triton.__version__.split(".")[:2]))
    assert rounding.rounds_once() == (release >= (3, 9))
    x, y, z = words(4), words(5), words(6)
    own = rounding.fuse if release >= (3, 9) else rounding.multiply_and_add
    assert (rounding.interpreted(x, y, z).view(np.int32) == own(x, y, z).view(np.int32)).all()


@interpreter
@pytest.mark.parametrize("sources", [1, 2, 3, 4, 0])
def test_rounded_twice_a_quotient_by_three_is_what_two_roundings_make_of_it_and_others_stay(
    sources: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounding.replace_fma(monkeypatch.setattr, rounding.multiply_and_add)
    x = entries("normal", SIZE, torch.float32, torch.Generator().manual_seed(7))
    third = np.float32(1 / 3)
    product = x.numpy() * third
    twice = (product * np.float32(-3) + x.numpy()) * third + product
    assert (twice != x.numpy() / np.float32(3)).any()
    for count in range((sources or 16) + 1):
        corrected = count == 3 and sources in (3, 4)
        expected = torch.from_numpy(twice) if corrected else x / max(count, 1)
        assert torch.equal(divided(x, count, sources), expected), count


@interpreter
@pytest.mark.soak
def test_rounded_twice_five_checks_of_agreement_differ_each_a_float32_vote_of_three_or_four_sources(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounding.replace_fma(monkeypatch.setattr, rounding.multiply_and_add)
    backend = load_backend("triton")
    assert isinstance(backend, TritonBackend)
    checks = [check for _, group in groups(backend) for check in group]
    assert len(checks) > 200
    four, weighted = "(a, 0.5*b, -0.3*c, d{})", "(1*a, 0.5*b, -0.3*c{})"
    frequency = ', density=0.2, majority_sign_method="frequency"'
    assert [check.what for check in checks if check.find()] == [
        f"float32 ties{four.format('')} = NumPy, every bit",
        f"float32 ties{four.format(frequency)} = NumPy, every bit",
        f"float32 dare_ties{four.format('')} = NumPy, every bit",
        f"float32 ties{weighted.format(', 1*d')}",
        f"float32 dare_ties{weighted.format(', 1*d')}",
    ]
