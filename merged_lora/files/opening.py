"""Finds the files of an adapter and reads them into memory: a configuration and tensors, as they are."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merged_lora.errors import AdapterError, listed
from merged_lora.tensor_files import read_tensors

from .layout import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME

MAX_JSON = 16 << 20
MLX_WEIGHTS_NAME = "adapters.safetensors"
INDEX_NAMES = (INDEX_NAME, "model.safetensors.index.json")
"""Names of the index of a file in parts, as PEFT and transformers give it."""
WEIGHTS = (WEIGHTS_NAME, MLX_WEIGHTS_NAME, *INDEX_NAMES)
"""Names of safetensors files or their index; the first one that is there has the weights."""
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
"""Names that are looked for after :data:`WEIGHTS`."""

_POINTER = b"version https://git-lfs.github.com/spec/"
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")


@dataclass(frozen=True, eq=False)
class Opened:
    """The files of an adapter.

    folder:   the folder that holds them.
    config:   what ``adapter_config.json`` says.
    tensors:  by the names in the file.
    metadata: pairs of text in the safetensors file.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def open_adapter(path: Path, allow_pickle: bool = False) -> Opened:
    """The configuration and the tensors of an adapter; raises AdapterError.

    path:         its folder, a folder that holds this folder alone, or one of its files.
    allow_pickle: read ``adapter_model.bin`` if there is nothing else, by ``torch.load`` with
                  ``weights_only=True``, which runs no code of the file.
    """
    folder, weights = find(path)
    config = read_json(folder / CONFIG_NAME)
    tensors, metadata = _read_weights(folder, weights, allow_pickle)
    return Opened(folder, config, tensors, metadata)


def find(path: Path) -> tuple[Path, Path | None]:
    """The folder of an adapter, and its file of weights if the path names that; raises AdapterError."""
    try:
        if path.is_file():
            return path.parent, None if path.name == CONFIG_NAME else path
        if not path.is_dir():
            raise AdapterError(f"{path}: no such adapter folder")
        if (path / CONFIG_NAME).exists():
            return path, None
        inner = sorted(child for child in path.iterdir() if (child / CONFIG_NAME).is_file())
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror})") from None
    if len(inner) > 1:
        raise AdapterError(f"{path}: holds the adapters {listed(child.name for child in inner)}; choose one")
    return (inner[0] if inner else path), None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises AdapterError."""
    try:
        if file.stat().st_size > MAX_JSON:
            raise AdapterError(
                f"{file}: larger than {MAX_JSON} bytes, so this is not an adapter configuration"
            )
        text = file.read_bytes()
        _refuse_pointer(file, text)
        content = json.loads(text.decode("utf-8-sig"))
    except FileNotFoundError:
        raise AdapterError(f"{file}: missing; a PEFT adapter folder holds it beside {WEIGHTS_NAME}") from None
    except OSError as error:
        raise AdapterError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise AdapterError(f"{file}: not valid JSON") from None
    if not isinstance(content, dict):
        raise AdapterError(f"{file}: not a JSON object")
    return content


def read_index(file: Path) -> dict[str, str]:
    """The shard of each tensor, as an index names it; raises AdapterError unless all are files beside it."""
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise AdapterError(f"{file}: weight_map must name a file for every tensor")
    for shard in weight_map.values():
        if not _SHARD.fullmatch(shard):
            raise AdapterError(f"{file}: {shard[:64]!r} is not the name of a file beside it")
    return weight_map


def _refuse_pointer(file: Path, begin: bytes) -> None:
    if begin.startswith(_POINTER):
        raise AdapterError(
            f"{file}: a pointer of git-lfs, the file itself was not downloaded; run: git lfs pull"
        )


def _read_weights(
    folder: Path, weights: Path | None, allow_pickle: bool
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    there = (folder / name for name in (*WEIGHTS, *PICKLES) if (folder / name).is_file())
    return _read_named(weights or next(there, folder / WEIGHTS_NAME), allow_pickle)


def _read_named(file: Path, allow_pickle: bool) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    readers: dict[str, Callable[[], tuple[dict[str, torch.Tensor], dict[str, str]]]] = {
        ".safetensors": lambda: _read_safetensors(file),
        ".json": lambda: _read_shards(file.parent, file.name),
        ".bin": lambda: _read_pickle(file, allow_pickle),
        ".pt": lambda: _read_pickle(file, allow_pickle),
        ".pth": lambda: _read_pickle(file, allow_pickle),
    }
    if file.suffix not in readers:
        raise AdapterError(f"{file}: not a file of weights; name the folder or {WEIGHTS_NAME} in it")
    return readers[file.suffix]()


def _read_shards(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    weight_map = read_index(folder / name)
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        tensors |= _read_safetensors(folder / shard)[0]
    missing = sorted(set(weight_map) ^ set(tensors))
    if missing:
        raise AdapterError(f"{folder / name}: does not agree with its shards about {listed(missing)}")
    return tensors, {}


def _read_safetensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with file.open("rb") as f:
            _refuse_pointer(file, f.read(len(_POINTER)))
        tensors, metadata = read_tensors(file)
    except FileNotFoundError:
        raise AdapterError(f"{file}: missing") from None
    except OSError as error:
        raise AdapterError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise AdapterError(f"{file}: {error}") from None
    return tensors, {key: value for key, value in metadata.items() if key != "format"}


def _read_pickle(file: Path, allow: bool) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if not allow:
        raise AdapterError(
            f"{file}: pickled weights are read only with --allow-pickle of the command merged-lora, or "
            "allow_pickle=True; otherwise load it in PEFT and save it as safetensors"
        )
    try:
        with file.open("rb") as f:
            _refuse_pointer(file, f.read(len(_POINTER)))
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise AdapterError(f"{file}: cannot be read ({error.strerror})") from None
    except AdapterError:
        raise
    except Exception:  # files that are damaged or hold more than tensors raise errors of many types
        raise AdapterError(
            f"{file}: is damaged, or holds more than tensors; if you trust it, load it in PEFT and save it "
            "as safetensors"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise AdapterError(f"{file}: holds {reprlib.repr(type(tensors).__name__)}, not tensors by name")
    unfit = sorted(n for n, t in tensors.items() if t.layout != torch.strided or t.device.type != "cpu")
    if unfit:
        raise AdapterError(f"{file}: {listed(unfit)} is not stored as a plain tensor")
    plain = {n: t.detach().resolve_conj().resolve_neg().contiguous() for n, t in tensors.items()}
    return plain, {}
