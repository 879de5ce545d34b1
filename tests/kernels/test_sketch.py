"""Sketches of merged deltas: thresholds, products, and tiles whose edges cut the matrix anywhere."""

from __future__ import annotations

import pytest
import torch

from merged_lora.plan import (
    AgreeingMean,
    All,
    Blend,
    EnergyMean,
    Graded,
    Keep,
    Largest,
    Middle,
    Random,
    Rule,
    Sum,
    Varied,
)
from merged_lora.triton_kernels.batched import fused_tiles
from merged_lora.triton_kernels.batched.fused_tiles import FUSED, TritonTiles
from merged_lora.triton_kernels.batched.tiles import TorchTiles
from merged_lora.triton_kernels.kernels.sketch import TILE_COLUMNS, TILE_ROWS

RANKS = (3, 20)
SHAPES = [
    (1, 1),
    (TILE_ROWS - 1, TILE_COLUMNS + 1),
    (TILE_ROWS, TILE_COLUMNS),
    (2 * TILE_ROWS + 5, TILE_COLUMNS - 1),
]


def factors(shape: tuple[int, int]) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Two sources of two modules."""
    generator = torch.Generator().manual_seed(0)
    a = [torch.randn(2, rank, shape[1], generator=generator) for rank in RANKS]
    b = [torch.randn(2, shape[0], rank, generator=generator) for rank in RANKS]
    return a, b, torch.tensor([[1.0, 0.5], [2.0, 0.3]])


SUM = Sum()


def rule(keeps: tuple[Keep, ...], blend: Blend = SUM) -> Rule:
    return Rule((1.0, -0.5), keeps, blend)


def rules_of(size: int) -> dict[str, Rule]:
    half, few = Largest(size // 2), Middle(size // 5, size // 10)
    drawn = (Random(40000, 5), Random(20000, (1 << 64) - 7))
    return {
        "all": rule((All(), All()), AgreeingMean(False, False)),
        "largest": rule((half, half), AgreeingMean(True, False)),
        "largest of one": rule((half, All())),
        "between": rule((few, few), AgreeingMean(False, True)),
        "random": rule(drawn, AgreeingMean(False, False)),
    }


@pytest.mark.parametrize("name", rules_of(1))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_tiles_that_torch_forms(shape: tuple[int, int], name: str) -> None:
    chosen = rules_of(shape[0] * shape[1])[name]
    a, b, scalings = factors(shape)
    ours, theirs = (kind(a, b, scalings, [chosen, chosen]) for kind in (TritonTiles, TorchTiles))
    right, left = torch.randn(2, shape[1], 5), torch.randn(2, shape[0], 5)
    (x, norms), (y, expected) = ours.times(right), theirs.times(right)
    # Sums of up to 69 float32 products, in other orders: 69 u of their magnitudes, and 1e-5 covers that.
    assert torch.allclose(norms, expected, rtol=1e-5)
    assert float((x - y).norm()) <= 1e-5 * (float(y.norm()) + float(expected.sum().sqrt()))
    x, y = ours.transposed_times(left), theirs.transposed_times(left)
    assert float((x - y).norm()) <= 1e-5 * (float(y.norm()) + float(expected.sum().sqrt()))


@pytest.mark.slow
@pytest.mark.parametrize("sample", [1, 50, fused_tiles.SAMPLE])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_thresholds_keep_as_many_as_asked_whatever_the_sample_says(
    share: float, sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_tiles, "SAMPLE", sample)
    shape = (70, 90)
    count = int(share * 70 * 90)
    a, b, scalings = factors(shape)
    magnitudes = fused_tiles.find_magnitudes(fused_tiles.stacked_deltas(a, b, scalings), [count, count])
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        delta = (y.double() @ x.double()) * scalings[:, i, None, None]
        slack = (
            (x.shape[1] + 2) * 2.0**-24 * (y.double().abs() @ x.double().abs()) * scalings[:, i, None, None]
        )
        for module in range(2):
            low = float(magnitudes[module, i])
            surely = int((delta[module].abs() - slack[module] >= low).sum())
            perhaps = int((delta[module].abs() + slack[module] >= low).sum())
            assert surely <= count <= perhaps
            assert perhaps - surely <= 3  # otherwise the test would accept any threshold


def test_what_the_kernels_know() -> None:
    assert rule((Largest(3), All()), AgreeingMean(False, False)).consists_of(*FUSED)
    assert not rule((Graded(9, 1, 3),) * 2).consists_of(*FUSED)
    assert not rule((All(),) * 2, EnergyMean()).consists_of(*FUSED)
    assert not rule((Varied(4),) * 2).consists_of(*FUSED)


@pytest.mark.slow
def test_more_columns_than_a_kernel_takes_are_multiplied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (TILE_ROWS + 3, TILE_COLUMNS + 5)
    chosen = rules_of(shape[0] * shape[1])["largest"]
    tiles = TritonTiles(*factors(shape), [chosen, chosen])
    right, left = torch.randn(2, shape[1], 40), torch.randn(2, shape[0], 40)
    at_once = (*tiles.times(right), tiles.transposed_times(left))
    monkeypatch.setattr(fused_tiles, "WIDEST", 16)
    in_parts = (*tiles.times(right), tiles.transposed_times(left))
    for x, y in zip(at_once, in_parts, strict=True):
        assert x.shape == y.shape
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-5)
