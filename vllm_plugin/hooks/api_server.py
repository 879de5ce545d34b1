"""Hooks into vLLM's API server: every request passes the gate; routes, models and metrics show merges.

``table.py`` lists the functions of vLLM that are wrapped.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import operator
import uuid
import weakref
from collections.abc import Awaitable, Callable, Collection
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import vllm.envs
from fastapi import FastAPI, HTTPException, Request
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard, ModelPermission
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.exceptions import VLLMClientError, VLLMNotFoundError
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams

from merged_lora.errors import CalibrationError, FetchError, MergeError
from merged_lora.playground.pages import PATH, pages
from merged_lora.replay import Replayed
from merged_lora.spec import MergeSpec, check_own_name
from merged_lora.vllm_plugin.api_server.exchange import Exchanges, add_header, check_key, has_key, name_merge
from merged_lora.vllm_plugin.api_server.fields import FIELD, FieldError, check_fields
from merged_lora.vllm_plugin.api_server.gate import BusyError, MergeGate
from merged_lora.vllm_plugin.api_server.metrics import metrics
from merged_lora.vllm_plugin.api_server.replaying import Replays, Tokens
from merged_lora.vllm_plugin.api_server.routes import make_router, status_of
from merged_lora.vllm_plugin.api_server.sources import Sources
from merged_lora.vllm_plugin.api_server.suggestions import names_instead
from merged_lora.vllm_plugin.api_server.workers import Workers
from merged_lora.vllm_plugin.identity import SCHEME, MergeIdentity
from merged_lora.vllm_plugin.rpc import Reply
from merged_lora.vllm_plugin.settings import Settings

from .current import current
from .versions import since
from .wrapping import ATTRIBUTE

logger = logging.getLogger("vllm.merged_lora")

LOGS_BODIES = since({"0.30": False, "0.31": True})
"""Whether vLLM's check of a model logs the request's body, if requests are logged."""

LOOK = 1.0
"""Seconds after which a call looks whether the engine is still there."""


@dataclass(frozen=True)
class Served:
    """A request that passed the gate.

    request: the request itself.
    adapter: the merge that serves it.
    model:   the model's name in replies.
    asked:   the request's ``model`` and ``merged_adapters``.
    """

    request: weakref.ref[Any]
    adapter: LoRARequest
    model: str
    asked: tuple[str | None, object]

    def is_for(self, request: Any) -> bool:
        """Whether a request is the one that was checked, or one that vLLM derived from it.

        vLLM may split a request, such as a batch of chats, and look up the adapter of each part.  A part
        names the same model; fields that vLLM does not know may be missing from it.
        """
        model, body = self.asked
        return self.request() is request or (request.model == model and _body(request) in (None, body))


_starting: ContextVar[bool] = ContextVar("merged_lora_starting", default=False)
"""Whether an adapter is loaded because the operator's command line names it."""
_served: ContextVar[Served | None] = ContextVar("merged_lora_served", default=None)


def lora_request(identity: MergeIdentity) -> LoRARequest:
    """The request with which vLLM activates a merge."""
    return LoRARequest(lora_name=identity.name, lora_int_id=identity.number, lora_path=identity.path)


# The gate


