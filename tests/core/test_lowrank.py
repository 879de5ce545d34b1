"""The exact linear algebra in hard cases: factors of very different size, dependent and zero ones."""

from __future__ import annotations

import pytest
import torch

from merged_lora.factors import Factors
from merged_lora.lowrank import truncate

RESOLUTION = 1e-7  # of the largest singular value: the square root of float64's rounding, times the rank


def pair(seed: int, size: float = 1.0) -> Factors:
    """Factors ``A / size`` and ``B * size``, whose product does not depend on the size."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(3, 40, generator=generator, dtype=torch.float64) / size
    b = torch.randn(30, 3, generator=generator, dtype=torch.float64) * size
    return Factors(a.float(), b.float())


def dense(sources: list[Factors]) -> torch.Tensor:
    """The sum of the products, ``[30, 40]``."""
    return torch.stack([f.delta() for f in sources]).sum(0)


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-8, 3e-12, 1e8])
@pytest.mark.parametrize("rank", [2, 4, 6])
def test_the_sizes_of_two_factors_do_not_matter_only_their_product(size: float, rank: int) -> None:
    sources = [pair(1), pair(2, size)]
    target = dense(sources)
    values = torch.linalg.svdvals(target)
    a, b, (kept, asked) = truncate(sources, [1.0, 1.0], rank)
    error = float((target - b @ a).norm())
    assert error <= float(values[rank:].norm()) + RESOLUTION * float(values[0])
    assert asked == pytest.approx(float((values**2).sum()), rel=RESOLUTION)
    assert kept == pytest.approx(float((values[:rank] ** 2).sum()), rel=RESOLUTION)


def test_sources_that_cancel_give_zero() -> None:
    a, b, _ = truncate([pair(1), pair(1)], [1.0, -1.0], 3)
    assert float((b @ a).norm()) <= RESOLUTION * float(pair(1).delta().norm())


def test_a_zero_factor_is_no_obstacle() -> None:
    empty = Factors(torch.zeros(3, 40), torch.randn(30, 3))
    a, b, _ = truncate([pair(1), empty], [1.0, 1.0], 3)
    torch.testing.assert_close(
        b @ a, dense([pair(1)]), rtol=0, atol=RESOLUTION * float(dense([pair(1)]).norm())
    )
