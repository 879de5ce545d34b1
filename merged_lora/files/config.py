"""What an adapter's configuration says: what it refuses, and the rank and scaling of each module.

The meaning is that of PEFT 0.21.  An initialisation that is not listed here is refused, and so is an unknown
field that has the form of PEFT's switches for variants of LoRA: the factors may not be all that they do.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from merged_lora.errors import AdapterError, listed

from .layout import CONFIG_NAME, MAX_ALPHA
from .parts import CARRIED

MAX_RANK = 65536

_FIELDS = {
    "read": "peft_type task_type base_model_name_or_path fan_in_fan_out r rank_pattern lora_alpha "
    "alpha_pattern use_rslora init_lora_weights modules_to_save target_parameters auto_mapping",
    # They announce tensors, which decide.
    "seen in the tensors": "bias lora_bias trainable_token_indices",
    # They say which modules were trained or how, on which machine and from where.
    "ignored": "target_modules exclude_modules layers_to_transform layers_pattern lora_dropout loftq_config "
    "eva_config corda_config lora_ga_config velora_config monteclora_config runtime_config megatron_core "
    "qalora_group_size ensure_weight_tying revision inference_mode peft_version",
    # With these the factors are not all that the adapter does.
    "refused": "use_dora layer_replication use_qalora use_bdlora alora_invocation_tokens "
    "alora_invocation_string invocation_string megatron_config arrow_config kasa_config",
}
FIELDS: Mapping[str, str] = {name: how for how, names in _FIELDS.items() for name in names.split()}
"""How each field of PEFT's ``LoraConfig`` is treated.  ``velora_config`` and ``monteclora_config`` change how
an adapter is trained, and nothing of what it does afterwards."""

_INTO_BASE = ("use_dora", "use_bdlora", "kasa_config")
"""Fields of variants that PEFT can merge into a base model, though not with other adapters."""

INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights``, beside true and false, that leave the base model as it is."""
_BASE_CHANGING = ("pissa", "olora", "loftq", "corda", "lora_ga", "lora-ga")

_VARIANT = re.compile(r"(?s)use_.*|.*_config")
"""Fields of this form switch variants of LoRA on, by PEFT's habit; other programs add fields of their own."""
_EXPENSIVE = re.compile(r"\)[*+{]")  # a repeated group can take exponential time
MAX_PATTERN = 4096
MAX_REPETITIONS = 2
"""A match takes a time that grows with the length of a name to this power."""


