"""Reads safetensors files. Knows nothing of what they hold."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a file, read into memory as a whole.

    Raises OSError if the file cannot be read, and ValueError if it is not sound.
    """
    data = file.read_bytes()  # not memory-mapped: a file replaced later must not change what was read
    try:
        tensors = safetensors.torch.load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__")
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"not a sound safetensors file ({str(error)[:120]}); download or save it again"
        ) from None
    return tensors, metadata or {}
