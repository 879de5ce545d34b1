"""The plugin's settings, which travel in ``additional_config["merged_lora"]`` to every process of vLLM.

What only API servers need is taken out when an engine's configuration is made: vLLM hashes that configuration
into the keys of its compile cache, and an alias changes nothing that is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from merged_lora import checks
from merged_lora.aliases import check_alias_name
from merged_lora.backends import MODULES
from merged_lora.errors import MergeError, SpecError
from merged_lora.fetching.libraries import check_library
from merged_lora.locations import Pattern, shown
from merged_lora.spec import MAX_SOURCES, MAX_TEXT, MergeSpec, parse

KEY = "merged_lora"
BACKENDS = ("auto", *MODULES)
ANY_RELEASE, TESTED_ALONE = "any", "tested"
MAX_COUNT = 1 << 20
"""Largest value of a setting that counts merges."""
GIB = 1 << 30


def option(key: str) -> str:
    """The name of a setting on the command line."""
    return f"--merged-lora-{key.replace('_', '-')}"


@dataclass(frozen=True)
class Settings:
    """What the operator asked for.

    enable:      whether merges are served at all.
    aliases:     names served beside the adapters, each with its merge.
    alias_store: file through which API servers share aliases that change at run time; made by the plugin.
    local_workers: number of the server's workers on this machine; found by the plugin.

    :data:`FLAGS` describes the others.
    """

    enable: bool = False
    aliases: Mapping[str, MergeSpec] = field(default_factory=dict)
    backend: str = "auto"
    gpu_gib: float | None = None
    cache_gib: float = 4.0
    ready_gib: float = 4.0
    threads: int | None = None
    max_seconds: float = 600.0
    source_dir: str | None = None
    allow: tuple[str, ...] = ()
    fetch_seconds: float = 30.0
    runtime_aliases: bool = False
    playground: bool = False
    max_spec_length: int = 2048
    max_sources: int = 8
    max_strength: float = 1e6
    max_ad_hoc: int = 256
    max_waiting: int = 32
    check: bool = False
    vllm: str = ANY_RELEASE
    alias_store: str | None = None
    local_workers: int = 1

    @classmethod
    def of(cls, additional_config: object) -> Settings:
        """The settings in vLLM's ``additional_config``; raises MergeError if they are malformed."""
        given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        if given is None:
            return cls()
        names = [entry.name for entry in fields(cls)]
        if not isinstance(given, Mapping) or not set(given) <= set(names):
            raise MergeError(f'additional_config["{KEY}"] must be an object with some of: {", ".join(names)}')
        aliases = given.get("aliases", {})
        if not isinstance(given.get("enable", False), bool) or not isinstance(aliases, Mapping):
            raise MergeError(
                f'additional_config["{KEY}"]: "enable" must be true or false, "aliases" must be an object'
            )
        found = ("enable", "alias_store", "local_workers")
        values = {key: given[key] for key in found if key in given}
        values["aliases"] = {name: _alias(name, text) for name, text in aliases.items()}
        for flag in FLAGS:
            if flag.key in given:
                try:
                    values[flag.key] = flag.read(given[flag.key])
                except MergeError as error:
                    raise MergeError(f'additional_config["{KEY}"]: "{flag.key}" {error}') from None
        return cls(**values)

    def to_config(self, api_server: bool) -> dict[str, Any]:
        """The settings as ``additional_config`` holds them.

        api_server: include what only API servers need; without it, what an engine's workers need is left.
        """
        config: dict[str, Any] = {"enable": self.enable}
        if api_server and self.aliases:
            config["aliases"] = {name: str(spec) for name, spec in self.aliases.items()}
        if api_server and self.alias_store is not None:
            config["alias_store"] = self.alias_store
        for flag in FLAGS:
            value = getattr(self, flag.key)
            if (api_server or flag.workers) and value != flag.default:
                config[flag.key] = value
        return config


@dataclass(frozen=True)
class Flag:
    """A setting that takes one value.

    key:     its name in ``additional_config``.
    check:   returns a value in canonical form, or raises ValueError, whose message starts with "must be".
    help:    what the command line says about it.
    metavar: its value in the command line's help; None for a flag without a value.
    several: whether the command line takes several values, which are checked one by one and all together.
    workers: whether the engine's workers need it, and not only the API servers.
    """

    key: str
    check: Callable[[object], Any]
    help: str
    metavar: str | None = None
    workers: bool = False
    several: bool = False

    @property
    def option(self) -> str:
        """Its name on the command line."""
        return option(self.key)

    @property
    def default(self) -> Any:
        """Its value if nobody sets it."""
        return getattr(Settings, self.key)

    def read(self, value: object) -> Any:
        """A value, or the text of one, in canonical form; raises MergeError."""
        try:
            return self.check(value)
        except ValueError as error:
            raise MergeError(f"{error}, got {shown(str(value))!r}") from None


def parse_alias(text: str) -> tuple[str, str]:
    """The two parts of ``NAME=SPEC``; raises MergeError."""
    name, equals, spec = text.partition("=")
    if not equals or not name.strip():
        raise MergeError(f"must be NAME=SPEC, got {text[:64]!r}")
    _alias(name.strip(), spec)
    return name.strip(), spec


def _alias(name: str, text: object) -> MergeSpec:
    check_alias_name(name)
    if not isinstance(text, str):
        raise MergeError(f"alias {name!r} needs a spec as text")
    try:
        return parse(text)
    except SpecError as error:
        raise MergeError(f"alias {name!r}: {error}") from None


