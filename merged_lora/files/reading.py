"""Reads the folders in which PEFT stores a LoRA adapter.

Layout and meaning follow PEFT 0.21: ``adapter_config.json`` and ``adapter_model.safetensors`` (or shards with
an index).  Nothing is ever unpickled.  Everything in an adapter besides plain factors is refused by name.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from merged_lora.errors import AdapterError, listed
from merged_lora.factors import DTYPES, Factors
from merged_lora.tensor_files import read_tensors

from .layout import CONFIG_NAME, INDEX_NAME, MAX_ALPHA, PREFIX, WEIGHTS_NAME, Header

MAX_JSON = 16 << 20
MAX_RANK = 65536
MAX_PATTERN = 256

DROPPABLE = ("modules_to_save", "lora_bias", "target_parameters")
"""Parts that can be left out without changing the meaning of the factors."""

_FACTOR = re.compile(r"(?P<module>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")
_BASE_COPY = re.compile(r".*\.(?:embed_tokens|lm_head)\.base_layer\.weight")
_EXPENSIVE = re.compile(r"\)[*+{]")  # a repeated group can take exponential time
_BASE_CHANGING_INIT = ("pissa", "olora", "loftq", "corda", "lora_ga")


def read_folder(folder: Path, drop: Iterable[str] = ()) -> tuple[dict[str, Factors], Header, dict[str, str]]:
    """The modules, header and safetensors metadata of a PEFT folder, read into memory and checked.

    folder: the folder.
    drop:   names from :data:`DROPPABLE`, parts that are left out instead of refused.

    Raises AdapterError, which names the file and the problem.
    """
    dropped = set(drop)
    unknown = dropped.difference(DROPPABLE)
    if unknown:
        raise AdapterError(
            f"cannot drop {listed(sorted(unknown))}; these can be dropped: {', '.join(DROPPABLE)}"
        )
    try:
        found = folder.is_dir()
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be read ({error.strerror})") from None
    if not found:
        raise AdapterError(f"{folder}: no such adapter folder")
    config = _read_config(folder / CONFIG_NAME)
    _refuse_unsupported(folder, config, dropped)
    tensors, metadata = _read_tensors(folder)
    modules = _modules(folder, config, tensors, dropped)
    header = Header(
        base_model=_text(config.get("base_model_name_or_path")),
        task_type=_text(config.get("task_type")),
        fan_in_fan_out=config.get("fan_in_fan_out") is True,
    )
    return modules, header, metadata


def _read_config(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MAX_JSON:
            raise AdapterError(
                f"{file}: larger than {MAX_JSON} bytes, so this is not an adapter configuration"
            )
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{file}: missing; a PEFT adapter folder holds it beside {WEIGHTS_NAME}") from None
    except OSError as error:
        raise AdapterError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise AdapterError(f"{file}: not valid JSON") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{file}: not a JSON object")
    return config


def _refuse_unsupported(folder: Path, config: Mapping[str, Any], dropped: set[str]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{folder}: peft_type is {reprlib.repr(kind)}, only LORA adapters can be merged")
    for key in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(config.get(key), bool | None):
            raise AdapterError(f"{folder}: {key} is neither true nor false")
    found = [
        key
        for key in (
            "use_dora",
            "lora_bias",
            "modules_to_save",
            "target_parameters",
            "trainable_token_indices",
            "layer_replication",
            "alora_invocation_tokens",
            "use_qalora",
            "use_bdlora",
            "megatron_config",
            "arrow_config",
            "kasa_config",
            "monteclora_config",
        )
        if config.get(key) and key not in dropped
    ]
    if config.get("bias") not in (None, "none"):
        found.append("bias")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INIT):
        found.append(f"init_lora_weights={reprlib.repr(init)} (it changed the base model)")
    if found:
        can = [key for key in found if key in DROPPABLE]
        hint = f"; can be left out with --drop {' '.join(can)}" if can else ""
        raise AdapterError(f"{folder}: this adapter uses what no merge supports: {listed(found)}{hint}")


def _read_tensors(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if (folder / WEIGHTS_NAME).is_file():
        return _read_safetensors(folder / WEIGHTS_NAME)
    if (folder / INDEX_NAME).is_file():
        return _read_shards(folder)
    for name in ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth"):
        if (folder / name).exists():
            raise AdapterError(
                f"{folder / name}: pickled weights are never loaded; "
                "load it in PEFT and save it as safetensors"
            )
    raise AdapterError(f"{folder / WEIGHTS_NAME}: missing")


def _read_shards(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    index = _read_config(folder / INDEX_NAME)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise AdapterError(f"{folder / INDEX_NAME}: weight_map must name a file for every tensor")
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors", shard):
            raise AdapterError(f"{folder / INDEX_NAME}: {shard[:64]!r} is not the name of a file beside it")
        part, _ = _read_safetensors(folder / shard)
        tensors |= part
    missing = sorted(set(weight_map) ^ set(tensors))
    if missing:
        raise AdapterError(f"{folder / INDEX_NAME}: does not agree with its shards about {listed(missing)}")
    return tensors, {}


def _read_safetensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        tensors, metadata = read_tensors(file)
    except FileNotFoundError:
        raise AdapterError(f"{file}: missing") from None
    except OSError as error:
        raise AdapterError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise AdapterError(f"{file}: {error}") from None
    return tensors, {key: value for key, value in metadata.items() if key != "format"}


def _modules(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], dropped: set[str]
) -> dict[str, Factors]:
    found: dict[tuple[str, bool], dict[str, torch.Tensor]] = {}
    others: list[str] = []
    for key, tensor in tensors.items():
        if _BASE_COPY.fullmatch(key):
            continue  # PEFT's copy of the base embedding, which vLLM ignores too
        match = _FACTOR.fullmatch(key)
        if match is None:
            others.append(key)
            continue
        module = match["module"].removeprefix(PREFIX)
        if "target_parameters" in dropped and _holds_parameter(module, config):
            continue
        side = match["linear"] or match["embedding"]
        sides = found.setdefault((module, match["embedding"] is not None), {})
        if side in sides:
            raise AdapterError(f"{folder}: {module} has lora_{side} twice, with and without {PREFIX!r}")
        sides[side] = tensor
    extra = [key for key in others if not _is_dropped(key, config, dropped)]
    if extra:
        raise AdapterError(f"{folder}: these tensors are not LoRA factors: {listed(sorted(extra))}")
    if not found:
        raise AdapterError(f"{folder}: holds no LoRA factors")
    modules: dict[str, Factors] = {}
    for (module, embedding), sides in sorted(found.items()):
        if module in modules:
            raise AdapterError(f"{folder}: {module} has both linear and embedding factors")
        if len(sides) < 2:
            raise AdapterError(f"{folder}: {module} has no lora_{'B' if 'A' in sides else 'A'}")
        modules[module] = _checked(folder, config, module, embedding, sides["A"], sides["B"])
    return modules


def _is_dropped(key: str, config: Mapping[str, Any], dropped: set[str]) -> bool:
    if key.endswith((".lora_A.bias", ".lora_B.bias")):
        return "lora_bias" in dropped
    if "lora_" in key:
        return False
    saved = _names(config, "modules_to_save")
    return "modules_to_save" in dropped and any(f".{name}." in f".{key}" for name in saved)


def _holds_parameter(module: str, config: Mapping[str, Any]) -> bool:
    """Whether these factors belong to one of ``target_parameters``: PEFT names them after its module.

    If a module has several such parameters, all but the last are named ``MODULE.base_layer``, and so on.  A
    parameter that is listed without a module may belong to any.
    """
    holder = re.sub(r"(\.base_layer)+$", "", module)
    holders = [name.rpartition(".")[0] for name in _names(config, "target_parameters")]
    return any(not name or f".{holder}".endswith(f".{name}") for name in holders)


def _names(config: Mapping[str, Any], key: str) -> list[str]:
    names = config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"{key} in {CONFIG_NAME} is not a list of names")
    return names


def _checked(
    folder: Path, config: Mapping[str, Any], module: str, embedding: bool, a: torch.Tensor, b: torch.Tensor
) -> Factors:
    for side, tensor in (("A", a), ("B", b)):
        if tensor.dtype not in DTYPES:
            raise AdapterError(
                f"{folder}: {module} lora_{side} is {tensor.dtype}, only fp32, fp16 and bf16 are merged"
            )
        if tensor.ndim != 2 or 0 in tensor.shape:
            raise AdapterError(
                f"{folder}: {module} lora_{side} has shape {tuple(tensor.shape)}, not a matrix"
            )
    rank = _pattern(folder, config, "rank_pattern", module)
    rank = config.get("r") if rank is None else rank
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise AdapterError(
            f"{folder}: rank {reprlib.repr(rank)} of {module} is not a whole number from 1 to {MAX_RANK}"
        )
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise AdapterError(
            f"{folder}: {module} has factors of shape {tuple(a.shape)} and {tuple(b.shape)}, "
            f"but {CONFIG_NAME} says rank {rank}"
        )
    alpha = _pattern(folder, config, "alpha_pattern", module)
    alpha = config.get("lora_alpha") if alpha is None else alpha
    if (
        isinstance(alpha, bool)
        or not isinstance(alpha, int | float)
        or not abs(alpha) <= MAX_ALPHA  # written this way round so that NaN is rejected too
    ):
        raise AdapterError(
            f"{folder}: lora_alpha {reprlib.repr(alpha)} of {module} is not a number of size up to "
            f"{MAX_ALPHA:g}"
        )
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") is True else alpha / rank
    return Factors(a, b, scaling, embedding)


def _pattern(folder: Path, config: Mapping[str, Any], field: str, module: str) -> Any:
    """The value of the first pattern that matches a module by PEFT's rule: a suffix that starts at a dot."""
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{folder}: {field} is not an object")
    for key, value in patterns.items():
        if len(key) > MAX_PATTERN or _EXPENSIVE.search(key) or len(re.findall(r"[*+{]", key)) > 4:
            raise AdapterError(f"{folder}: {field} holds {key[:64]!r}, which could take forever to match")
        try:
            if re.match(rf"(?:.*\.)?(?:{key})$", module):
                return value
        except (re.error, RecursionError, OverflowError):  # what re raises for a malformed pattern
            raise AdapterError(
                f"{folder}: {field} holds {key[:64]!r}, which is not a regular expression"
            ) from None
    return None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
