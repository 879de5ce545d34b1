"""PEFT builds, saves and loads the adapters of the table, and says what their deltas are."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft as typed_peft
import torch
from peft.tuners.lora.layer import ParamWrapper

from formats.models import build, transformers
from formats.table import PLAIN, Row
from merged_lora.cli import main

peft: Any = typed_peft  # its annotations are narrower than what it takes

transformers.logging.set_verbosity_error()

FACTORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
"""Ends of the names of factors in a file."""
SPREAD = 0.3
"""Standard deviation of every trained entry."""


@dataclass(frozen=True)
class Built:
    """Two adapters of a row, which differ in their seeds.

    row:        the row.
    folders:    where PEFT saved them, as ``a`` and ``b``.
    deltas:     PEFT's own deltas ``[out, in]`` of each, in float64, by module.
    magnitudes: ``|s| |B| |A|`` of each, likewise.
    others:     what each has besides factors.
    """

    row: Row
    folders: dict[str, Path]
    deltas: dict[str, dict[str, torch.Tensor]]
    magnitudes: dict[str, dict[str, torch.Tensor]]
    others: dict[str, dict[str, torch.Tensor]]


Build = Callable[[str], Built]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of much that these rows do on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trained(row: Row, seed: int) -> Any:
    """The model of a row with an adapter: its base is always the same, and every trained tensor is random."""
    with quiet():
        model = peft.get_peft_model(
            build(row.architecture, **row.model), peft.LoraConfig(**{**PLAIN, **row.config})
        )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            with torch.no_grad():  # in place, because tied factors share their memory
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * SPREAD)
            if row.dtype != "float32":
                parameter.data = parameter.data.to(getattr(torch, row.dtype))
    return model


def save(row: Row, model: Any, folder: Path) -> Path:
    """The folder in which PEFT saves the adapter of a model that :func:`trained` made."""
    with quiet():
        model.save_pretrained(folder, **row.saving)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | row.written
    file.write_text(json.dumps(config), encoding="utf-8")
    return folder


def load(row: Row, folder: Path) -> Any:
    """The model of a row with the adapter in a folder; a factor that the folder lacks is an error."""
    with quiet():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return peft.PeftModel.from_pretrained(build(row.architecture, **row.model), str(folder))


def deltas(model: Any, adapter: str = "default") -> dict[str, torch.Tensor]:
    """PEFT's own delta ``[out, in]`` of every module, in float64, by the module's name in the base model.

    The experts that share a parameter are modules of their own: ``mlp.experts.down_proj[2]``.
    """
    model = model.double()
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, peft.tuners.lora.LoraLayer):
            continue
        name = name.removeprefix("base_model.model.")
        delta = module.get_delta_weight(adapter).detach()
        if isinstance(module, ParamWrapper):
            found |= _of_experts(name, module, delta)
        elif isinstance(module, peft.tuners.lora.Embedding) or getattr(module, "fan_in_fan_out", False):
            found[name] = delta.T
        else:
            found[name] = delta
    return found


def magnitudes(model: Any, adapter: str = "default") -> dict[str, torch.Tensor]:
    """The deltas of a model whose factors lose their signs here: a bound on a delta follows from them."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.abs()
    return deltas(model, adapter)


def beside_factors(model: Any, adapter: str = "default") -> dict[str, torch.Tensor]:
    """What PEFT would save of the adapter in a model besides factors: heads, biases, trained tokens."""
    with quiet():
        saved = peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {key: tensor.clone() for key, tensor in saved.items() if not key.endswith(FACTORS)}


def _of_experts(name: str, module: ParamWrapper, delta: torch.Tensor) -> dict[str, torch.Tensor]:
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    if delta.ndim == 2:
        parameter = module.parameter_name
        return {name if parameter == "weight" else f"{name}.{parameter}": delta}
    each = delta if module._did_swap_in_out_features else delta.transpose(1, 2)
    return {f"{name}.{module.parameter_name}[{e}]": d for e, d in enumerate(each)}


def build_twice(row: Row, place: Path) -> Built:
    """Both adapters of a row, saved as ``a`` and ``b`` in a place."""
    built = Built(row, {}, {}, {}, {})
    for seed, name in enumerate("ab"):
        model = trained(row, seed)
        built.folders[name] = save(row, model, place / name)
        built.others[name] = beside_factors(model)
        built.deltas[name] = deltas(model)
        built.magnitudes[name] = magnitudes(model)
    return built


def merge(built: Built, output: Path, *options: str) -> int:
    """The exit code of the command that writes half the sum of both adapters to a folder."""
    sources = [word for name, folder in built.folders.items() for word in ("--adapter", f"{name}={folder}")]
    spec = "sum(0.5*a, 0.5*b)"
    return main(["merge", spec, *sources, "--output", str(output), "--backend", "numpy", *options])
