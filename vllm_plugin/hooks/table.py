"""What is wrapped of vLLM; for which releases of it, ``releases.py`` says.

The wrappers stand in ``command_line.py`` (command line), ``api_server.py`` (API server) and
``worker.py`` (workers); no other file touches vLLM but the offline helper.  Each calls the original
unchanged unless the plugin is enabled, so that an installed but unused plugin changes nothing.  A function
whose parameters are not the known ones is a reason to refuse, not to guess.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import vllm
import vllm.entrypoints.cli.serve
import vllm.entrypoints.openai.models.api_router
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
from vllm.v1.metrics.stats import LoRARequestStates
from vllm.v1.worker.worker_base import WorkerBase

from merged_lora.vllm_plugin.rpc import CAPTURE, PREPARE, RELEASE

from . import api_server, command_line, worker
from .versions import since
from .wrapping import plain, wrap_method


@dataclass(frozen=True)
class Hook:
    """A function of vLLM: where it stands, its name and parameters as they were read, and what wraps it.

    parameters: the same on every release, or by the release with which each list of them began, such as
    ``{"0.30": "self request", "0.34": "self request priority"}``.
    """

    owner: Any
    name: str
    parameters: str | dict[str, str]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]


HOOKS = (
    Hook(EngineArgs, "add_cli_args", "parser", command_line.with_flags),
    Hook(EngineArgs, "from_cli_args", "cls args", command_line.with_settings),
    Hook(EngineArgs, "create_engine_config", "self usage_context headless", command_line.with_lora_enabled),
    Hook(
        vllm.entrypoints.cli.serve,
        "wait_for_completion_or_failure",
        "api_server_manager engine_manager coordinator",
        api_server.outliving_servers,
    ),
    Hook(vllm.entrypoints.openai.models.api_router, "attach_router", "app", api_server.with_routes),
    Hook(
        OpenAIServingModels,
        "__init__",
        "self engine_client base_model_paths lora_modules",
        api_server.with_gate,
    ),
    Hook(OpenAIServingModels, "init_static_loras", "self", api_server.then_check_aliases),
    Hook(OpenAIServingModels, "load_lora_adapter", "self request base_model_name", api_server.after_copying),
    Hook(OpenAIServingModels, "unload_lora_adapter", "self request", api_server.then_forget),
    Hook(OpenAIServingModels, "show_available_models", "self", api_server.with_aliases),
    Hook(OpenAIServingModels, "model_name", "self lora_request", api_server.with_sent_name),
    Hook(BaseServing, "_check_model", "self request", api_server.through_gate),
    Hook(PoolingBaseServing, "_check_model", "self request", api_server.through_gate),
    Hook(
        BaseServing,
        "_maybe_get_adapters",
        "self request supports_default_mm_loras",
        api_server.with_merge,
    ),
    Hook(
        LoRARequestStates,
        "_request_update",
        "self req_id lora_name waiting running",
        api_server.with_one_label,
    ),
    Hook(
        WorkerLoRAManager,
        "__init__",
        "self vllm_config device embedding_modules lora_model_cls",
        worker.with_worker,
    ),
    Hook(WorkerLoRAManager, "_load_adapter", "self lora_request", worker.or_merge),
    Hook(
        LRUCacheWorkerLoRAManager,
        "create_lora_manager",
        "self model vllm_config",
        worker.then_ready,
    ),
    Hook(LoRAModelManager, "activate_adapter", "self lora_id", worker.filling_slots),
)


def problems() -> list[str]:
    """Why the hooks do not fit the vLLM that is installed; empty where they do."""
    found = []
    for hook in HOOKS:
        original = vars(hook.owner).get(hook.name)
        if original is None:
            found.append(f"{hook.owner.__name__}.{hook.name} is missing")
            continue
        actual = " ".join(inspect.signature(inspect.unwrap(plain(original))).parameters)
        expected = hook.parameters if isinstance(hook.parameters, str) else since(hook.parameters)
        if actual != expected:
            found.append(f"{hook.owner.__name__}.{hook.name} takes ({actual}) instead of ({expected})")
    return found


def install() -> None:
    """Wrap the hooks, once per process."""
    if hasattr(WorkerBase, CAPTURE):
        return
    for hook in HOOKS:
        wrap_method(hook.owner, hook.name, hook.wrap)
    setattr(WorkerBase, CAPTURE, worker.rpc_capture)
    setattr(WorkerBase, RELEASE, worker.rpc_release)
    setattr(WorkerBase, PREPARE, worker.rpc_prepare)
