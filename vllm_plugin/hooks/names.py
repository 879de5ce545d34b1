"""Which module of the model a name in an adapter means, as vLLM decides it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.models.utils import PPMissingLayer

from merged_lora.files.layout import PREFIX

FIRST = ("model.", "lm_head")
"""How names begin in transformers; a spelling that begins like this goes before the others."""


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
        packed = {name: parts_of(layers.packed_modules, name) for name in layers.modules}
        parts = {part: [part] for parts in packed.values() for part in parts}
        # What a name means: the module that vLLM looks for by it first, or else all that are packed into it.
        self._meant: dict[str, list[str]] = {**parts}
        for name, meant in (*parts.items(), *packed.items()):
            for other in names_of(layers, name):
                self._meant.setdefault(other, meant)
        skipped = getattr(layers.model, "lora_skip_prefixes", None) or ()
        self._skipped = tuple(f".{prefix}" for prefix in skipped)
        self._unused = tuple(
            f"{name}." for module in _unused_modules(layers) for name in names_of(layers, module)
        )
        self._theirs: dict[str, str] = {}
        self._spellings: dict[str, str | None] = {}

    def theirs(self, name: str) -> str:
        """vLLM's name for a module of an adapter, whether or not the model has it."""
        if name not in self._theirs:
            self._theirs[name] = parse_fine_tuned_lora_name(f"{PREFIX}{name}.lora_A.weight", self.mapper)[0]
        return self._theirs[name]

    def parts(self, name: str) -> list[str]:
        """The modules of the model that an adapter means by a name: one, or all that vLLM packs into one.

        None at all if the model has no such module that takes LoRA.
        """
        return self._meant.get(self.theirs(name), [])

    def part_of(self, theirs: str) -> str:
        """The module of the model that vLLM means by one of its names; that name if there is none."""
        parts = self._meant.get(theirs, [])
        return parts[0] if len(parts) == 1 else theirs

    def is_unused(self, name: str) -> bool:
        """Whether a module of an adapter is meant to have no effect in this worker.

        It is in another stage of the pipeline, or not in ``--lora-target-modules``, or the model skips it.
        """
        if any(prefix in f".{name}." for prefix in self._skipped):
            return True
        return not self.parts(name) and f"{self.theirs(name)}.".startswith(self._unused)

    def spellings(self, name: str) -> list[str]:
        """The one name that all adapters get for each of the modules that an adapter means by a name.

        If vLLM takes none of the names of a module for it, its name in the adapter stays.
        """
        prefix, parts = name.rpartition(".")[0], self.parts(name)
        own = [name] if len(parts) == 1 else [f"{prefix}.{part.rpartition('.')[2]}" for part in parts]
        return [self._spelling(part) or given for part, given in zip(parts, own, strict=True)]

    def _spelling(self, part: str) -> str | None:
        if part not in self._spellings:
            candidates = sorted(self._candidates(part), key=lambda name: not name.startswith(FIRST))
            self._spellings[part] = next((name for name in candidates if self.parts(name) == [part]), None)
        return self._spellings[part]

    def _candidates(self, part: str) -> Iterator[str]:
        """vLLM's own name for a module, and those that vLLM would give this name to."""
        yield part
        prefixes = self.mapper.orig_to_new_prefix if self.mapper is not None else {}
        for theirs, ours in prefixes.items():
            if f"{part}.".startswith(ours):
                yield (theirs + f"{part}."[len(ours) :]).removesuffix(".")


def _unused_modules(layers: Any) -> Iterator[str]:
    """Modules of the model that are in another stage of the pipeline, or not in ``--lora-target-modules``."""
    restricted = layers.lora_config.target_modules is not None
    for name, module in layers.model.named_modules():
        if isinstance(module, PPMissingLayer):
            yield name
        elif restricted and name not in layers.modules and not layers._match_target_modules(name):
            prefix, _, last = name.rpartition(".")
            if last in layers.supported_lora_modules:
                parts = layers.packed_modules_mapping.get(last) or [last]
                yield from (f"{prefix}.{part}" if prefix else part for part in parts)