def wrap_init(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``OpenAIServingModels.__init__``: attach a gate, or None if merges are not enabled."""

    @functools.wraps(original)
    def init(self: Any, engine_client: Any, *args: Any, **kwargs: Any) -> None:
        original(self, engine_client, *args, **kwargs)
        setattr(self, ATTRIBUTE, None)
        if not Settings.of(engine_client.vllm_config.additional_config).enable:
            return

        settings, config = current.settings, engine_client.vllm_config
        workers = Workers(functools.partial(_on_every_worker, engine_client))
        sources = Sources(workers, metrics(), settings)
        replays = Replays(
            workers,
            functools.partial(rate, engine_client),
            config.model_config.max_model_len - 1,  # vLLM samples a token after the prompt
            metrics(),
        )
        servers = config.parallel_config._api_process_count
        setattr(self, ATTRIBUTE, MergeGate(settings, sources, workers, replays, metrics(), servers))

    return init


async def _on_every_worker(engine_client: Any, method: str, arguments: tuple[Any, ...]) -> list[Reply]:
    """The replies of all workers of all engines; vLLM's own call returns those of the first engine only.

    Raises vLLM's error if an engine dies meanwhile; vLLM's own call would never end.
    """
    core = engine_client.engine_core
    each: list[Awaitable[list[Reply]]]
    if len(getattr(core, "core_engines", ())) < 2:
        each = [engine_client.collective_rpc(method, args=arguments)]
    else:
        each = [
            core._call_utility_async("collective_rpc", method, None, arguments, None, engine=engine)
            for engine in core.core_engines
        ]
    calls = asyncio.gather(*each)
    try:
        while not (await asyncio.wait([calls], timeout=LOOK))[0]:
            if engine_client.errored:
                raise engine_client.dead_error
        return [reply for replies in calls.result() for reply in replies]
    finally:
        calls.cancel()


async def rate(engine_client: Any, identity: MergeIdentity, prompt: Tokens, answer: Tokens) -> Replayed:
    """How a merge takes an answer: one request like any other, whose prompt is the prompt with its answer.

    A token of the answer is kept if no other is more likely, so that a tie in 16 bits does not count as a
    loss.  Raises CalibrationError if vLLM refuses the token ids, and MergeError if it rates no prompts here.
    """
    config = engine_client.vllm_config.model_config
    if config.runner_type != "generate":
        raise MergeError("this server's model generates no text, so that no answer can be replayed")
    if not config.logprobs_mode.endswith("logprobs"):
        raise MergeError(
            f"--logprobs-mode {config.logprobs_mode} gives no likelihoods, so nothing is replayed"
        )
    params = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=1,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    text, name = tokens_input([*prompt, *answer]), f"merged-lora-check-{uuid.uuid4().hex}"
    rating = engine_client.generate(text, params, name, lora_request=lora_request(identity))
    try:
        outputs = [output async for output in rating]
    except (VLLMClientError, ValueError) as error:
        raise CalibrationError(f"vLLM refuses the prompts of a calibration: {error}") from None
    (output,) = outputs
    rated = output.prompt_logprobs[len(prompt) :]
    own = [tokens[token].logprob for token, tokens in zip(answer, rated, strict=True)]
    best = [max(entry.logprob for entry in tokens.values()) for tokens in rated]
    return Replayed(all(map(operator.ge, own, best)), sum(own), len(answer))


def _gate(models: Any) -> MergeGate | None:
    return getattr(models, ATTRIBUTE, None)


def _base_names(models: Any) -> list[str]:
    return [model.name for model in models.base_model_paths]


def wrap_init_static_loras(original: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Wrap ``OpenAIServingModels.init_static_loras``: then the aliases given at the start are checked."""

    @functools.wraps(original)
    async def init_static_loras(self: Any) -> None:
        gate, starting = _gate(self), _starting.set(True)
        try:
            await original(self)
        finally:
            _starting.reset(starting)
        if gate is not None:
            try:
                await gate.check_aliases(_base_names(self))
            except MergeError as error:
                raise ValueError(str(error)) from None
            gate.check_aliases_later()

    return init_static_loras


# Adapters


def wrap_load_lora_adapter(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Wrap ``OpenAIServingModels.load_lora_adapter``: copy the adapter first, so that loading cannot fail.

    vLLM reads an adapter in an RPC that may raise, which it does not survive at tensor parallel sizes over 1.
    """

    @functools.wraps(original)
    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        gate = _gate(self)
        if gate is None:
            return await original(self, request, base_model_name)
        try:
            check_own_name(request.lora_name)
        except MergeError as error:
            return _refusal(error, "lora_name")
        if request.lora_name in gate.aliases:
            return _refusal(MergeError(f"{request.lora_name!r} is the name of a merge"), "lora_name")
        try:
            async with gate.sources.folder_of(request.lora_path, trusted=_starting.get()) as folder:
                request.lora_path = folder  # vLLM's own reader knows no other place than a folder and the hub
                return await _load(gate, functools.partial(original, self), self, request, base_model_name)
        except MergeError as error:
            return _refusal(error, "lora_path")

    return load_lora_adapter


async def _load(
    gate: MergeGate,
    original: Callable[..., Awaitable[Any]],
    models: Any,
    request: Any,
    base_model_name: str | None,
) -> Any:
    """vLLM's own reply about an adapter that it loads, and that is copied before; raises MergeError."""
    async with gate.sources.changes:
        refused = await models._check_load_lora_adapter_request(request)
        if refused is not None:
            return refused
        options = {"is_3d_lora_weight": request.is_3d_lora_weight}
        copy = await gate.sources.copy(request.lora_path, options)
        result = await original(request, base_model_name)
        if isinstance(result, ErrorResponse):
            await gate.sources.trim()
        else:
            await gate.sources.serve(request.lora_name, copy)
    return result


def wrap_unload_lora_adapter(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Wrap ``OpenAIServingModels.unload_lora_adapter``: then the adapter is removed from the sources."""

    @functools.wraps(original)
    async def unload_lora_adapter(self: Any, request: Any) -> Any:
        gate = _gate(self)
        if gate is None:
            return await original(self, request)
        async with gate.sources.changes:
            result = await original(self, request)
            if not isinstance(result, ErrorResponse):
                await gate.sources.forget(request.lora_name)
        return result

    return unload_lora_adapter


# Requests


def wrap_check_model(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Wrap ``_check_model`` of both families of routes: a merge is made here, before it is served."""

    @functools.wraps(original)
    async def _check_model(self: Any, request: Any) -> Any:
        _served.set(None)
        gate = _gate(self.models)
        if gate is None:
            return await original(self, request)
        try:
            spec = _asked_for(gate, self.models, request)
            if spec is None:
                gate.sources.hold(request.model, request)
                return _with_names(await original(self, request), self.models, request.model)
            if LOGS_BODIES and getattr(self, "request_logger", None) is not None:
                self.request_logger.log_request_body(request)
            if isinstance(self, ServingTokenization):  # needs a valid name, but no merge
                await gate.sources.refresh(spec.names, request)
                identity = gate.identify(spec)
            else:
                live, new = await gate.serve(spec, request)
                identity = live.identity
                name_merge(identity.digest, new, live.facts.seconds)
        except MergeError as error:
            if isinstance(error, BusyError | FetchError):
                add_header("retry-after", str(error.seconds))
            param = "model" if _body(request) is None else FIELD
            refusal = _refusal(error, error.field if isinstance(error, FieldError) else param)
            if isinstance(self, PoolingBaseServing):  # its callers expect an exception
                raise HTTPException(refusal.error.code, refusal.error.message) from None
            return refusal
        sent = request.model or _base_names(self.models)[0]
        asked = request.model, _body(request)
        _served.set(Served(weakref.ref(request), lora_request(identity), sent, asked))
        return None

    return _check_model


def wrap_maybe_get_adapters(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``BaseServing._maybe_get_adapters``: a request that passed the gate is served by its merge."""

    @functools.wraps(original)
    def _maybe_get_adapters(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        served = _served.get()
        if served is not None and served.is_for(request):
            return served.adapter
        # vLLM checks a request before it looks up its adapter; if that ever changes, it must be noticed.
        if served is not None or (_gate(self.models) is not None and _body(request) is not None):
            raise RuntimeError("a request for a merge was not checked; it is not served with another model")
        try:
            return original(self, request, *args, **kwargs)
        except VLLMNotFoundError as error:  # how the pooling routes find that a model is unknown
            raise VLLMNotFoundError(_sentences(str(error), self.models, request.model)) from None

    return _maybe_get_adapters


def wrap_model_name(original: Callable[..., str]) -> Callable[..., str]:
    """Wrap ``OpenAIServingModels.model_name``: a reply names the model as the client did."""

    @functools.wraps(original)
    def model_name(self: Any, lora_request: Any = None) -> str:
        served = _served.get()
        if served is not None and lora_request is served.adapter:
            return served.model
        return original(self, lora_request)

    return model_name


def _asked_for(gate: MergeGate, models: Any, request: Any) -> MergeSpec | None:
    """The merge that a request asks for, None if it asks for none; raises MergeError.

    A merge needs the server's key on every route, even if vLLM asks for none there, and so does the reason
    why there is none.
    """
    try:
        check_fields(request.model_extra or {})
        spec = gate.asked_for(request.model, _body(request), models.is_base_model)
    except MergeError:
        check_key()
        raise
    if spec is not None:
        check_key()
    return spec


def _body(request: Any) -> object:
    return (request.model_extra or {}).get(FIELD)


def _refusal(error: MergeError, param: str) -> ErrorResponse:
    status, kind = status_of(error)
    return BaseServing.create_error_response(str(error), kind, status, param)


def _with_names(reply: Any, models: Any, model: str | None) -> Any:
    """vLLM's own reply about a model; if there is no such model, it also says which names there are."""
    if isinstance(reply, ErrorResponse) and reply.error.code == HTTPStatus.NOT_FOUND:
        reply.error.message = _sentences(reply.error.message, models, model)
    return reply


def _sentences(message: str, models: Any, model: str | None) -> str:
    gate = _gate(models)
    if gate is None or not has_key():
        return message
    return f"{message} {names_instead(model or '', {*gate.aliases, *models.lora_requests})}"


# Routes, models and metrics


def wrap_attach_router(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``attach_router`` of the routes about models: our routes are added to them."""

    @functools.wraps(original)
    def attach_router(app: FastAPI) -> None:
        original(app)
        settings = Settings.of(app.state.args.additional_config)
        if settings.enable:
            app.include_router(make_router(_gate_of, settings.runtime_aliases))
            if settings.playground:
                app.mount(PATH, pages())
            # As vLLM finds them; it asks for them on some of the routes only.
            keys = [key for key in (app.state.args.api_key or [vllm.envs.VLLM_API_KEY]) if key]
            app.add_middleware(Exchanges, keys=keys)

    return attach_router


def _gate_of(request: Request) -> tuple[MergeGate, Collection[str]]:
    models = request.app.state.openai_serving_models
    gate = _gate(models)
    if gate is None:
        raise HTTPException(HTTPStatus.NOT_FOUND, "this server has no engine that merges")
    return gate, _base_names(models)


def wrap_show_available_models(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Wrap ``OpenAIServingModels.show_available_models``: aliases are models too."""

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


def wrap_request_update(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``LoRARequestStates._request_update``: all merges share a label, as labels are never freed."""

    @functools.wraps(original)
    def _request_update(self: Any, req_id: str, lora_name: str | None, waiting: bool, running: bool) -> None:
        if lora_name is not None and lora_name.startswith(SCHEME):
            lora_name = SCHEME.rstrip(":")
        original(self, req_id, lora_name, waiting, running)

    return _request_update
