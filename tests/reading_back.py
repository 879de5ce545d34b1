"""Reads folders by another project's loader, in this process or as a program with one of its releases.

    PYTHONPATH=RELEASE python tests/reading_back.py {peft,diffusers,vllm} SHAPES.json OUT FOLDER ...

SHAPES.json holds ``[out, in]`` of each module of a model that is made of linear layers alone. OUT, a
safetensors file, gets the delta of each module by the number of the folder, a slash and the module's name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from merged_lora.factors import Factors

Shapes = Mapping[str, tuple[int, int]]


def deltas_in(
    loader: str, folders: Sequence[Path], shapes: Shapes, scratch: Path, path: Path | None = None
) -> list[dict[str, torch.Tensor]]:
    """The deltas that a loader in a process of its own finds in each folder, by module name.

    loader:  ``peft``, ``diffusers`` or ``vllm``.
    folders: the folders.
    shapes:  shape ``(out, in)`` of each linear layer of the model.
    scratch: a folder for the files between the two processes.
    path:    the folder of a release; without it, the other process takes what the environment has.
    """
    given, found = scratch / "shapes.json", scratch / "deltas.safetensors"
    given.write_text(json.dumps(shapes), encoding="utf-8")
    program = [sys.executable, __file__, loader, str(given), str(found), *map(str, folders)]
    subprocess.run(program, env=os.environ | {"PYTHONPATH": str(path or "")}, check=True)
    deltas: list[dict[str, torch.Tensor]] = [{} for _ in folders]
    for key, delta in load_file(found).items():
        number, _, name = key.partition("/")
        deltas[int(number)][name] = delta
    return deltas


def in_peft(folder: Path, shapes: Shapes) -> dict[str, torch.Tensor]:
    """The deltas of the PEFT that is imported."""
    import peft

    typed: Any = peft.PeftModel
    return _of_layers(typed.from_pretrained(_filled(torch.nn.Module(), shapes), str(folder)).base_model.model)


def in_diffusers(folder: Path, shapes: Shapes) -> dict[str, torch.Tensor]:
    """The deltas of the Diffusers that is imported."""
    theirs: Any = import_module("diffusers")
    bases = (theirs.ModelMixin, theirs.ConfigMixin, theirs.loaders.PeftAdapterMixin)
    model = _filled(type("Model", bases, {"config_name": "config.json"})(), shapes)
    model.load_lora_adapter(
        str(folder),
        prefix="base_model.model",
        weight_name="adapter_model.safetensors",
        adapter_name="default",
    )
    return _of_layers(model)


def in_vllm(folder: Path, shapes: Shapes) -> dict[str, torch.Tensor]:
    """The deltas of the vLLM that is imported."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(str(folder), 64)
    loaded = LoRAModel.from_local_checkpoint(
        str(folder), {name.rpartition(".")[2] for name in shapes}, helper, device="cpu", dtype=torch.float32
    )
    return {name: lora.scaling * (lora.lora_b @ lora.lora_a) for name, lora in loaded.loras.items()}


def assert_deltas(found: Mapping[str, torch.Tensor], expected: Mapping[str, Factors]) -> None:
    """Deltas that were computed in float32 are these, within the bound that ``core/test_peft.py`` derives."""
    assert sorted(found) == sorted(expected)
    for name, f in expected.items():
        bound = (2 * f.rank + 2) * 2.0**-24 * abs(f.scaling) * (f.b.double().abs() @ f.a.double().abs())
        assert bool(((found[name].double() - f.delta()).abs() <= bound).all()), name


def _filled(model: Any, shapes: Shapes) -> Any:
    """The module with linear layers of these names and shapes in it."""
    for name, (rows, columns) in shapes.items():
        *parents, last = name.split(".")
        holder = model
        for parent in parents:
            if parent not in dict(holder.named_children()):
                holder.add_module(parent, torch.nn.Module())
            holder = holder.get_submodule(parent)
        holder.add_module(last, torch.nn.Linear(columns, rows))
    return model


def _of_layers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    layers: Any = model.named_modules()
    return {
        name: layer.get_delta_weight("default").detach()
        for name, layer in layers
        if hasattr(layer, "get_delta_weight")
    }


if __name__ == "__main__":
    loader, given, target, *folders = sys.argv[1:]
    read = {"peft": in_peft, "diffusers": in_diffusers, "vllm": in_vllm}[loader]
    shapes = json.loads(Path(given).read_text(encoding="utf-8"))
    found = {
        f"{number}/{name}": delta.contiguous()
        for number, folder in enumerate(folders)
        for name, delta in read(Path(folder), shapes).items()
    }
    save_file(found, target)
