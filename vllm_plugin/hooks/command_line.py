"""Hooks into vLLM's command line: the plugin's flags, and their way to vLLM's processes.

``table.py`` lists the functions of vLLM that are wrapped.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import vllm
from vllm.platforms import current_platform

from merged_lora.errors import MergeError
from merged_lora.fetching.libraries import check_library
from merged_lora.locations import parse
from merged_lora.vllm_plugin.api_server.fetched import is_location
from merged_lora.vllm_plugin.settings import FLAGS, KEY, TESTED_ALONE, Settings, option, parse_alias

from .current import current
from .versions import check_tested, difference

logger = logging.getLogger("vllm.merged_lora")


def wrap_add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineArgs.add_cli_args``: the plugin's flags are added."""

    @functools.wraps(original)
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = original(parser, *args, **kwargs)
        group = parser.add_argument_group("merged LoRA", "LoRA adapters merged on demand.")
        group.add_argument(
            "--enable-merged-lora",
            action="store_true",
            help="Serve merges of LoRA adapters that requests name; implies --enable-lora.",
        )
        group.add_argument(
            "--merged-lora-modules",
            nargs="+",
            type=_checked(parse_alias),
            metavar="NAME=SPEC",
            help="Names that stand for a merge, such as 'mix=ties(sql, chat, density=0.5)'.",
        )
        for flag in FLAGS:
            if flag.metavar is None:
                group.add_argument(flag.option, action="store_const", const=True, help=flag.help)
            else:
                several: dict[str, Any] = {"nargs": "+"} if flag.several else {}
                group.add_argument(
                    flag.option, type=_checked(flag.read), metavar=flag.metavar, help=flag.help, **several
                )
        return parser

    return add_cli_args


def _checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def argument(text: str) -> Any:
        try:
            return parse(text)
        except MergeError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return argument


def given_flags(args: Any) -> dict[str, Any]:
    """The values of the flags that were given, except ``--enable-merged-lora``, by key."""
    values = {key: getattr(args, f"merged_lora_{key}", None) for key in ("modules", *(f.key for f in FLAGS))}
    several = {flag.key: flag for flag in FLAGS if flag.several}
    return {
        key: several[key].read(value) if key in several else value
        for key, value in values.items()
        if value is not None
    }


def wrap_from_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineArgs.from_cli_args``: the flags become ``additional_config["merged_lora"]``."""

    @functools.wraps(original)
    def from_cli_args(cls: Any, args: Any) -> Any:
        given = given_flags(args)
        if getattr(args, "enable_merged_lora", False):
            if getattr(args, "grpc", False):
                raise ValueError("--enable-merged-lora does not work with --grpc, which bypasses its hooks")
            _check_modules(args)
            configured = Settings.of(args.additional_config).to_config(api_server=True)
            merged = _combined(configured, dict(given)) | {"enable": True}
            _check_aliases(args, merged)
            if merged.get("runtime_aliases") and "alias_store" not in merged:
                merged["alias_store"] = _new_alias_store()
            # Separate API servers get these arguments pickled, before the plugin is loaded there.
            args.additional_config = {**(args.additional_config or {}), KEY: merged}
            args.enable_lora = True
            for name in given:
                setattr(args, f"merged_lora_{name}", None)  # otherwise they would be combined a second time
        elif given:
            raise ValueError(f"{option(next(iter(given)))} needs --enable-merged-lora")
        return original(cls, args)

    return from_cli_args


def _check_modules(args: Any) -> None:
    """Raise ValueError for an adapter that the server could not fetch, before any model is loaded."""
    for module in getattr(args, "lora_modules", None) or ():
        try:
            if is_location(module.path):
                check_library(str(parse(module.path)))
        except MergeError as error:
            raise ValueError(f"--lora-modules {module.name}: {error}") from None


def _check_aliases(args: Any, settings: Mapping[str, Any]) -> None:
    """Raise ValueError for an alias of an adapter that will not be served, before any model is loaded."""
    if "lora_modules" not in vars(args) or settings.get("source_dir") or settings.get("allow"):
        return
    served = {module.name for module in args.lora_modules or ()}
    for alias, spec in Settings.of({KEY: settings}).aliases.items():
        for name in spec.names:
            if name not in served:
                raise ValueError(
                    f"--merged-lora-modules {alias}: unknown adapter {name!r}; serve it with --lora-modules "
                    f"{name}=PATH"
                )


def _combined(configured: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Settings of ``additional_config`` and of the command line; raises ValueError if they disagree."""
    aliases = given.pop("modules", [])
    names = [*configured.get("aliases", {}), *(name for name, _ in aliases)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--merged-lora-modules gives {twice[0]!r} twice")
    for key, value in given.items():
        if configured.get(key, value) != value:
            raise ValueError(
                f"{option(key)} says {value}, additional_config {configured[key]}; give one of them"
            )
    return {**configured, **given, "aliases": configured.get("aliases", {}) | dict(aliases)}


def _new_alias_store() -> str:
    """A file, private to this user, through which the API servers of one server share their aliases."""
    folder = tempfile.mkdtemp(prefix="merged-lora-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(Path(folder) / "aliases.json")


def wrap_create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineArgs.create_engine_config``: check the settings and leave those that workers need."""

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = current.settings = Settings.of(self.additional_config)
        if settings.enable:
            _check_release(settings.vllm)
            if vllm.envs.VLLM_USE_RUST_FRONTEND:
                raise ValueError(
                    "merged LoRA does not work with the Rust front end, which bypasses its hooks"
                )
            # Checked here because a worker's error is buried in its log; no device is initialised yet.
            interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
            if settings.backend == "triton" and current_platform.is_cpu() and not interpreted:
                raise ValueError(
                    "--merged-lora-backend triton needs a CUDA or ROCm device, and vLLM runs on the CPU "
                    "here; leave the flag out, or name cpu"
                )
            self.enable_lora = True
            self.additional_config = {**self.additional_config, KEY: settings.to_config(api_server=False)}
        config = original(self, *args, **kwargs)
        if settings.enable:
            config.additional_config[KEY]["local_workers"] = _local_workers(config.parallel_config)
        return config

    return create_engine_config


def _local_workers(parallel: Any) -> int:
    """Number of workers on this machine, of all its engines; 1 if it has none.

    It has to be asked here: an engine of a dense model takes itself for the only one.
    """
    engines: int = parallel.data_parallel_size_local
    return parallel.local_world_size * engines if engines else 1


def _check_release(accepted: str) -> None:
    """Warn if vLLM differs from the tested releases; refuse it if the operator accepts only those."""
    if accepted == TESTED_ALONE:
        try:
            check_tested()
        except MergeError as error:
            raise ValueError(str(error)) from None
    elif multiprocessing.parent_process() is None:  # child processes would only repeat it
        changes = difference()
        if changes:
            logger.warning("%s; merges may go wrong, and --merged-lora-vllm tested would not start", changes)
