"""Stacks of random modules, their dense deltas, and what a best approximation of those must be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from merged_lora.plan import Mean
from merged_lora.reference import delta as reference
from merged_lora.triton_kernels.batched.lowrank import MergedStack, Stack

EPS = 2.0**-52
RESOLUTION = 1e-7  # relative to the largest singular value: the root of float64's rounding, times the rank

Source = tuple[torch.Tensor, torch.Tensor]
"""Factors of one source, ``A [modules, rank, in]`` and ``B [modules, out, rank]``."""


def source(
    rank: int,
    seed: int,
    modules: int = 3,
    shape: tuple[int, int] = (30, 40),
    size: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Source:
    """Normal entries; A is divided and B multiplied by ``size``, which does not change the products."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(modules, rank, shape[1], generator=generator, dtype=torch.float64) / size
    b = torch.randn(modules, shape[0], rank, generator=generator, dtype=torch.float64) * size
    return a.to(dtype), b.to(dtype)


def stacked(
    sources: Sequence[Source],
    weights: Sequence[Sequence[float]],
    rank: int,
    slerp: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Stack:
    """The stack of these sources; float64, which no plan has, keeps rounding from hiding errors."""
    a, b = zip(*sources, strict=True)
    mean = None if slerp is None else Mean("slerp", (1.0 - slerp, slerp), 2)
    return Stack(a, b, torch.tensor(weights, dtype=torch.float64), rank, mean, dtype)


def weights_of(modules: int, sources: int, seed: int = 0) -> list[list[float]]:
    """Float32 numbers of both signs; the last one of every second module is zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(modules, sources, generator=generator)
    if sources > 1:
        weights[::2, -1] = 0.0
    return [[float(w) for w in row] for row in weights]


def deltas(sources: Sequence[Source], weights: Sequence[Sequence[float]]) -> torch.Tensor:
    """``sum_i weights[m][i] * B_i A_i`` of every module in float64, ``[modules, out, in]``."""
    pairs = [(a.double().numpy(), b.double().numpy()) for a, b in sources]
    return torch.stack(
        [
            torch.from_numpy(np.sum(reference.dense([(a[m], b[m]) for a, b in pairs], row), axis=0))
            for m, row in enumerate(weights)
        ]
    )


def interpolated(x: Source, y: Source, weights: Sequence[Sequence[float]], t: float) -> torch.Tensor:
    """The dense interpolation of every module, ``[modules, out, in]``."""
    ends = [deltas([end], [[row[i]] for row in weights]) for i, end in enumerate((x, y))]
    return torch.stack(
        [
            torch.from_numpy(reference.slerp([p.numpy(), q.numpy()], (1.0 - t, t), 2))
            for p, q in zip(*ends, strict=True)
        ]
    )


def product(merged: MergedStack) -> torch.Tensor:
    """``B A`` of every module in float64."""
    result: torch.Tensor = merged.b.double() @ merged.a.double()
    return result


def assert_best(
    merged: MergedStack, target: torch.Tensor, rank: int, slack: torch.Tensor | float = 0.0
) -> None:
    """No matrix of the rank is nearer to the target, and the energies are those of its singular values.

    An energy sums fewer than 64 squares, each of which eigh computes to within 64^2 rounding errors.
    """
    assert merged.a.shape == (len(target), rank, target.shape[2])
    assert merged.b.shape == (len(target), target.shape[1], rank)
    values = torch.linalg.svdvals(target)
    errors = (target - product(merged)).flatten(1).norm(dim=1)
    assert (errors <= values[:, rank:].norm(dim=1) + RESOLUTION * values[:, 0] + slack).all()
    assert merged.energy is not None
    asked = (values**2).sum(1)
    energies = torch.stack([(values[:, :rank] ** 2).sum(1), asked], dim=1)
    assert ((merged.energy - energies).abs() <= 64**3 * EPS * asked[:, None]).all()