def refused_fields(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """The names of the fields because of which a configuration is refused, with the reason where it helps.

    Raises AdapterError for a configuration of something else than LoRA, and for a flag that is none.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{folder}: peft_type is {reprlib.repr(kind)}, only LORA adapters can be merged")
    for key in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(config.get(key), bool | None):
            raise AdapterError(f"{folder}: {key} is neither true nor false")
    way_out = " (its factors are not all of it; PEFT's merge_and_unload makes one model of it and its base)"
    found = [
        key + (way_out if key in _INTO_BASE else "")
        for key, treated in FIELDS.items()
        if treated == "refused" and config.get(key)
    ]
    found += [
        f"{reprlib.repr(key)} (unknown, so it may change what the factors mean)"
        for key, value in config.items()
        if key not in FIELDS and value and _VARIANT.fullmatch(key)
    ]
    init = config.get("init_lora_weights")
    if not isinstance(init, bool | None) and init not in INITIALISATIONS:
        reason = "unknown, it may have changed the base model"
        if isinstance(init, str) and init.lower() in ("gaussian", "mica"):  # PEFT reads these in any case
            return found
        if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING):
            reason = (
                "it changed the base model; convert it with PEFT's path_initial_model_for_weight_conversion"
            )
        found.append(f"init_lora_weights={reprlib.repr(init)} ({reason})")
    return found


def names(folder: Path, config: Mapping[str, Any], key: str) -> list[str]:
    """A list of names in the configuration, empty if there is none; raises AdapterError."""
    found = config.get(key) or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise AdapterError(f"{folder}: {key} in {CONFIG_NAME} is not a list of names")
    return found


class Scales:
    """Ranks and scalings of modules, by PEFT's rule for patterns.

    folder: for messages.
    config: the configuration.

    Raises AdapterError if the patterns are malformed.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder = folder
        self._config = config
        self._patterns = {field: self._compiled(field) for field in ("rank_pattern", "alpha_pattern")}

    def rank(self, names: Sequence[str]) -> int:
        """The rank of a module; raises AdapterError unless it is a whole number from 1 to MAX_RANK.

        names: the module's name, and others that patterns may mean it by.
        """
        rank = self._value("rank_pattern", "r", names)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
            raise AdapterError(
                f"{self._folder}: rank {reprlib.repr(rank)} of {names[0]} is not a whole number from 1 to "
                f"{MAX_RANK}"
            )
        return rank

    def scaling(self, names: Sequence[str], rank: int) -> float:
        """The factor of a module's product; raises AdapterError unless alpha is a number of sensible size."""
        alpha = self._value("alpha_pattern", "lora_alpha", names)
        if (
            isinstance(alpha, bool)
            or not isinstance(alpha, int | float)
            or not abs(alpha) <= MAX_ALPHA  # written this way round so that NaN is rejected too
        ):
            raise AdapterError(
                f"{self._folder}: lora_alpha {reprlib.repr(alpha)} of {names[0]} is not a number of size up "
                f"to {MAX_ALPHA:g}"
            )
        return alpha / math.sqrt(rank) if self._config.get("use_rslora") is True else alpha / rank

    def _value(self, field: str, otherwise: str, names: Sequence[str]) -> Any:
        for pattern, value in self._patterns[field]:
            if any(_ends_with(name, pattern) for name in names):
                return self._config.get(otherwise) if value is None else value
        return self._config.get(otherwise)

    def _compiled(self, field: str) -> list[tuple[re.Pattern[str], Any]]:
        patterns = self._config.get(field) or {}
        if not isinstance(patterns, dict):
            raise AdapterError(f"{self._folder}: {field} is not an object")
        made = []
        for key, value in patterns.items():
            if len(key) > MAX_PATTERN or _EXPENSIVE.search(key) or _repetitions(key) > MAX_REPETITIONS:
                raise AdapterError(
                    f"{self._folder}: {field} holds {key[:64]!r}, which could take forever to match"
                )
            try:
                made.append((re.compile(f"(?:{key})"), value))
            except (re.error, RecursionError, OverflowError):  # what re raises for a malformed pattern
                raise AdapterError(
                    f"{self._folder}: {field} holds {key[:64]!r}, which is not a regular expression"
                ) from None
        return made


def _ends_with(name: str, pattern: re.Pattern[str]) -> bool:
    """Whether a pattern means a module by PEFT's rule: all of its name, or its end from a dot on."""
    starts = [0, *(i + 1 for i, character in enumerate(name) if character == ".")]
    return any(pattern.fullmatch(name, start) for start in starts)


def _repetitions(pattern: str) -> int:
    """How many parts of a pattern may match any number of characters; several optional ones count as one."""
    return len(re.findall(r"[*+{]", pattern)) + len(re.findall(r"(?<![*+?}])\?", pattern)) // 4


def refuse(folder: Path, found: Collection[str], droppable: Collection[str], unused: Collection[str]) -> None:
    """Raise AdapterError if an adapter has parts that no merge supports.

    folder:    for the message.
    found:     those parts.
    droppable: words of ``--drop`` that would leave some of them out.
    unused:    words of ``--drop`` that mean nothing in this adapter.
    """
    if found:
        words = " ".join(droppable)  # a server has no such flags, but its client can make a copy
        hint = f"; can be left out with --drop {words} of the command merged-lora" if droppable else ""
        if taken := [kind for kind in droppable if kind in CARRIED]:
            hint += f", or carried over from one source with --take {taken[0]}=NAME"
        if unused:
            hint += f"; it has nothing that is called {listed(map(repr, sorted(unused)))}"
        raise AdapterError(f"{folder}: this adapter uses what no merge supports: {listed(found)}{hint}")
