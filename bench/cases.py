"""Inputs of the benchmarks: the shapes of real models, filled with random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from merged_lora.adapters import Adapter
from merged_lora.calibration import Calibration, Exchange, Inputs
from merged_lora.factors import Factors

Shapes = Mapping[str, tuple[int, int]]

LLAMA3_8B_LAYER = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
"""``(out, in)`` of every linear layer in one layer of Llama-3-8B."""

SMALL = {"small.wide": (48, 80), "small.tall": (80, 32)}
"""Modules with few enough entries that magnitudes can all differ in bfloat16."""


def llama3_8b(layers: int) -> dict[str, tuple[int, int]]:
    """The shapes of that many layers, by module name."""
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(layers)
        for name, shape in LLAMA3_8B_LAYER.items()
    }


def random_sources(shapes: Shapes, count: int, rank: int, dtype: torch.dtype) -> dict[str, Adapter]:
    """Adapters ``a``, ``b``, ... with normal entries; their scalings are 1, 1.5, 2 and so on."""
    generator = torch.Generator().manual_seed(0)

    def factor(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / 64).to(dtype)

    return _adapters(shapes, count, rank, factor)


def calibrated(
    adapter: Adapter, seed: int = 0, components: int = 6, exchanges: tuple[Exchange, ...] = ()
) -> Adapter:
    """The adapter with a calibration of random inputs, whose strongest directions are far above the rest.

    Modules of a layer that take as many inputs share them, as q, k and v do.

    exchanges: of the calibration.
    """
    generator = torch.Generator().manual_seed(seed + 1000)
    shared: dict[tuple[str, int], Inputs] = {}
    inputs: dict[str, Inputs] = {}
    for name, f in adapter.modules.items():
        width = f.shape[1]
        place = name.rpartition(".")[0], width
        if place not in shared:
            vectors = torch.randn(min(components, width), width, generator=generator)
            vectors = vectors / vectors.norm(dim=1, keepdim=True)
            rest = 0.01 + 0.1 * torch.rand(width, generator=generator)
            shared[place] = Inputs(torch.logspace(1, -1, vectors.shape[0]), vectors.half(), rest)
        inputs[name] = shared[place]
    base = adapter.header.base_model
    calibration = Calibration(inputs, adapter.digest, base, 8, (100, 50), exchanges)
    return replace(adapter, calibration=calibration)


def distinct_sources(shapes: Shapes, count: int, rank: int, dtype: torch.dtype) -> dict[str, Adapter]:
    """Adapters in which no two magnitudes of a tensor tie and every sum of entries is exact in float32.

    So each rule has one right answer, whichever order an implementation sums in: no tie at a threshold, no
    vote within rounding of zero.  At most 1024 entries a tensor.
    """
    generator = torch.Generator().manual_seed(0)

    def factor(rows: int, columns: int) -> torch.Tensor:
        order = torch.randperm(1024, generator=generator)[: rows * columns].reshape(rows, columns)
        signs = torch.randint(0, 2, (rows, columns), generator=generator) * 2 - 1
        if dtype == torch.float32:
            return (order * 64 + 1) * signs * 2.0**-20  # 16 bits of float32's 24
        # Consecutive bit patterns from 2^-8 on: 8 binades of bfloat16 make 16 bits, one of float16 11.
        first = torch.tensor(2.0**-8, dtype=dtype).view(torch.int16)
        return (order.to(torch.int16) + first).view(dtype) * signs

    return _adapters(shapes, count, rank, factor)


def awkward_sources(shapes: Shapes, count: int, rank: int, dtype: torch.dtype) -> dict[str, Adapter]:
    """Adapters of any bit patterns up to 2^-13 of the largest number, so that no merge of 16 overflows.

    A quarter of the entries are zeros of both signs, the smallest subnormal number and ties.
    """
    generator = torch.Generator().manual_seed(0)
    info = torch.finfo(dtype)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    few = torch.tensor([0.0, -0.0, info.smallest_normal * info.eps, 0.375, -0.375], dtype=dtype)

    def factor(rows: int, columns: int) -> torch.Tensor:
        shape = (rows, columns)
        words = torch.randint(torch.iinfo(integer).max, shape, generator=generator, dtype=integer)
        values = words.view(dtype)
        values = torch.where(values.abs() < info.max * 2.0**-13, values, 0.0)
        values = values * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)
        special = few[torch.randint(len(few), shape, generator=generator)]
        return torch.where(torch.rand(shape, generator=generator) < 0.25, special, values)

    return _adapters(shapes, count, rank, factor)


def _adapters(
    shapes: Shapes, count: int, rank: int, factor: Callable[[int, int], torch.Tensor]
) -> dict[str, Adapter]:
    return {
        name: Adapter(
            {
                module: Factors(factor(rank, columns), factor(rows, rank), 1.0 + i / 2)
                for module, (rows, columns) in shapes.items()
            }
        )
        for i, name in enumerate(names(count))
    }


def names(count: int) -> list[str]:
    """The first names of sources: ``a``, ``b``, ..."""
    return [chr(ord("a") + i) for i in range(count)]
