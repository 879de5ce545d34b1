"""The plugin's settings; they travel in ``additional_config["merged_lora"]`` to every process of vLLM.

What only API servers need is taken out again where an engine's configuration is made: vLLM hashes that
configuration into the keys of its compile cache, and an alias changes nothing that is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from merged_lora.backends import MODULES
from merged_lora.errors import MergeError, SpecError
from merged_lora.spec import MAX_SOURCES, MAX_TEXT, MergeSpec, Source, parse

KEY = "merged_lora"
BACKENDS = ("auto", *MODULES)
ANY_RELEASE, TESTED_ALONE = "any", "tested"


def option(key: str) -> str:
    """The name of a setting on the command line."""
    return f"--merged-lora-{key.replace('_', '-')}"


@dataclass(frozen=True)
class Flag:
    """A setting that takes one value: its name, its check, and what the command line says of it.

    check: the value as it is kept; raises MergeError, whose message goes on after "KEY is ...".
    workers: the engine's workers need it, not the API servers alone.
    """

    key: str
    check: Callable[[object], Any]
    help: str
    metavar: str | None = None
    workers: bool = False

    @property
    def option(self) -> str:
        """Its name on the command line."""
        return option(self.key)


@dataclass(frozen=True)
class Settings:
    """What the operator asked for.

    aliases: names served beside the adapters, each with its merge.  alias_store: the file by which API
    servers share what is changed of them at run time; made by the plugin.  The others stand in FLAGS.
    """

    enable: bool = False
    aliases: Mapping[str, MergeSpec] = field(default_factory=dict)
    backend: str = "auto"
    gpu_gib: float | None = None
    cache_gib: float = 4.0
    source_dir: str | None = None
    runtime_aliases: bool = False
    max_spec_length: int = MAX_TEXT
    max_sources: int = 8
    max_strength: float = 1e6
    max_ad_hoc: int = 256
    max_waiting: int = 32
    vllm: str = ANY_RELEASE
    alias_store: str | None = None

    @classmethod
    def of(cls, additional_config: object) -> Settings:
        """The settings in vLLM's ``additional_config``; raises MergeError where they are malformed."""
        given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        if given is None:
            return cls()
        known = [entry.name for entry in fields(cls)]
        if not isinstance(given, Mapping) or not set(given) <= set(known):
            raise MergeError(f'additional_config["{KEY}"] is an object with some of: {", ".join(known)}')
        aliases = given.get("aliases", {})
        if not isinstance(given.get("enable", False), bool) or not isinstance(aliases, Mapping):
            raise MergeError(f'additional_config["{KEY}"]: "enable" is true or false, "aliases" an object')
        values = {"enable": given.get("enable", False), "alias_store": given.get("alias_store")}
        values["aliases"] = {name: _alias(name, text) for name, text in aliases.items()}
        for flag in FLAGS:
            if flag.key in given:
                try:
                    values[flag.key] = flag.check(given[flag.key])
                except MergeError as error:
                    raise MergeError(f'additional_config["{KEY}"]: "{flag.key}" is {error}') from None
        return cls(**values)

    def to_config(self, api_server: bool) -> dict[str, Any]:
        """The form in ``additional_config``: all of it, or for an engine what its workers need."""
        config: dict[str, Any] = {"enable": self.enable}
        if api_server and self.aliases:
            config["aliases"] = {name: str(spec) for name, spec in self.aliases.items()}
        if api_server and self.alias_store is not None:
            config["alias_store"] = self.alias_store
        for flag in FLAGS:
            value = getattr(self, flag.key)
            if (api_server or flag.workers) and value != getattr(Settings(), flag.key):
                config[flag.key] = value
        return config


def parse_alias(text: str) -> tuple[str, str]:
    """``NAME=SPEC`` as its two parts; raises MergeError."""
    name, equals, spec = text.partition("=")
    if not equals or not name.strip():
        raise MergeError(f"expected NAME=SPEC, got {text[:64]!r}")
    _alias(name.strip(), spec)
    return name.strip(), spec