def _number(is_allowed: Callable[[float], bool], message: str) -> Callable[[object], float]:
    """A check with one message for any value that is not an allowed number."""

    def check(value: object) -> float:
        try:
            number = checks.number(checks.spelled(value))
        except ValueError:
            raise ValueError(message) from None
        if not is_allowed(number):
            raise ValueError(message)
        return number

    return check


def _whole_number(low: int, high: int) -> Callable[[object], int]:
    check = checks.whole_number(low, high)
    return lambda value: check(checks.spelled(value))


def _folder(value: object) -> str:
    if not isinstance(value, str) or "\0" in value or not Path(value).is_dir():
        raise ValueError("must be a folder that exists")
    return str(Path(value).resolve())


def _patterns(value: object) -> tuple[str, ...]:
    """Patterns of locations: one, or several in a list, as a command line or a configuration has them.

    Raises FetchError if a library is missing that they need.
    """
    if isinstance(value, str):
        pattern = Pattern(value).text
        check_library(pattern)
        return (pattern,)
    if not isinstance(value, list | tuple):
        raise ValueError("must be patterns of locations, such as hf:org/*")
    return tuple(dict.fromkeys(text for each in value for text in _patterns(each)))


_gib = _number(lambda gib: gib > 0, "must be a number of GiB above 0")

FLAGS = (
    Flag(
        "backend",
        checks.one_of(*BACKENDS),
        f"The backend that merges: {', '.join(BACKENDS)}; {Settings.backend}, the default, is triton on a "
        "machine with a GPU and cpu on any other.",
        "NAME",
        workers=True,
    ),
    Flag(
        "cache_gib",
        _gib,
        f"Host memory for copies of the adapters in each worker; {Settings.cache_gib:g} by default. The "
        "server does not start, and loads no adapter, if they do not fit.",
        "GIB",
        workers=True,
    ),
    Flag(
        "ready_gib",
        _gib,
        f"Host memory for merges that are ready in each worker; {Settings.ready_gib:g} by default. The least "
        "recently used merges make room for new ones; those of requests under way stay.",
        "GIB",
        workers=True,
    ),
    Flag(
        "threads",
        _whole_number(1, MAX_COUNT),
        "Number of threads in which each worker merges on its CPU, at low priority. By default, its share of "
        "the cores that the threads of all workers on this machine leave free, and at least one.",
        "N",
        workers=True,
    ),
    Flag(
        "max_seconds",
        _number(lambda seconds: seconds > 0, "must be a number of seconds above 0"),
        "Longest time that a new merge may take, by what such merges take on this machine; "
        f"{Settings.max_seconds:g} by default. A request for a longer one gets status 400.",
        "SECONDS",
        workers=True,
    ),
    Flag(
        "gpu_gib",
        _gib,
        "Device memory for the sources of merges on a GPU. By default there is room for as many adapters of "
        "the largest size that vLLM accepts as a merge may have sources, or as --max-loras if that is more.",
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
        "allow",
        _patterns,
        "Locations that a merge may name as sources, which are then fetched: hf:org/*, "
        "s3://bucket/adapters/*, gs://bucket/*, https://host/adapters/*, or one location. None by default.",
        "PATTERN",
        several=True,
    ),
    Flag(
        "fetch_seconds",
        _number(lambda seconds: seconds >= 0, "must be a number of seconds from 0"),
        "Longest time that a request waits for a source that is fetched; then it gets status 503, and the "
        f"fetch goes on. {Settings.fetch_seconds:g} by default.",
        "SECONDS",
    ),
    Flag(
        "runtime_aliases",
        checks.flag,
        "Let clients add, redefine and remove aliases: POST and DELETE /v1/merged_lora/{alias}.",
    ),
    Flag(
        "playground",
        checks.flag,
        "Serve the playground at /merged_lora/: a page on which merges are tried.",
    ),
    Flag(
        "max_spec_length",
        _whole_number(16, MAX_TEXT),
        f"Maximum length of a spec in characters; {Settings.max_spec_length} by default.",
        "N",
    ),
    Flag(
        "max_sources",
        _whole_number(1, MAX_SOURCES),
        f"Maximum number of sources of a merge; {Settings.max_sources} by default.",
        "N",
        workers=True,
    ),
    Flag(
        "max_strength",
        _number(lambda factor: 1.0 <= factor < math.inf, "must be a number of at least 1"),
        "Largest factor by which a merge may multiply an entry of a source's delta; "
        f"{Settings.max_strength:.0f} by default.",
        "X",
    ),
    Flag(
        "max_ad_hoc",
        _whole_number(0, MAX_COUNT),
        "Number of merges without an alias that are kept ready; the least recently used one is forgotten for "
        f"a new one. {Settings.max_ad_hoc} by default; with 0 only aliases are served.",
        "N",
    ),
    Flag(
        "max_waiting",
        _whole_number(0, MAX_COUNT),
        "Number of new merges that may wait while one is made; a request for one more gets status 429. "
        f"{Settings.max_waiting} by default.",
        "N",
    ),
    Flag(
        "check",
        checks.flag,
        "Replay the merges of aliases: warn of every source of which less than half of its own answers "
        "survive. Needs calibrated sources.",
    ),
    Flag(
        "vllm",
        checks.one_of(ANY_RELEASE, TESTED_ALONE),
        f"Releases of vLLM to start on: {Settings.vllm}, the default, warns if the release differs from the "
        "tested ones in what the plugin relies on; tested refuses to start on it.",
        "any|tested",
    ),
)
