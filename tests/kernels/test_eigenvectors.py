"""Eigenvectors of many matrices at once, in cases where torch would loop over the matrices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels.stacks import assert_best, deltas, source, stacked, weights_of
from merged_lora import batched
from merged_lora.batched import SMALL, block_jacobi, eigenvectors, loops
from merged_lora.triton_kernels.batched.lowrank import merge_stack

EPS = 2.0**-52
MODULES = 2


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn((MODULES, *shape), generator=generator, dtype=torch.float64)


def with_values(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Matrices of these eigenvalues."""
    basis = torch.linalg.qr(normal(generator, len(values), len(values)))[0]
    made: torch.Tensor = (basis * values.double()) @ basis.mT
    return (made + made.mT) / 2


def gram(x: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = x @ x.mT
    return product


KINDS: dict[str, Callable[[int, torch.Generator], torch.Tensor]] = {
    "gram": lambda n, g: gram(normal(g, n, 4 * n)),
    "tiny": lambda n, g: 1e-200 * gram(normal(g, n, n)),
    "of low rank": lambda n, g: gram(normal(g, n, 3) @ normal(g, 3, n)),
    "copies": lambda n, g: gram(normal(g, n, 4 * n)[:, torch.arange(n) // 2]),
    "graded": lambda n, g: with_values(10.0 ** -torch.linspace(0, 20, n), g),
    "two values": lambda n, g: with_values(torch.where(torch.arange(n) < n // 2, 1.0, 1e-9), g),
    "both signs": lambda n, g: with_values(torch.linspace(-1, 1, n), g),
    "identity": lambda n, g: torch.eye(n, dtype=torch.float64).repeat(MODULES, 1, 1),
    "zeros": lambda n, g: torch.zeros(MODULES, n, n, dtype=torch.float64),
}


@pytest.mark.parametrize(
    ("n", "small"), [(5, 2), (33, 8), (33, 32), (64, 32), pytest.param(100, 32, marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_block_jacobi_finds_eigenvectors_to_rounding(kind: str, n: int, small: int) -> None:
    given = KINDS[kind](n, torch.Generator().manual_seed(n))
    values, vectors = block_jacobi(given, small)
    size = given.abs().amax((1, 2), keepdim=True)
    unit = given / torch.where(size > 0, size, 1.0)
    found = values[:, None, :] / torch.where(size > 0, size, 1.0)
    # Before the last sweep, what is off the diagonal has at most this norm, of entries up to 1; the triangle
    # counts twice.
    bound = 2**0.5 * 8 * n**1.5 * EPS
    assert float(torch.linalg.vector_norm(unit @ vectors - vectors * found, dim=1).max()) <= bound
    # One step of Newton's iteration leaves the rounding of its products, n terms each.
    assert float((vectors.mT @ vectors - torch.eye(n)).abs().max()) <= n * EPS
    # Weyl: no eigenvalue moves further than the residual, all in their order.
    expected = torch.linalg.eigvalsh(unit)
    assert float((found[:, 0].sort(dim=1).values - expected).abs().max()) <= n**0.5 * bound
    assert bool((found[:, 0].diff(dim=1) >= -bound).all())


@pytest.mark.parametrize(
    ("version", "device", "expected"),
    [
        ("2.11.0+cu130", "cuda", True),
        ("2.9.1", "cuda", True),
        ("2.12.0+cu130", "cuda", False),
        ("2.13.0.dev20260701", "cuda", False),
        ("3.0.0", "cuda", False),
        ("2.11.0+cpu", "cpu", False),
    ],
)
def test_torch_before_2_12_loops_on_cuda(
    version: str, device: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    assert loops(version, torch.device(device)) == expected
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not loops(version, torch.device(device))


def test_where_torch_loops_it_is_given_no_large_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "loops", lambda version, device: True)
    shapes: list[torch.Size] = []
    eigh = torch.linalg.eigh

    def watched(matrices: torch.Tensor) -> object:
        shapes.append(matrices.shape)
        return eigh(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", watched)
    sources = [source(20, seed, shape=(60, 50)) for seed in (0, 1)]
    weights = weights_of(3, 2)
    merged = merge_stack(stacked(sources, weights, 7))
    assert shapes
    assert all(shape[-1] <= SMALL and shape[0] > 1 for shape in shapes)
    assert_best(merged, deltas(sources, weights), 7)


def test_small_or_single_matrices_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "loops", lambda version, device: True)
    monkeypatch.setattr(batched, "block_jacobi", None)
    for shape in ((5, SMALL, SMALL), (1, SMALL + 1, SMALL + 1)):
        eigenvectors(torch.zeros(shape, dtype=torch.float64))
