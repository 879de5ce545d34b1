"""What is wrapped of vLLM, and on which versions; the wrappers of the command line and of the API server.

Those of the workers stand in ``compat_worker.py``; no other file touches vLLM but the offline helper.  Each
wrapper calls the original unchanged unless the plugin is enabled, so that an installed but unused plugin
changes nothing.  A method whose parameters are not the known ones is a reason to refuse, not to guess.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard, ModelPermission
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.v1.worker.worker_base import WorkerBase

from merged_lora.errors import MergeError, UnknownAdapterError
from merged_lora.spec import MergeSpec

from .compat_worker import (
    ATTRIBUTE,
    CAPTURE,
    PREPARE,
    filling_slots,
    or_merge,
    rpc_capture,
    rpc_prepare,
    with_worker,
)
from .identity import MergeIdentity
from .server import MergeGate
from .settings import BACKENDS, KEY, Settings, parse_alias, parse_gib
from .worker import Reply, agreed

logger = logging.getLogger("vllm.merged_lora")

VERSIONS = ("0.32",)
"""Releases on which the tests run the plugin; the parameters in HOOKS were read there."""


@dataclass(frozen=True)
class Served:
    """What one request is served with: the request itself, its adapter, and the model name it sent."""

    request: object
    adapter: LoRARequest
    model: str


_served: ContextVar[Served | None] = ContextVar("merged_lora_served", default=None)
_aliases: dict[str, MergeSpec] = {}


def lora_request(identity: MergeIdentity) -> LoRARequest:
    """The request by which vLLM activates a merge."""
    return LoRARequest(lora_name=identity.name, lora_int_id=identity.number, lora_path=identity.path)


# Command line and configuration


def _with_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        group = parser.add_argument_group("merged LoRA", "LoRA adapters merged on demand.")
        group.add_argument(
            "--enable-merged-lora",
            action="store_true",
            help="Serve merges of LoRA adapters that a request names; implies --enable-lora.",
        )
        group.add_argument(
            "--merged-lora-modules",
            nargs="+",
            type=_checked(parse_alias),
            metavar="NAME=SPEC",
            help="Names that stand for a merge, such as 'mix=ties(sql, chat, density=0.5)'.",
        )
        group.add_argument(
            "--merged-lora-backend",
            choices=BACKENDS,
            help="What merges; auto, the default, takes triton where there is a GPU, else cpu.",
        )
        group.add_argument(
            "--merged-lora-gpu-gib",
            type=_checked(parse_gib),
            metavar="GIB",
            help="Device memory for the adapters that are merged on a GPU; 1 by default.",
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


def _with_settings(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_cli_args(cls: Any, args: Any) -> Any:
        given = {
            key: value
            for key in ("modules", "backend", "gpu_gib")
            if (value := getattr(args, f"merged_lora_{key}", None)) is not None
        }
        if getattr(args, "enable_merged_lora", False):
            if getattr(args, "grpc", False):
                raise ValueError("--enable-merged-lora does not work with --grpc, which bypasses its hooks")
            configured = Settings.of(args.additional_config).to_config(aliases=True)
            aliases = given.pop("modules", [])
            names = [*configured.get("aliases", {}), *(name for name, _ in aliases)]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"--merged-lora-modules gives {twice[0]!r} twice")
            for key, value in given.items():
                if configured.get(key, value) != value:
                    raise ValueError(
                        f"{_flag(key)} says {value}, additional_config {configured[key]}; give one of them"
                    )
            settings = configured | given | {"enable": True}
            settings["aliases"] = configured.get("aliases", {}) | dict(aliases)
            # API servers of their own get these arguments pickled, before the plugin is loaded there.
            args.additional_config = {**(args.additional_config or {}), KEY: settings}
            args.enable_lora = True
        elif given:
            raise ValueError(f"{_flag(next(iter(given)))} needs --enable-merged-lora")
        return original(cls, args)

    return from_cli_args


def _flag(key: str) -> str:
    return f"--merged-lora-{key.replace('_', '-')}"


def _with_lora_enabled(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = Settings.of(self.additional_config)
        if settings.enable:
            if vllm.envs.VLLM_USE_RUST_FRONTEND:
                raise ValueError(
                    "merged LoRA does not work with the Rust front end, which bypasses its hooks"
                )
            if self.data_parallel_size > 1:
                raise ValueError("merged LoRA does not work with data parallel: one engine alone would merge")
            self.enable_lora = True
            self.additional_config = {**self.additional_config, KEY: settings.to_config(aliases=False)}
            _aliases.update(settings.aliases)
        return original(self, *args, **kwargs)

    return create_engine_config


# API server


def _with_gate(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, engine_client: Any, *args: Any, **kwargs: Any) -> None:
        original(self, engine_client, *args, **kwargs)
        setattr(self, ATTRIBUTE, None)
        if not Settings.of(engine_client.vllm_config.additional_config).enable:
            return

        async def ask(method: str, path: str) -> Reply:
            return agreed(await engine_client.collective_rpc(method, args=(path,)))

        gate = MergeGate(_aliases, functools.partial(ask, CAPTURE), functools.partial(ask, PREPARE))
        setattr(self, ATTRIBUTE, gate)

    return init


def _gate(models: Any) -> MergeGate | None:
    return getattr(models, ATTRIBUTE, None)


def _then_check_aliases(original: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(original)
    async def init_static_loras(self: Any) -> None:
        await original(self)
        gate = _gate(self)
        if gate is not None:
            try:
                gate.check_aliases([model.name for model in self.base_model_paths])
            except MergeError as error:
                raise ValueError(str(error)) from None

    return init_static_loras


def _then_register(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        gate = _gate(self)
        if gate is None:
            return await original(self, request, base_model_name)
        if request.lora_name in gate.aliases:
            return BaseServing.create_error_response(f"{request.lora_name!r} is the name of a merge")
        async with gate.changes:
            result = await original(self, request, base_model_name)
            if not isinstance(result, ErrorResponse):
                await gate.register(request.lora_name, request.lora_path)
        return result

    return load_lora_adapter


def _then_forget(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def unload_lora_adapter(self: Any, request: Any) -> Any:
        gate = _gate(self)
        if gate is None:
            return await original(self, request)
        async with gate.changes:
            result = await original(self, request)
            if not isinstance(result, ErrorResponse):
                gate.forget(request.lora_name)
        return result

    return unload_lora_adapter


def _with_aliases(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def show_available_models(self: Any) -> Any:
        models = await original(self)
        gate = _gate(self)
        if gate is not None:
            base = self.base_model_paths[0].name
            models.data.extend(
                ModelCard(id=name, root=str(spec), parent=base, permission=[ModelPermission()])
                for name, spec in gate.aliases.items()
            )
        return models

    return show_available_models


def _with_sent_name(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def model_name(self: Any, lora_request: Any = None) -> str:
        served = _served.get()
        if served is not None and lora_request is served.adapter:
            return served.model
        return original(self, lora_request)

    return model_name


def _through_gate(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def _check_model(self: Any, request: Any) -> Any:
        _served.set(None)
        gate = _gate(self.models)
        if gate is None:
            return await original(self, request)
        try:
            spec = gate.asked_for(request.model, _body(request), self.models.is_base_model)
            if spec is None:
                return await original(self, request)
            if getattr(self, "request_logger", None) is not None:
                self.request_logger.log_request_body(request)
            identity = await gate.ready(spec)
        except MergeError as error:
            if isinstance(self, PoolingBaseServing):
                raise ValueError(str(error)) from None  # its callers expect an exception
            missing = isinstance(error, UnknownAdapterError)
            return self.create_error_response(
                str(error),
                err_type="NotFoundError" if missing else "BadRequestError",
                status_code=HTTPStatus.NOT_FOUND if missing else HTTPStatus.BAD_REQUEST,
                param="model" if _body(request) is None else "merged_adapters",
            )
        sent = request.model or self.models.base_model_paths[0].name
        _served.set(Served(request, lora_request(identity), sent))
        return None

    return _check_model


def _with_merge(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _maybe_get_adapters(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        served = _served.get()
        if served is not None and served.request is request:
            return served.adapter
        if _gate(self.models) is not None and _body(request) is not None:
            raise RuntimeError("a request for a merge was not checked; it is not served with the base model")
        return original(self, request, *args, **kwargs)

    return _maybe_get_adapters


def _body(request: Any) -> object:
    return (request.model_extra or {}).get("merged_adapters")


# What is wrapped


@dataclass(frozen=True)
class Hook:
    """A method of vLLM: its class, name and parameters as they were read, and what wraps it."""

    owner: Any
    name: str
    parameters: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]


HOOKS = (
    Hook(EngineArgs, "add_cli_args", "parser", _with_flags),
    Hook(EngineArgs, "from_cli_args", "cls args", _with_settings),
    Hook(EngineArgs, "create_engine_config", "self usage_context headless", _with_lora_enabled),
    Hook(OpenAIServingModels, "__init__", "self engine_client base_model_paths lora_modules", _with_gate),
    Hook(OpenAIServingModels, "init_static_loras", "self", _then_check_aliases),
    Hook(OpenAIServingModels, "load_lora_adapter", "self request base_model_name", _then_register),
    Hook(OpenAIServingModels, "unload_lora_adapter", "self request", _then_forget),
    Hook(OpenAIServingModels, "show_available_models", "self", _with_aliases),
    Hook(OpenAIServingModels, "model_name", "self lora_request", _with_sent_name),
    Hook(BaseServing, "_check_model", "self request", _through_gate),
    Hook(PoolingBaseServing, "_check_model", "self request", _through_gate),
    Hook(BaseServing, "_maybe_get_adapters", "self request supports_default_mm_loras", _with_merge),
    Hook(
        WorkerLoRAManager,
        "__init__",
        "self vllm_config device embedding_modules lora_model_cls",
        with_worker,
    ),
    Hook(WorkerLoRAManager, "_load_adapter", "self lora_request", or_merge),
    Hook(LoRAModelManager, "activate_adapter", "self lora_id", filling_slots),
)


def problems() -> list[str]:
    """Why the hooks do not fit the vLLM that is installed; empty where they do."""
    found = []
    if not vllm.__version__.startswith(tuple(f"{version}." for version in VERSIONS)):
        found.append(f"vLLM {vllm.__version__} is not one of the tested releases ({', '.join(VERSIONS)})")
    for hook in HOOKS:
        function = inspect.unwrap(_plain(vars(hook.owner)[hook.name]))
        actual = " ".join(inspect.signature(function).parameters)
        if actual != hook.parameters:
            found.append(f"{hook.owner.__name__}.{hook.name} takes {actual}")
    return found


def install() -> None:
    """Wrap the hooks, once per process."""
    if hasattr(WorkerBase, CAPTURE):
        return
    for hook in HOOKS:
        original = vars(hook.owner)[hook.name]
        wrapped: Any = hook.wrap(_plain(original))
        if isinstance(original, staticmethod | classmethod):
            wrapped = type(original)(wrapped)
        setattr(hook.owner, hook.name, wrapped)
    setattr(WorkerBase, CAPTURE, rpc_capture)
    setattr(WorkerBase, PREPARE, rpc_prepare)


def _plain(method: Any) -> Callable[..., Any]:
    return method.__func__ if isinstance(method, staticmethod | classmethod) else method
