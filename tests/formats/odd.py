"""Files that PEFT did not write as they lie there, made from one adapter that it wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _copied(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def _with_mark(source: Path, place: Path) -> Path:
    folder = _copied(source, place / "adapter")
    text = (folder / CONFIG).read_text(encoding="utf-8")
    (folder / CONFIG).write_text(text, encoding="utf-8-sig")
    return folder


def _deeper(source: Path, place: Path) -> Path:
    _copied(source, place / "outer" / "adapter")
    return place / "outer"


def _file(source: Path, place: Path) -> Path:
    return _copied(source, place / "adapter") / WEIGHTS


def _shards(source: Path, place: Path) -> Path:
    folder = _copied(source, place / "adapter")
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    where: dict[str, str] = {}
    for i, half in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        shard = f"adapter_model-0000{i}-of-00002.safetensors"
        save_file({key: tensors[key] for key in half}, folder / shard, {"format": "pt"})
        where |= dict.fromkeys(half, shard)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _pickled(source: Path, place: Path) -> Path:
    folder = _copied(source, place / "adapter")
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


def _pointer(source: Path, place: Path) -> Path:
    folder = _copied(source, place / "adapter")
    size = (folder / WEIGHTS).stat().st_size
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {size}\n"
    (folder / WEIGHTS).write_text(text, encoding="utf-8")
    return folder


def _mlx(source: Path, place: Path) -> Path:
    folder = place / "adapter"
    folder.mkdir()
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    rank, alpha = config["r"], config["lora_alpha"]
    renamed = {}
    for key, tensor in load_file(source / WEIGHTS).items():
        name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".lora_a")
        renamed[name.replace(".lora_B.weight", ".lora_b")] = tensor.T.contiguous()
    save_file(renamed, folder / "adapters.safetensors")
    parameters = {"rank": rank, "scale": alpha / rank, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return folder


def _extracted(source: Path, place: Path) -> Path:
    folder = _copied(source, place / "adapter")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    factor = config["lora_alpha"] / config["r"]
    tensors = {k: t * factor if ".lora_A." in k else t for k, t in load_file(folder / WEIGHTS).items()}
    norms = ["model.norm"]
    norms += [
        f"model.layers.{i}.{name}"
        for i in range(2)
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    tensors |= {f"base_model.model.{name}.weight": torch.ones(16) for name in norms}
    save_file(tensors, folder / WEIGHTS)
    saved = sorted({name.rpartition(".")[2] for name in norms})
    config |= {"lora_alpha": config["r"], "modules_to_save": saved, "lora_dropout": 0}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return folder


def _renamed(old: str, new: str) -> Callable[[Path, Path], Path]:
    def make(source: Path, place: Path) -> Path:
        folder = _copied(source, place / "adapter")
        tensors = {key.replace(old, new): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        return folder

    return make


ODD: dict[str, Callable[[Path, Path], Path]] = {
    "byte order mark": _with_mark,
    "deeper": _deeper,
    "file": _file,
    "shards": _shards,
    "pickled": _pickled,
    "pointer": _pointer,
    "mlx": _mlx,
    "extracted": _extracted,
    "wrapped": _renamed("base_model.model.", "base_model.model._orig_mod."),
    "named": _renamed(".weight", ".default.weight"),
}
"""For every kind of such files, what makes one of an adapter in a place and returns what a user names."""

OF = "no task"
"""The row whose adapter they are made from."""
