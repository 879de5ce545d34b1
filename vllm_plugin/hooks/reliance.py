"""The parts of vLLM's source that the plugin relies on, compared with the tested releases.

The parameters of the hooks (``table.HOOKS``) decide whether the plugin fits at all. The code around them can
change too: functions that are wrapped, functions that are called, and functions that call a wrapped one. Each
has a digest of its source, without comments, docstrings, annotations and layout. For a caller, only the calls
count, because its other lines change with every release. This module reads files and imports nothing of vLLM.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("reliance.json")
"""The digests of the tested releases by name, each with the first release that had it."""

ABSENT = "absent"

RELIED_UPON: Mapping[str, tuple[str, ...]] = {
    "engine/arg_utils.py": ("EngineArgs.from_cli_args",),
    "entrypoints/cli/serve.py": ("run_multi_api_server",),
    "entrypoints/launchers/api_server/entry.py": ("build_async_engine_client",),
    "entrypoints/launchers/app.py": ("build_app",),
    "entrypoints/llm.py": ("LLM.collective_rpc",),
    "entrypoints/openai/models/api_router.py": ("attach_router",),
    "entrypoints/openai/models/serving.py": (
        "OpenAIModelRegistry.is_base_model",
        "OpenAIServingModels.__init__",
        "OpenAIServingModels._check_load_lora_adapter_request",
        "OpenAIServingModels.init_static_loras",
        "OpenAIServingModels.load_lora_adapter",
        "OpenAIServingModels.model_name",
        "OpenAIServingModels.resolve_lora",
        "OpenAIServingModels.show_available_models",
        "OpenAIServingModels.unload_lora_adapter",
    ),
    "entrypoints/pooling/base/serving.py": ("PoolingBaseServing._check_model",),
    "entrypoints/serve/engine/protocol.py": (
        "ErrorResponse",
        "ModelCard",
        "ModelPermission",
        "OpenAIBaseModel",
    ),
    "entrypoints/serve/engine/serving.py": (
        "BaseServing._check_model",
        "BaseServing._is_model_supported",
        "BaseServing._maybe_get_adapters",
        "BaseServing.create_error_response",
    ),
    "entrypoints/serve/middleware/authenticate.py": ("AuthenticationMiddleware",),
    "entrypoints/serve/middleware/register.py": ("init_entrypoints_middleware",),
    "exceptions.py": ("LoRAAdapterNotFoundError", "VLLMClientError", "VLLMNotFoundError"),
    "inputs/engine.py": ("tokens_input",),
    "lora/layers/base_linear.py": ("BaseLinearLayerWithLoRA",),
    "lora/layers/classifier.py": (
        "BaseClassificationHeadWithLoRA",
        "ClassificationHeadWithLoRA",
        "TokenClassificationHeadWithLoRA",
    ),
    "lora/layers/column_parallel_linear.py": (
        "ColumnParallelLinearWithLoRA",
        "ColumnParallelLinearWithShardedLoRA",
        "MergedColumnParallelLinearWithLoRA",
        "MergedColumnParallelLinearWithShardedLoRA",
        "MergedQKVParallelLinearWithLoRA",
        "MergedQKVParallelLinearWithShardedLoRA",
        "QKVParallelLinearWithLoRA",
        "QKVParallelLinearWithShardedLoRA",
    ),
    "lora/layers/fused_moe.py": (
        "FusedMoE3DWithLoRA._slice_w13_b",
        "FusedMoE3DWithLoRA.create_lora_weights",
        "FusedMoE3DWithLoRA.set_lora",
        "FusedMoEWithLoRA.create_lora_weights",
        "FusedMoEWithLoRA.global_num_experts",
        "FusedMoEWithLoRA.reset_lora",
        "FusedMoEWithLoRA.set_lora",
    ),
    "lora/layers/logits_processor.py": (
        "LogitsProcessorWithLoRA.create_lora_weights",
        "LogitsProcessorWithLoRA.reset_lora",
        "LogitsProcessorWithLoRA.set_lora",
    ),
    "lora/layers/replicated_linear.py": ("ReplicatedLinearWithLoRA",),
    "lora/layers/row_parallel_linear.py": ("RowParallelLinearWithLoRA", "RowParallelLinearWithShardedLoRA"),
    "lora/layers/vocab_parallel_embedding.py": (
        "VocabParallelEmbeddingWithLoRA.create_lora_weights",
        "VocabParallelEmbeddingWithLoRA.reset_lora",
        "VocabParallelEmbeddingWithLoRA.set_lora",
    ),
    "lora/lora_model.py": ("LoRAModel",),
    "lora/lora_weights.py": ("LoRALayerWeights", "PackedLoRALayerWeights"),
    "lora/model_manager.py": (
        "LRUCacheLoRAModelManager",
        "LoRAModelManager.__init__",
        "LoRAModelManager._add_adapter",
        "LoRAModelManager._convert_3d_to_2d_moe_lora",
        "LoRAModelManager._create_merged_loras_inplace",
        "LoRAModelManager._deactivate_adapter",
        "LoRAModelManager._get_lora_layer_weights",
        "LoRAModelManager._get_text_lora_names",
        "LoRAModelManager._match_target_modules",
        "LoRAModelManager._pad_lora_pairs_to_triplets",
        "LoRAModelManager._register_packed_modules",
        "LoRAModelManager._slice_moe_lora_ep",
        "LoRAModelManager._stack_moe_lora_weights",
        "LoRAModelManager._validate_classification_head_lora",
        "LoRAModelManager._validate_moe_lora_format",
        "LoRAModelManager.activate_adapter",
        "LoRAModelManager.add_adapter",
        "LoRAModelManager.deactivate_adapter",
        "LoRAModelManager.remove_adapter",
    ),
    "lora/peft_helper.py": ("PEFTHelper",),
    "lora/punica_wrapper/punica_base.py": (
        "PunicaWrapperBase.sampler_indices",
        "PunicaWrapperBase.token_lora_indices",
    ),
    "lora/punica_wrapper/punica_cpu.py": ("PunicaWrapperCPU.add_lora_logits",),
    "lora/punica_wrapper/utils.py": ("convert_mapping",),
    "lora/request.py": ("LoRARequest",),
    "lora/utils.py": (
        "get_adapter_absolute_path",
        "get_supported_lora_modules",
        "is_in_target_modules",
        "parse_fine_tuned_lora_name",
        "process_packed_modules_mapping",
    ),
    "lora/worker_manager.py": ("LRUCacheWorkerLoRAManager", "WorkerLoRAManager"),
    "model_executor/layers/fused_moe/config.py": ("FusedMoEConfig.__post_init__",),
    "model_executor/layers/linear.py": ("MergedColumnParallelLinear.__init__", "QKVParallelLinear.__init__"),
    "model_executor/models/utils.py": (
        "PPMissingLayer",
        "WeightsMapper._map_name",
        "WeightsMapper.get_rename_mapper",
    ),
    "model_executor/utils.py": ("get_moe_expert_mapping", "get_packed_modules_mapping"),
    "platforms/interface.py": ("Platform.is_cpu",),
    "plugins/__init__.py": ("load_general_plugins",),
    "sampling_params.py": ("RequestOutputKind",),
    "utils/gpu_sync_debug.py": ("gpu_sync_allowed",),
    "v1/core/kv_cache_utils.py": ("_gen_lora_extra_hash_keys",),
    "v1/engine/async_llm.py": (
        "AsyncLLM.collective_rpc",
        "AsyncLLM.dead_error",
        "AsyncLLM.errored",
        "AsyncLLM.generate",
    ),
    "v1/engine/core.py": ("EngineCore.collective_rpc",),
    "v1/engine/core_client.py": ("AsyncMPClient._call_utility_async", "AsyncMPClient.collective_rpc_async"),
    "v1/engine/logprobs.py": ("LogprobsProcessor._update_prompt_logprobs",),
    "v1/executor/multiproc_executor.py": ("MultiprocExecutor.collective_rpc",),
    "v1/executor/uniproc_executor.py": ("UniProcExecutor.collective_rpc",),
    "v1/metrics/stats.py": ("LoRARequestStates",),
    "v1/serial_utils.py": ("run_method",),
    "v1/utils.py": ("APIServerProcessManager", "wait_for_completion_or_failure"),
    "v1/worker/gpu/lora_utils.py": ("LoraState",),
    "v1/worker/gpu/sample/prompt_logprob.py": ("PromptLogprobsWorker.compute_prompt_logprobs",),
    "v1/worker/gpu_model_runner.py": ("GPUModelRunner._get_prompt_logprobs_dict",),
    "v1/worker/lora_model_runner_mixin.py": (
        "LoRAModelRunnerMixin._set_active_loras",
        "LoRAModelRunnerMixin.add_lora",
        "LoRAModelRunnerMixin.load_lora_model",
    ),
}
"""Functions and classes by file in vLLM's package.

