"""Every touch with vLLM: what is imported from it, which of its methods are wrapped, and on which versions.

Each wrapper calls the original unchanged unless the plugin is enabled, so that an installed but unused plugin
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
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.v1.worker.worker_base import WorkerBase

from merged_lora.adapters import Adapter
from merged_lora.errors import MergeError, PlanError, UnknownAdapterError, listed
from merged_lora.peft_files import config_of, tensors_of
from merged_lora.spec import MergeSpec

from .identity import MergeIdentity, is_merge_path
from .server import MergeGate
from .settings import KEY, Settings, parse_alias
from .worker import MergeWorker, Reply, agreed

logger = logging.getLogger("vllm.merged_lora")

VERSIONS = ("0.32",)
"""Releases on which the tests run the plugin; the parameters in HOOKS were read there."""

CAPTURE, PREPARE = "merged_lora_capture", "merged_lora_prepare"
_ATTRIBUTE = "merged_lora"


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
            type=_alias_argument,
            metavar="NAME=SPEC",
            help="Names that stand for a merge, such as 'mix=ties(sql, chat, density=0.5)'.",
        )
        return parser

    return add_cli_args


def _alias_argument(text: str) -> tuple[str, str]:
    try:
        return parse_alias(text)
    except MergeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _with_settings(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_cli_args(cls: Any, args: Any) -> Any:
        enable = getattr(args, "enable_merged_lora", False)
        aliases = getattr(args, "merged_lora_modules", None) or []
        if aliases and not enable:
            raise ValueError("--merged-lora-modules needs --enable-merged-lora")
        if enable:
            if getattr(args, "grpc", False):
                raise ValueError("--enable-merged-lora does not work with --grpc, which bypasses its hooks")
            configured = Settings.of(args.additional_config).to_config(aliases=True).get("aliases", {})
            names = [*configured, *(name for name, _ in aliases)]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"--merged-lora-modules gives {twice[0]!r} twice")
            settings = {"enable": True, "aliases": configured | dict(aliases)}
            # API servers of their own get these arguments pickled, before the plugin is loaded there.
            args.additional_config = {**(args.additional_config or {}), KEY: settings}
            args.enable_lora = True
        return original(cls, args)

    return from_cli_args


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
        setattr(self, _ATTRIBUTE, None)
        if not Settings.of(engine_client.vllm_config.additional_config).enable:
            return

        async def ask(method: str, path: str) -> Reply:
            return agreed(await engine_client.collective_rpc(method, args=(path,)))

        gate = MergeGate(_aliases, functools.partial(ask, CAPTURE), functools.partial(ask, PREPARE))
        setattr(self, _ATTRIBUTE, gate)

    return init


def _gate(models: Any) -> MergeGate | None:
    return getattr(models, _ATTRIBUTE, None)


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


# Worker


def _with_worker(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        worker = None
        if Settings.of(vllm_config.additional_config).enable:
            worker = MergeWorker(
                self.lora_config.max_lora_rank,
                get_adapter_absolute_path,
                functools.partial(_lora_model, self),
            )
        setattr(self, _ATTRIBUTE, worker)

    return init


def _or_merge(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        worker: MergeWorker[LoRAModel] | None = getattr(self, _ATTRIBUTE, None)
        if worker is None or not is_merge_path(lora_request.lora_path):
            return original(self, lora_request)
        return worker.take(lora_request.lora_path)

    return _load_adapter


def _lora_model(manager: Any, number: int, adapter: Adapter) -> LoRAModel:
    """The adapter as vLLM holds it; raises PlanError where it does not fit the model."""
    model = manager._adapter_manager.model
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    config = {k: v for k, v in config_of(adapter.modules, adapter.header).items() if v is not None}
    helper = PEFTHelper.from_dict({**config, "vllm_max_position_embeddings": manager.max_position_embeddings})
    helper.validate_legal(manager.lora_config)
    lora: LoRAModel = manager._lora_model_cls.from_lora_tensors(
        number,
        tensors_of(adapter.modules),
        helper,
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
        skip_prefixes=getattr(model, "lora_skip_prefixes", None),
    )
    _check_fit(manager._adapter_manager, lora)
    return lora


def _check_fit(manager: Any, lora: LoRAModel) -> None:
    """Raise PlanError for modules the model does not have, or has in another shape.

    An adapter that vLLM itself loaded has passed its own checks; offline, sources never went that way.
    """
    kinds = {part for kind in manager.supported_lora_modules for part in _parts(manager, kind)}
    strangers = sorted(name for name in lora.loras if name.rsplit(".", 1)[-1] not in kinds)
    if strangers:
        raise PlanError(f"the model has no module {listed(strangers)} that takes LoRA")
    for name, layer in manager.modules.items():
        if not isinstance(layer, BaseLinearLayerWithLoRA) or layer.tp_size > 1:
            continue  # a shard, or an embedding: their slots have other shapes than the adapter
        parent, _, kind = name.rpartition(".")
        slots = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
        for part, (slot_a, slot_b) in zip(_parts(manager, kind), slots, strict=False):
            module = f"{parent}.{part}".removeprefix(".")
            weights = lora.get_lora(module)
            expected = slot_b.shape[-2], slot_a.shape[-1]
            if weights is not None and (weights.lora_b.shape[0], weights.lora_a.shape[1]) != expected:
                raise PlanError(f"{module} has shape {expected} in the model, another one in the adapters")


def _parts(manager: Any, kind: str) -> list[str]:
    """The modules of an adapter that vLLM packs into one of this kind; itself where it packs none."""
    packed: list[str] = manager.packed_modules_mapping.get(kind, [])
    return packed or [kind]


def _merge_worker(worker: Any) -> tuple[MergeWorker[LoRAModel] | None, set[int]]:
    manager = getattr(worker.model_runner, "lora_manager", None)
    return getattr(manager, _ATTRIBUTE, None), manager.list_adapters() if manager is not None else set()


_DISABLED: Reply = {"ok": False, "kind": "internal", "error": "merged LoRA is not enabled in this worker"}


def _rpc_capture(self: Any, path: str) -> Reply:
    merges, _ = _merge_worker(self)
    return _DISABLED if merges is None else merges.capture(path)


def _rpc_prepare(self: Any, path: str) -> Reply:
    merges, loaded = _merge_worker(self)
    return _DISABLED if merges is None else merges.prepare(path, loaded)


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
        _with_worker,
    ),
    Hook(WorkerLoRAManager, "_load_adapter", "self lora_request", _or_merge),
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
    setattr(WorkerBase, CAPTURE, _rpc_capture)
    setattr(WorkerBase, PREPARE, _rpc_prepare)


def _plain(method: Any) -> Callable[..., Any]:
    return method.__func__ if isinstance(method, staticmethod | classmethod) else method
