"""Names of tensors in the files of adapters, and the modules that they mean.

Pure work on text: knows nothing of tensors, of files or of configurations.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from merged_lora.errors import AdapterError

from .layout import PREFIX

FACTORS = {
    "lora_A.weight": ("A", False),
    "lora_B.weight": ("B", False),
    "lora_embedding_A": ("A", True),
    "lora_embedding_B": ("B", True),
}
"""For every role of a factor its side, and whether it belongs to an embedding."""

_WRAPPERS = frozenset(
    ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module")
)
"""What torch.compile, FSDP, activation checkpoints and Lightning put before a module's own name."""

_PARALLEL = frozenset(("module", "_module"))
"""What DDP, DeepSpeed and Opacus put in front of all; a model may have a module of this name."""

_OF_PEFT = re.compile(
    r"(?:(?P<module>.*?)\.)?(?P<part>lora_(?:[AB]|embedding_[AB]|magnitude_vector)|trainable_tokens_\w+)"
    r"(?:\.(?P<adapter>[^.]+))??(?:\.(?P<leaf>weight|bias))?"
)
_PREFIX = PREFIX.split(".")[:2]
_SAVED = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")


@dataclass(frozen=True)
class Key:
    """What the name of a tensor says.

    module: the module's name in the base model.  If there is an ``outer``, it begins with that and PEFT's
            prefix.
    role:   what the tensor is to the module, as PEFT's files write it: one of :data:`FACTORS`, or another,
            such as ``lora_A.bias``, ``lora_magnitude_vector.weight``, ``weight`` of a module saved whole.
    outer:  text in front of PEFT's own ``base_model.model.`` other than wrappers, such as ``thinker.``.
    owner:  the adapter's own name (``default`` in ``lora_A.default.weight``); empty if the key has none.
    """

    module: str
    role: str
    outer: str = ""
    owner: str = field(default="", compare=False)


def parse(key: str) -> Key:
    """The module and role that a tensor's name means, without wrappers and without the adapter's own name.

    key: the name in the file.
    """
    name, outer = _unwrapped(_SAVED.sub("", key))
    match = _OF_PEFT.fullmatch(name)
    if match is None:
        module, _, role = name.rpartition(".")
        return Key(module, role, outer)
    role = ".".join(filter(None, (match["part"], match["leaf"])))
    return Key(match["module"] or "", role, outer, match["adapter"] or "")


def check_outer(modules: Collection[str], outer: Iterable[str]) -> None:
    """Raise AdapterError if a module's name still begins with text in front of PEFT's own prefix.

    A trainer puts it there whose model holds the one that PEFT wrapped.  Whether the base model holds it too
    cannot be known from the file, and PEFT and vLLM load nothing of such names.

    modules: names after all renaming.
    outer:   the ``outer`` of their keys.
    """
    for front in sorted(set(filter(None, outer))):
        module = next((name for name in modules if name.startswith(front + PREFIX)), None)
        if module is not None:
            raise AdapterError(
                f"{module} has {front!r} in front of PEFT's own {PREFIX!r}, where no reader finds it; use "
                f"--rename {front}{PREFIX}={front} of the command merged-lora if these modules lie in "
                f"{front.rstrip('.')!r} in the base model, and --rename {front}{PREFIX}= if not"
            )


def _unwrapped(key: str) -> tuple[str, str]:
    """The key without wrappers and PEFT's own prefix, or with it behind the text in front of it."""
    parts = _without_parallel([part for part in key.split(".") if part not in _WRAPPERS])
    start = next((i for i in range(len(parts)) if parts[i : i + 2] == _PREFIX), None)
    if start is None:
        return ".".join(parts), ""
    front = parts[:start]
    while front and front[-1] in _PARALLEL:
        front.pop()
    rest = parts[start:]
    while rest[:2] == _PREFIX:  # twice for a PeftModel within another, with DDP's name before each
        rest = rest[2:]
        inner = _without_parallel(rest)
        rest = inner if inner[:2] == _PREFIX else rest
    if not front:
        return ".".join(rest), ""
    outer = ".".join(front) + "."
    return outer + PREFIX + ".".join(rest), outer


def _without_parallel(parts: list[str]) -> list[str]:
    """The parts without the names of DDP and its like in front, unless one of them is the module itself."""
    kept = next((i for i, part in enumerate(parts) if part not in _PARALLEL), len(parts))
    if kept and (kept == len(parts) or parts[kept].startswith("lora_")):
        kept -= 1
    return parts[kept:]
