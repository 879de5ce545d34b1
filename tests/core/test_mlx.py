"""Adapters of mlx-lm give the deltas by which mlx-lm changes its layers: ``scale (x lora_a) lora_b``."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merged_lora.adapters import Adapter
from merged_lora.errors import AdapterError
from merged_lora.files.parts import EMBEDDINGS

SCALE = 20.0
SHAPES = {"model.layers.0.self_attn.q_proj": (48, 32, 4), "model.layers.0.mlp.up_proj": (80, 32, 8)}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def write(folder: Path, tensors: dict[str, torch.Tensor], **fields: object) -> Path:
    folder.mkdir()
    config = {"fine_tune_type": "lora", "model": "org/base", "lora_parameters": {"rank": 4, "scale": SCALE}}
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    save_file(tensors, folder / "adapters.safetensors")
    return folder


def factors() -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    for name, (out, width, rank) in SHAPES.items():
        made |= {f"{name}.lora_a": drawn(width, rank), f"{name}.lora_b": drawn(rank, out)}
    return made


def test_factors_are_transposed_and_scaled_as_they_are(tmp_path: Path) -> None:
    tensors = factors()
    adapter = Adapter.load(write(tmp_path / "a", tensors))
    assert adapter.header.base_model == "org/base"
    assert adapter.modules.keys() == SHAPES.keys()
    for name, f in adapter.modules.items():
        a, b = tensors[f"{name}.lora_a"].double(), tensors[f"{name}.lora_b"].double()
        assert torch.allclose(f.delta(), SCALE * (a @ b).T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("last", EMBEDDINGS)
def test_an_embedding_adds_the_row_of_a_token(tmp_path: Path, last: str) -> None:
    name = f"model.{last}"
    tensors = {f"{name}.lora_a": drawn(96, 4), f"{name}.lora_b": drawn(4, 32)}
    (f,) = Adapter.load(write(tmp_path / "a", tensors)).modules.values()
    assert f.embedding
    rows = SCALE * (tensors[f"{name}.lora_a"].double() @ tensors[f"{name}.lora_b"].double())
    assert torch.allclose(f.delta().T, rows, rtol=0, atol=1e-12)


def test_experts_get_the_names_of_the_base_model(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.switch_mlp.down_proj"
    tensors = {f"{name}.lora_a": drawn(3, 4, 12), f"{name}.lora_b": drawn(3, 32, 4)}
    modules = Adapter.load(write(tmp_path / "a", tensors)).modules
    assert modules.keys() == {f"model.layers.0.mlp.experts.{i}.down_proj" for i in range(3)}
    for i in range(3):
        expected = SCALE * tensors[f"{name}.lora_b"][i].double() @ tensors[f"{name}.lora_a"][i].double()
        found = modules[f"model.layers.0.mlp.experts.{i}.down_proj"].delta()
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_a_saved_adapter_is_one_of_peft(tmp_path: Path) -> None:
    adapter = Adapter.load(write(tmp_path / "a", factors()))
    adapter.save(tmp_path / "b")
    assert (tmp_path / "b" / "adapter_model.safetensors").is_file()
    again = Adapter.load(tmp_path / "b")
    assert {n: f.delta().tolist() for n, f in again.modules.items()} == {
        n: f.delta().tolist() for n, f in adapter.modules.items()
    }


@pytest.mark.parametrize(
    ("extra", "fields", "message"),
    [
        ({}, {"fine_tune_type": "dora"}, "mlx-lm of the type 'dora'; only lora"),
        ({}, {"fine_tune_type": "full"}, "mlx-lm of the type 'full'; only lora"),
        ({}, {"lora_parameters": {"rank": 4}}, "mlx-lm whose scale is None, not a number"),
        ({}, {"lora_parameters": {"scale": True}}, "mlx-lm whose scale is True, not a number"),
        ({"model.layers.0.mlp.up_proj.m": drawn(80)}, {}, "of mlx-lm are not LoRA factors: .*up_proj.m"),
        ({"x.lora_a": torch.tensor(1.0)}, {}, r"x.lora_a has shape \(\), not a matrix"),
        ({"x.lora_a": drawn(2, 3, 4)}, {}, "x lora_A has shape|x has no lora_B"),
    ],
)
def test_what_is_no_plain_lora_of_mlx_is_refused(
    tmp_path: Path, extra: dict[str, torch.Tensor], fields: dict[str, object], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        Adapter.load(write(tmp_path / "a", factors() | extra, **fields))
