"""The plugin's settings; they travel in ``additional_config["merged_lora"]`` to every process of vLLM.

Aliases are taken out again where an engine's configuration is made: vLLM hashes that configuration into the
keys of its compile cache, and an alias changes nothing that is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merged_lora.backends import MODULES
from merged_lora.errors import MergeError, SpecError
from merged_lora.spec import MergeSpec, Source, parse

KEY = "merged_lora"
BACKENDS = ("auto", *MODULES)


@dataclass(frozen=True)
class Settings:
    """What the operator asked for.

    aliases: names served beside the adapters, each with its merge.  backend: what merges, a name for
    ``load_backend``.  gpu_gib: device memory for sources, in GiB, where that backend merges on a device.
    """

    enable: bool = False
    aliases: Mapping[str, MergeSpec] = field(default_factory=dict)
    backend: str = "auto"
    gpu_gib: float = 1.0

    @classmethod
    def of(cls, additional_config: object) -> Settings:
        """The settings in vLLM's ``additional_config``; raises MergeError where they are malformed."""
        given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        if given is None:
            return cls()
        if not isinstance(given, Mapping) or not set(given) <= {"enable", "aliases", "backend", "gpu_gib"}:
            raise MergeError(
                f'additional_config["{KEY}"] takes "enable" (true or false), "aliases" (name: spec), '
                f'"backend" ({", ".join(BACKENDS)}) and "gpu_gib" (a number)'
            )
        aliases = given.get("aliases", {})
        if not isinstance(given.get("enable", False), bool) or not isinstance(aliases, Mapping):
            raise MergeError(f'additional_config["{KEY}"]: "enable" is true or false, "aliases" an object')
        backend = given.get("backend", "auto")
        if backend not in BACKENDS:
            raise MergeError(
                f'additional_config["{KEY}"]: "backend" is one of {", ".join(BACKENDS)}, '
                f"got {str(backend)[:64]!r}"
            )
        return cls(
            given.get("enable", False),
            {name: _alias(name, text) for name, text in aliases.items()},
            backend,
            _gib(given.get("gpu_gib", 1.0)),
        )

    def to_config(self, aliases: bool) -> dict[str, Any]:
        """The form in ``additional_config``, with the aliases or without."""
        config: dict[str, Any] = {"enable": self.enable}
        if aliases and self.aliases:
            config["aliases"] = {name: str(spec) for name, spec in self.aliases.items()}
        if self.backend != "auto":
            config["backend"] = self.backend
        if self.gpu_gib != 1.0:
            config["gpu_gib"] = self.gpu_gib
        return config


def parse_gib(text: str) -> float:
    """A size in GiB; raises MergeError where it is not above 0."""
    try:
        return _gib(float(text))
    except ValueError:
        raise MergeError(f"expected a number of GiB, got {text[:64]!r}") from None


def parse_alias(text: str) -> tuple[str, str]:
    """``NAME=SPEC`` as its two parts; raises MergeError."""
    name, equals, spec = text.partition("=")
    if not equals or not name.strip():
        raise MergeError(f"expected NAME=SPEC, got {text[:64]!r}")
    _alias(name.strip(), spec)
    return name.strip(), spec


def _gib(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise MergeError(f"device memory for sources is a number of GiB above 0, got {str(value)[:64]!r}")
    return float(value)


def _alias(name: str, text: object) -> MergeSpec:
    try:
        MergeSpec("sum", (Source(name),))  # an alias follows the rules of adapter names
    except SpecError as error:
        raise MergeError(f"alias {name[:64]!r}: {error}") from None
    if not isinstance(text, str):
        raise MergeError(f"alias {name!r} needs a spec as text")
    try:
        return parse(text)
    except SpecError as error:
        raise MergeError(f"alias {name!r}: {error}") from None