def check_alias_name(name: str) -> None:
    """Raise MergeError for a name that no adapter could have: an alias follows the same rules."""
    try:
        MergeSpec("sum", (Source(name),))
    except SpecError as error:
        raise MergeError(f"alias {name[:64]!r}: {error}") from None


def _alias(name: str, text: object) -> MergeSpec:
    check_alias_name(name)
    if not isinstance(text, str):
        raise MergeError(f"alias {name!r} needs a spec as text")
    try:
        return parse(text)
    except SpecError as error:
        raise MergeError(f"alias {name!r}: {error}") from None


# Checks; what comes from a command line is text


def _one_of(*words: str) -> Callable[[object], str]:
    def check(value: object) -> str:
        if value not in words:
            raise MergeError(f"one of {', '.join(words)}, got {str(value)[:64]!r}")
        return str(value)

    return check


def _number(value: object) -> float:
    """The number that a value is or spells, NaN where it is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _gib(value: object) -> float:
    number = _number(value)
    if not 0 < number < math.inf:
        raise MergeError(f"a number of GiB above 0, got {str(value)[:64]!r}")
    return number


def _between(low: int, high: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        number = int(value) if isinstance(value, str) and value.isdecimal() else value
        if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
            raise MergeError(f"a whole number from {low} to {high}, got {str(value)[:64]!r}")
        return number

    return check


def _one_or_more(value: object) -> float:
    number = _number(value)
    if not 1.0 <= number < math.inf:
        raise MergeError(f"a number from 1 on, got {str(value)[:64]!r}")
    return number


def _folder(value: object) -> str:
    if not isinstance(value, str) or "\0" in value or not Path(value).is_dir():
        raise MergeError(f"a folder that exists, got {str(value)[:256]!r}")
    return str(Path(value).resolve())


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise MergeError(f"true or false, got {str(value)[:64]!r}")
    return value


FLAGS = (
    Flag(
        "backend",
        _one_of(*BACKENDS),
        "What merges: "
        + ", ".join(BACKENDS)
        + "; auto, the default, takes triton where there is a GPU, else cpu.",
        "NAME",
        workers=True,
    ),
    Flag(
        "cache_gib",
        _gib,
        "Host memory, in each worker, for copies of the adapters; 4 by default. The server does not start, "
        "and loads no adapter, where they do not fit.",
        "GIB",
        workers=True,
    ),
    Flag(
        "gpu_gib",
        _gib,
        "Device memory for the adapters that are merged on a GPU; by default room for as many of the largest "
        "adapter that vLLM takes as a merge has sources at most, or as --max-loras if that is more.",
        "GIB",
        workers=True,
    ),
    Flag(
        "source_dir",
        _folder,
        "A folder of adapter folders; a merge may name each of them as a source, without a restart.",
        "DIR",
    ),
    Flag(
        "runtime_aliases",
        _switch,
        "Let clients add, redefine and remove aliases: POST and DELETE /v1/merged_lora/{alias}.",
    ),
    Flag(
        "max_spec_length",
        _between(16, MAX_TEXT),
        f"Longest spec that is read, in characters; {MAX_TEXT} by default.",
        "N",
    ),
    Flag(
        "max_sources",
        _between(1, MAX_SOURCES),
        "Most sources of one merge; 8 by default.",
        "N",
        workers=True,
    ),
    Flag(
        "max_strength",
        _one_or_more,
        "Most that a merge may multiply an entry of a source's delta by; 1e6 by default.",
        "X",
    ),
    Flag(
        "max_ad_hoc",
        _between(0, 1 << 20),
        "Most merges without an alias that are remembered as made, the least recently used is forgotten; "
        "256 by default, 0 serves aliases alone.",
        "N",
    ),
    Flag(
        "max_waiting",
        _between(0, 1 << 20),
        "Most new merges that wait while one is made; a request for one more gets status 429. 32 by default.",
        "N",
    ),
    Flag(
        "vllm",
        _one_of(ANY_RELEASE, TESTED_ALONE),
        "Releases of vLLM to start on: any, the default, warns where one reads otherwise than those tested; "
        "tested refuses it.",
        "any|tested",
    ),
)
