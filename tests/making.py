"""Random adapters for tests. ``pythonpath`` holds this folder: ``from making import random_adapter``."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from merged_lora.adapters import Adapter
from merged_lora.factors import Factors
from merged_lora.peft_files import Header

SMALL = {
    "model.layers.0.self_attn.q_proj": (48, 32),
    "model.layers.0.self_attn.k_proj": (16, 32),
    "model.layers.0.mlp.down_proj": (32, 80),
    "model.layers.1.self_attn.q_proj": (48, 32),
}
"""Modules of a tiny model, no two dimensions of a module alike, as ``name: (out, in)``."""


def random_adapter(
    modules: Mapping[str, tuple[int, int]],
    rank: int | Mapping[str, int] = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scaling: float | Mapping[str, float] = 2.0,
    embeddings: Collection[str] = (),
    header: Header | None = None,
) -> Adapter:
    """An adapter with normal entries in A and in B, so that no delta is zero; the same for the same seed.

    modules:    shape ``(out, in)`` of each module's delta, by module name; see :data:`SMALL`.
    rank:       of every module, or by module name; so too ``scaling``.
    dtype:      float32, float16 or bfloat16; entries are drawn in float32 and rounded once.
    embeddings: those of the modules that are embeddings.
    """
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Factors] = {}
    for name, (rows, columns) in modules.items():
        r = rank if isinstance(rank, int) else rank[name]
        a = torch.randn(r, columns, generator=generator) / columns**0.5
        b = torch.randn(rows, r, generator=generator) / r**0.5
        s = scaling[name] if isinstance(scaling, Mapping) else scaling
        made[name] = Factors(a.to(dtype), b.to(dtype), s, name in embeddings)
    return Adapter(made, header or Header())