Without those that change with every release and of which only the parameters matter, such as
``EngineArgs.create_engine_config``: ``table.HOOKS`` has these.
"""

CALLED = frozenset(
    {
        *("_check_model", "_load_adapter", "_maybe_get_adapters", "_request_update", "activate_adapter"),
        "add_lora_logits",
        *("init_static_loras", "load_lora_adapter", "show_available_models", "unload_lora_adapter"),
        *("wait_for_completion_or_failure",),
    }
)
"""Wrapped functions whose calls, with their arguments and their order, are relied on too."""

CALLERS_IN = ("engine", "entrypoints", "lora", "v1")
"""Folders of vLLM's package that are searched for such calls."""

_IGNORED = frozenset({"ctx", "kind", "returns", "type_comment", "type_params"})


def read(package: Path) -> dict[str, str]:
    """Digests of everything that is relied on, by ``FILE:NAME`` or ``FILE:NAME calls``.

    package: the folder of the package ``vllm``.
    """
    callers = (file for folder in CALLERS_IN for file in (package / folder).rglob("*.py"))
    found: dict[str, str] = {}
    for file in sorted({*callers, *(package / name for name in RELIED_UPON)}):
        name = file.relative_to(package).as_posix()
        wanted = RELIED_UPON.get(name, ())
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if not wanted and not any(f"{called}(" in text for called in CALLED):
            continue
        definitions = dict(_definitions(ast.parse(text).body, ""))
        found |= {f"{name}:{n} calls": digest(calls) for n, d in definitions.items() if (calls := _calls(d))}
        found |= {f"{name}:{n}": digest(definitions[n]) if n in definitions else ABSENT for n in wanted}
    return found


