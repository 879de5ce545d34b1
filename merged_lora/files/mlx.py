"""Adapters of mlx-lm, which stores transposed factors and a plain scale: turned into PEFT's layout.

After the class ``LoRALinear`` of mlx-lm 0.32: ``y = x W + scale (x lora_a) lora_b``.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from merged_lora.errors import AdapterError, listed

from .layout import PREFIX
from .parts import EMBEDDINGS

_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ab])")
_EXPERTS = ".switch_mlp."


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is one of mlx-lm."""
    return "peft_type" not in config and ("fine_tune_type" in config or "lora_parameters" in config)


def as_peft(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The same adapter with PEFT's configuration and names; raises AdapterError.

    folder:  for messages.
    config:  mlx-lm's.
    tensors: ``lora_a`` ``[in, rank]`` and ``lora_b`` ``[rank, out]`` of every module; for the experts of
             ``switch_mlp`` ``[experts, rank, in]`` and ``[experts, out, rank]``.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise AdapterError(
            f"{folder}: an adapter of mlx-lm of the type {reprlib.repr(kind)}; only lora can be merged"
        )
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise AdapterError(
            f"{folder}: an adapter of mlx-lm whose scale is {reprlib.repr(scale)}, not a number"
        )
    others = sorted(name for name in tensors if not _NAME.fullmatch(name))
    if others:
        raise AdapterError(f"{folder}: these tensors of mlx-lm are not LoRA factors: {listed(others)}")
    made: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        assert match is not None
        side = match["side"].upper()
        if tensor.ndim not in (2, 3):
            raise AdapterError(f"{folder}: {name} has shape {tuple(tensor.shape)}, not a matrix")
        for module, factor in _modules(match["module"], tensor):
            embedding = module.rpartition(".")[2] in EMBEDDINGS
            suffix = f"lora_embedding_{side}" if embedding else f"lora_{side}.weight"
            made[f"{PREFIX}{module}.{suffix}"] = factor.contiguous()
            if side == "A":
                ranks[module] = factor.shape[0]
    rank = max(ranks.values(), default=1)
    others_ranks = {name: r for name, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": config.get("model"),
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": {re.escape(name): r for name, r in others_ranks.items()},
        "alpha_pattern": {re.escape(name): scale * r for name, r in others_ranks.items()},
    }, made


def _modules(module: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    if tensor.ndim == 3 and _EXPERTS in f".{module}.":
        head, _, tail = module.rpartition(_EXPERTS)
        return [(f"{head}.experts.{i}.{tail}", tensor[i]) for i in range(tensor.shape[0])]
    return [(module, tensor.T if tensor.ndim == 2 else tensor)]
