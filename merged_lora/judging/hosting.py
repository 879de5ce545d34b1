"""Whether an adapter fits a base model, and what vLLM makes of it, as far as names and shapes show.

No weights are read, and vLLM is not asked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from merged_lora.adapters import Adapter
from merged_lora.alignment import align
from merged_lora.errors import PlanError, listed
from merged_lora.factors import Factors
from merged_lora.language_model import matrices_of, outline

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``--max-lora-rank``."""
DEFAULT_RANK = 16
"""Its default."""
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Modules that most models of vLLM have in one piece, and their parts in transformers."""
ENDS = ("embed_tokens", "lm_head")
"""The embedding and the output head, whose factors vLLM takes for models that say so."""
TOWERS = re.compile(r"(?:^|\.)(?:visual|vision\w*|audio\w*|\w*projector|connector)\.")
_STACK = re.compile(r".*\.w[123]\[\d+\]")


@dataclass(frozen=True)
class Serving:
    """What vLLM makes of an adapter.

    max_lora_rank: the smallest ``--max-lora-rank`` that it needs; None if vLLM takes no such rank.
    packed:        modules of most models of vLLM that hold several of the adapter's, or one beside others.
    flags:         what a server has to be started with.
    limits:        what vLLM or merges on a server refuse, or take on a condition alone.
    """

    max_lora_rank: int | None
    packed: tuple[str, ...]
    flags: tuple[str, ...]
    limits: tuple[str, ...]


def serving_of(adapter: Adapter, refused: str | None = None) -> Serving:
    """What vLLM makes of an adapter.

    refused: why a server, which leaves no parts out, cannot merge it.
    """
    highest = max(f.rank for f in adapter.modules.values())
    rank = max_lora_rank(highest)
    flags = [f"--max-lora-rank {rank}"] if rank is not None and rank > DEFAULT_RANK else []
    limits = [f"rank {highest} is more than vLLM serves, which is {RANKS[-1]}"] if rank is None else []
    if refused:
        limits.append(f"no merge on a server takes it as it is: {refused}")
    if adapter.header.fan_in_fan_out:
        limits.append("vLLM has no LoRA for models with fan_in_fan_out, such as GPT-2")
    if any(map(TOWERS.search, adapter.modules)):
        flags.append("--enable-tower-connector-lora")
    ends = [kind for kind in ENDS if any(name.rpartition(".")[2] == kind for name in adapter.modules)]
    if ends:
        limits.append(f"vLLM has LoRA for {listed(ends)} in some models alone, such as Llama and Qwen3")
    experts = [name for name in adapter.modules if ".experts." in name]
    if any(map(_STACK.fullmatch, experts)):
        flags.append("--enable-moe-shared-loras")
    elif any(name.endswith("]") for name in experts):
        limits.append(
            "experts in parameters are served with --enable-mixed-moe-lora-format if vLLM has them apart"
        )
    elif experts:
        limits.append(
            "experts that are apart are served with --enable-mixed-moe-lora-format if vLLM has them in "
            "parameters"
        )
    if experts:
        flags.append("--merged-lora-backend cpu")
    kinds = {name.rpartition(".")[2] for name in adapter.modules if name not in experts}
    packed = [whole for whole, parts in PACKED.items() if kinds.intersection(parts)]
    return Serving(rank, tuple(packed), tuple(flags), tuple(limits))


def max_lora_rank(rank: int) -> int | None:
    """The smallest ``--max-lora-rank`` with which vLLM serves a rank; None if it does not."""
    return next((each for each in RANKS if each >= rank), None)


class Host:
    """The modules of a base model, in names and shapes.

    name: as it was given.
    """

    def __init__(self, name: str | os.PathLike[str]) -> None:
        """The model in a folder or of a name on the hub, of which the configuration alone is read.

        Raises CalibrationError.
        """
        model = outline(name)
        self.name = os.fspath(name)
        self._names = {_last(part) for part in (self.name, str(Path(self.name).resolve()))}
        self._names |= {_last(str(model.config.name_or_path))}
        matrices = matrices_of(model)
        self._modules = Adapter({n: _empty(shape, embedding) for n, shape, embedding in matrices})

    def is_named_by(self, adapter: Adapter) -> bool:
        """Whether an adapter names this model, by the last part of the name or path."""
        named = adapter.header.base_model
        return named is not None and _last(named) in self._names

    def misfit(self, adapter: Adapter) -> str | None:
        """Why an adapter does not fit the model; None if it does.

        Names of other classes of the model are understood, and fused projections split, as in a merge.
        """
        try:
            there, ours = align({self.name: self._modules, "the adapter": adapter}).values()
        except PlanError as error:
            return str(error)
        missing = [name for name in ours.modules if name not in there.modules]
        if missing:
            return f"{self.name} has no {listed(missing, limit=3)}"
        return next(_differences(there, ours), None)


def _differences(there: Adapter, ours: Adapter) -> Iterator[str]:
    for name, factors in ours.modules.items():
        other = there.modules[name]
        shapes = {other.shape, other.shape[::-1]} if name.endswith("]") else {other.shape}
        if factors.shape not in shapes or factors.embedding != other.embedding:
            yield f"{name} is {_described(other)} in the model, and {_described(factors)} in the adapter"


def _described(factors: Factors) -> str:
    return f"{'an embedding' if factors.embedding else 'a matrix'} of shape {factors.shape}"


def _empty(shape: tuple[int, int], embedding: bool) -> Factors:
    out, width = shape
    a, b = torch.empty(1, width, device="meta"), torch.empty(out, 1, device="meta")
    return Factors(a, b, embedding=embedding)


def _last(name: str) -> str:
    """What a model is called, without the folders above it."""
    cached = re.findall(r"models--(?:[^/]*--)?([^/]*)/snapshots/", name)  # a folder in the hub's cache
    return (cached[0] if cached else name.rstrip("/").rpartition("/")[2]).lower()
