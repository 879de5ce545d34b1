"""Adapters for tests. pytest's ``pythonpath`` holds this folder: ``from making import random_adapter``."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from merged_lora.adapters import Adapter
from merged_lora.bench.cases import calibrated
from merged_lora.factors import Factors
from merged_lora.files.layout import Header

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

    It has a calibration of random inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Factors] = {}
    for name, (rows, columns) in modules.items():
        r = rank if isinstance(rank, int) else rank[name]
        a = torch.randn(r, columns, generator=generator) / columns**0.5
        b = torch.randn(rows, r, generator=generator) / r**0.5
        s = scaling[name] if isinstance(scaling, Mapping) else scaling
        made[name] = Factors(a.to(dtype), b.to(dtype), s, name in embeddings)
    return calibrated(Adapter(made, header or Header()), seed)


def write_by_hand(folder: Path, tensors: Mapping[str, torch.Tensor], **config: object) -> Path:
    """A PEFT folder that the code under test had no part in; ``config`` over ``r=4, lora_alpha=8``."""
    folder.mkdir()
    base = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(base | config), encoding="utf-8")
    save_file(dict(tensors), folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def peft_tensors(*modules: str, rank: int = 4, size: int = 8) -> dict[str, torch.Tensor]:
    """Square random factors for these modules, under the names that PEFT gives them in a file."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"base_model.model.{module}.lora_{side}.weight": torch.randn(shape, generator=generator)
        for module in modules
        for side, shape in (("A", (rank, size)), ("B", (size, rank)))
    }
