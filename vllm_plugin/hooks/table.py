"""The functions of vLLM that are wrapped; ``releases.py`` has the releases of vLLM that they were read in.

``wrap_NAME`` wraps the function ``NAME``; its docstring says why.  Each wrapper calls the original unchanged
unless the plugin is enabled, so that an installed but unused plugin changes nothing.  If a function has other
parameters than it had when it was read, the plugin refuses to start instead of guessing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import vllm
import vllm.entrypoints.cli.serve
import vllm.entrypoints.openai.models.api_router
import vllm.envs
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
from vllm.v1.metrics.stats import LoRARequestStates
from vllm.v1.worker.worker_base import WorkerBase

from merged_lora.vllm_plugin.rpc import CANCEL, CAPTURE, POLL, PREPARE, RELEASE, REPLAY

from . import api_server, command_line, supervision, worker
from .versions import since
from .wrapping import plain, wrap_method


@dataclass(frozen=True)
class Hook:
    """A function of vLLM that is wrapped.

    owner:      the class or module that it belongs to.
    name:       its name.
    parameters: its parameters: the same for every release, or by the first release that has them, such as
                ``{"0.30": "self request", "0.34": "self request priority"}``.
    wrap:       makes the wrapper from the original.
    """

    owner: Any
    name: str
    parameters: str | dict[str, str]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]


HOOKS = (
    Hook(EngineArgs, "add_cli_args", "parser", command_line.wrap_add_cli_args),
    Hook(EngineArgs, "from_cli_args", "cls args", command_line.wrap_from_cli_args),
    Hook(
        EngineArgs,
        "create_engine_config",
        "self usage_context headless",
        command_line.wrap_create_engine_config,
    ),
    Hook(
        vllm.entrypoints.cli.serve,
        "wait_for_completion_or_failure",
        "api_server_manager engine_manager coordinator",
        supervision.wrap_wait_for_completion_or_failure,
    ),
    Hook(vllm.entrypoints.openai.models.api_router, "attach_router", "app", api_server.wrap_attach_router),
    Hook(
        OpenAIServingModels,
        "__init__",
        "self engine_client base_model_paths lora_modules",
        api_server.wrap_init,
    ),
    Hook(OpenAIServingModels, "init_static_loras", "self", api_server.wrap_init_static_loras),
    Hook(
        OpenAIServingModels,
        "load_lora_adapter",
        "self request base_model_name",
        api_server.wrap_load_lora_adapter,
    ),
    Hook(OpenAIServingModels, "unload_lora_adapter", "self request", api_server.wrap_unload_lora_adapter),
    Hook(OpenAIServingModels, "show_available_models", "self", api_server.wrap_show_available_models),
    Hook(OpenAIServingModels, "model_name", "self lora_request", api_server.wrap_model_name),
    Hook(BaseServing, "_check_model", "self request", api_server.wrap_check_model),
    Hook(PoolingBaseServing, "_check_model", "self request", api_server.wrap_check_model),
    Hook(
        BaseServing,
        "_maybe_get_adapters",
        "self request supports_default_mm_loras",
        api_server.wrap_maybe_get_adapters,
    ),
    Hook(
        LoRARequestStates,
        "_request_update",
        "self req_id lora_name waiting running",
        api_server.wrap_request_update,
    ),
    Hook(
        WorkerLoRAManager,
        "__init__",
        "self vllm_config device embedding_modules lora_model_cls",
        worker.wrap_init,
    ),
    Hook(WorkerLoRAManager, "_load_adapter", "self lora_request", worker.wrap_load_adapter),
    Hook(
        LRUCacheWorkerLoRAManager,
        "create_lora_manager",
        "self model vllm_config",
        worker.wrap_create_lora_manager,
    ),
    Hook(LoRAModelManager, "activate_adapter", "self lora_id", worker.wrap_activate_adapter),
    Hook(
        PunicaWrapperCPU,
        "add_lora_logits",
        "self y x lora_a_stacked lora_b_stacked scale buffer kwargs",
        worker.wrap_add_lora_logits,
    ),
)


SWITCHES = ("VLLM_USE_RUST_FRONTEND", "VLLM_API_KEY")
"""Variables of ``vllm.envs`` that the hooks read when vLLM starts."""


def problems() -> list[str]:
    """Why the hooks do not fit the installed vLLM; empty if they do."""
    # In the list, not by getattr, which would read the variable and fail if a user set it wrongly.
    found = [f"vllm.envs.{name} is missing" for name in SWITCHES if name not in dir(vllm.envs)]
    for hook in HOOKS:
        original = vars(hook.owner).get(hook.name)
        if original is None:
            found.append(f"{hook.owner.__name__}.{hook.name} is missing")
            continue
        if not callable(plain(original)):
            found.append(f"{hook.owner.__name__}.{hook.name} is not a function")
            continue
        actual = " ".join(inspect.signature(inspect.unwrap(plain(original))).parameters)
        expected = hook.parameters if isinstance(hook.parameters, str) else since(hook.parameters)
        if actual != expected:
            found.append(f"{hook.owner.__name__}.{hook.name} takes ({actual}) instead of ({expected})")
    return found


def install() -> None:
    """Wrap the functions and add the worker's methods, once per process."""
    if hasattr(WorkerBase, CAPTURE):
        return
    for hook in HOOKS:
        wrap_method(hook.owner, hook.name, hook.wrap)
    setattr(WorkerBase, CAPTURE, worker.rpc_capture)
    setattr(WorkerBase, RELEASE, worker.rpc_release)
    setattr(WorkerBase, PREPARE, worker.rpc_prepare)
    setattr(WorkerBase, POLL, worker.rpc_poll)
    setattr(WorkerBase, CANCEL, worker.rpc_cancel)
    setattr(WorkerBase, REPLAY, worker.rpc_replay)
