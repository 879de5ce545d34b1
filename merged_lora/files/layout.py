"""Names in a PEFT folder, and what its configuration says besides ranks and scalings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = "adapter_model.safetensors.index.json"
PREFIX = "base_model.model."
MAX_ALPHA = 1e30

RANKS_KEY = "merged_lora.ranks"
"""Key in the safetensors metadata: the ranks that modules had before they were padded to one."""


@dataclass(frozen=True)
class Header:
    """What an adapter's configuration says besides ranks and scalings.

    base_model:     name of the base model.
    task_type:      PEFT's name of the task.
    auto_mapping:   class of the base model and its library, as PEFT names them if it knows no task.
    fan_in_fan_out: whether the base model stores its weights transposed.
    base_copies:    digests of the copies of the base model's tensors in the file, by name.
    parameters:     modules whose weight PEFT addresses as a parameter (``target_parameters``), since the base
                    model multiplies with it in a way of its own.  Experts are not named here.
    named:          whether a user has said that the names of modules are meant as they are.
    """

    base_model: str | None = None
    task_type: str | None = None
    fan_in_fan_out: bool = False
    base_copies: Mapping[str, str] = field(default_factory=dict)
    auto_mapping: Mapping[str, str] | None = None
    parameters: tuple[str, ...] = ()
    named: bool = False
