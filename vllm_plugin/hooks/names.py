"""Which module of the model a name in an adapter means, as vLLM decides it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.models.utils import PPMissingLayer

from merged_lora.files.layout import PREFIX

FIRST = ("model.", "lm_head")
"""How names begin in transformers; a spelling that begins like this goes before the others."""
KNOWN = 1 << 16
"""Most names of adapters whose meaning is kept: the largest models have 45,000 modules with their experts."""


def parts_of(packed: Mapping[str, list[str]], name: str) -> list[str]:
    """The full names of the modules that vLLM packs into this one; its own name if it packs none."""
    return packed.get(name) or [name]


def names_of(layers: Any, part: str) -> list[str]:
    """The names under which vLLM looks for a module in an adapter; the first one found counts.

    In a pooling model, ``model.`` may be missing.  Since 0.33, an adapter of the text model alone fits a
    multimodal one, whose names have a prefix.
    """
    asked = _Asked()
    layers._get_lora_layer_weights(asked, part)
    return list(asked.names)


class _Asked:
    """An adapter without modules, to vLLM, which notes the names that vLLM looks for."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}

    def check_lora_name(self, name: str) -> bool:
        self.names[name] = None
        return False

    def get_lora(self, name: str) -> None:
        self.names[name] = None


class ModelNames:
    """The names that adapters have for the modules of a model.

    layers: one of vLLM's managers.
    """

    def __init__(self, layers: Any) -> None:
        mapper = getattr(layers.model, "hf_to_vllm_mapper", None)
        self.mapper = mapper.get_rename_mapper() if mapper is not None else None
        self._parts = {name: parts_of(layers.packed_modules, name) for name in layers.modules}
        parts = [part for packed in self._parts.values() for part in packed]
        self._parts |= {part: [part] for part in parts}
        # Parts first: the name of a layer into which vLLM packs several may be that of one of them.
        self._modules: dict[str, str] = {}
        for module in (*parts, *layers.modules):
            for name in names_of(layers, module):
                self._modules.setdefault(name, module)
        self._modules |= {part: part for part in parts}
        skipped = getattr(layers.model, "lora_skip_prefixes", None) or ()
        self._skipped = tuple(f".{prefix}" for prefix in skipped)
        self._unused = tuple(
            f"{name}." for module in _unused_modules(layers) for name in names_of(layers, module)
        )
        self._spellings: dict[str, str | None] = {}  # of modules of the model alone
        # Adapters may have any names.  This cache is safe between the threads that read, merge and step.
        self._theirs = functools.lru_cache(KNOWN)(functools.partial(_parsed, self.mapper))

    def theirs(self, name: str) -> str:
        """vLLM's name for a module of an adapter, whether or not the model has it."""
        return self._theirs(name)

    def module(self, name: str) -> str | None:
        """The module of the model that an adapter means by a name; None if it has none that takes LoRA.

        It is one of ``parts``, or the layer into which vLLM packs several of them.
        """
        return self._modules.get(self.theirs(name))

    def parts(self, name: str) -> list[str]:
        """The modules that an adapter means by a name: one, or all that vLLM packs into one, or none."""
        module = self.module(name)
        return self._parts[module] if module is not None else []

    def part_of(self, theirs: str) -> str:
        """The module of the model that vLLM means by one of its names; that name if there is none."""
        return self._modules.get(theirs, theirs)

    def is_unused(self, name: str) -> bool:
        """Whether a module of an adapter is meant to have no effect in this worker.

        It is in another stage of the pipeline, or not in ``--lora-target-modules``, or the model skips it.
        """
        if any(prefix in f".{name}." for prefix in self._skipped):
            return True
        return self.module(name) is None and f"{self.theirs(name)}.".startswith(self._unused)

    def spelling(self, module: str, own: str) -> str:
        """The one name that all adapters get for a module of the model.

        module: that module.
        own:    an adapter's name for it, which stays if vLLM takes no other name for this module.
        """
        if module not in self._spellings:
            candidates = sorted(self._candidates(module), key=lambda name: not name.startswith(FIRST))
            fitting = (name for name in candidates if self.module(name) == module)
            self._spellings[module] = next(fitting, None)
        return self._spellings[module] or own

    def _candidates(self, module: str) -> Iterator[str]:
        """vLLM's own name for a module, and those that vLLM would give this name to."""
        yield module
        prefixes = self.mapper.orig_to_new_prefix if self.mapper is not None else {}
        for theirs, ours in prefixes.items():
            if f"{module}.".startswith(ours):
                yield (theirs + f"{module}."[len(ours) :]).removesuffix(".")


def _parsed(mapper: Any, name: str) -> str:
    theirs: str = parse_fine_tuned_lora_name(f"{PREFIX}{name}.lora_A.weight", mapper)[0]
    return theirs


def _unused_modules(layers: Any) -> Iterator[str]:
    """Modules of the model that are in another stage of the pipeline, or not in ``--lora-target-modules``."""
    restricted = layers.lora_config.target_modules is not None
    for name, module in layers.model.named_modules():
        if isinstance(module, PPMissingLayer):
            yield name
        elif restricted and name not in layers.modules and not layers._match_target_modules(name):
            prefix, _, last = name.rpartition(".")
            if last in layers.supported_lora_modules:
                yield name
                parts = layers.packed_modules_mapping.get(last) or [last]
                yield from (f"{prefix}.{part}" if prefix else part for part in parts)
