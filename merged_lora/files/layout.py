"""Names in a PEFT folder, and what its configuration says besides ranks and scalings."""

from __future__ import annotations

from dataclasses import dataclass

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = "adapter_model.safetensors.index.json"
PREFIX = "base_model.model."
MAX_ALPHA = 1e30


@dataclass(frozen=True)
class Header:
    """What an adapter's configuration says besides ranks and scalings.

    base_model:     name of the base model.
    task_type:      PEFT's name of the task.
    fan_in_fan_out: whether the base model stores its weights transposed.
    """

    base_model: str | None = None
    task_type: str | None = None
    fan_in_fan_out: bool = False