def changed(found: Mapping[str, str], recorded: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The names whose digest was not recorded, including new callers."""
    return sorted(name for name, value in found.items() if value not in recorded.get(name, ()))


def recorded() -> dict[str, dict[str, str]]:
    """The digests of the tested releases, each with the first release that had it, by ``FILE:NAME``."""
    record: dict[str, dict[str, str]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return record


def record(packages: Mapping[str, Path]) -> None:
    """Write the digests of releases.

    packages: the folder of the package ``vllm`` by release, from the oldest to the newest.
    """
    table: dict[str, dict[str, str]] = {}
    for release, package in packages.items():
        for name, value in read(package).items():
            table.setdefault(name, {}).setdefault(value, release)
    RECORD.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def digest(code: ast.AST | list[ast.Call]) -> str:
    """48 bits of the BLAKE2 hash of code, the same on every Python that can parse it."""
    return blake2b(repr(_plain(code)).encode(), digest_size=6).hexdigest()


def _definitions(body: Iterable[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.AST]]:
    """Classes, methods and functions by qualified name; functions inside a function are part of it."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield prefix + node.name, node
            yield from _definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node


def _calls(node: ast.AST) -> list[ast.Call]:
    """The calls of wrapped functions in a function, in order; a class has none, its methods have them."""
    if isinstance(node, ast.ClassDef):
        return []
    found = [n for n in ast.walk(node) if isinstance(n, ast.Call) and _called(n.func) in CALLED]
    return sorted(found, key=lambda call: (call.lineno, call.col_offset))


def _called(function: ast.expr) -> str:
    """The last part of the name of what is called."""
    return getattr(function, "attr", getattr(function, "id", ""))


def _plain(value: Any) -> Any:
    """A syntax tree as nested lists, without the parts that do not change what the code does."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, ast.AST):
        return value
    entries = dict(ast.iter_fields(value))
    if isinstance(value, ast.arg):
        del entries["annotation"]
    if isinstance(value, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and _is_text(value.body[0]):
        entries["body"] = value.body[1:]
    kept = {name: v for name, v in entries.items() if name not in _IGNORED and v is not None and v != []}
    return [type(value).__name__, sorted((name, _plain(v)) for name, v in kept.items())]


def _is_text(node: ast.stmt) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)
