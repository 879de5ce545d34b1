"""What PEFT and vLLM themselves do with the adapters of the table, as it was recorded.

    python tests/formats/readers.py

writes ``recorded.json``, from which ``docs/adapters.md`` is rendered. A test does it again and compares.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from formats import building
from formats.building import Built, build_twice, quiet
from formats.kinds import NOT_CHECKED
from formats.models import EXPERTS, build
from formats.odd import ODD, OF
from formats.table import ROWS, Row

RECORDED = Path(__file__).with_name("recorded.json")

Facts = dict[str, str]

SAME, OTHER = "the same deltas", "other deltas"
HEAD = f"{SAME}, and the head"
HALF, REST = "half the sum", " of the factors alone"
NO_LORA = "has no LoRA for this architecture"
CLOSE = 1e-5
"""Deltas that float32 computes from the same factors are this close, relative to their largest entry."""

VLLM_CLASSES = {
    "Llama": "llama.LlamaForCausalLM",
    "Qwen3": "qwen3.Qwen3ForCausalLM",
    "Gemma 3 text": "gemma3.Gemma3ForCausalLM",
    "Gemma 3": "gemma3_mm.Gemma3ForConditionalGeneration",
    "Mistral": "mistral.MistralForCausalLM",
    "Mixtral": "mixtral.MixtralForCausalLM",
    "Qwen3-MoE": "qwen3_moe.Qwen3MoeForCausalLM",
    "Phi-3": "phi3.Phi3ForCausalLM",
    "GPT-2": "gpt2.GPT2LMHeadModel",
    "BERT": "bert.BertEmbeddingModel",
    "Whisper": "whisper.WhisperForConditionalGeneration",
}
"""Where vLLM has an architecture; T5 and ViT it has not."""


def in_peft(of: Built) -> Facts:
    """What PEFT does with both adapters of a row: reads one, adds both up, and merges one into its base.

    The last is what mergekit has it do.
    """
    return {
        "reads": _said(lambda: _read(of)),
        "adds": _said(lambda: _added(of)),
        "into the base": _said(lambda: _unloaded(of)),
    }


def _read(of: Built) -> str:
    return _as_good(SAME, building.deltas(building.load(of.row, of.folders["a"])), of.deltas["a"])


def _added(of: Built) -> str:
    model = building.load(of.row, of.folders["a"])
    with quiet():
        model.load_adapter(str(of.folders["b"]), adapter_name="b")
        model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "sum", combination_type="cat")
    others = building.beside_factors(model, "sum")
    expected = {key: 0.5 * (tensor + of.others["b"][key]) for key, tensor in of.others["a"].items()}
    rest = _as_good("", others, expected)
    a, b = of.deltas.values()
    half = {name: 0.5 * (a[name] + b[name]) for name in a}
    return _as_good(HALF, building.deltas(model, "sum"), half) + (REST if rest else "")


def _unloaded(of: Built) -> str:
    with quiet():
        building.load(of.row, of.folders["a"]).merge_and_unload()
    return "is merged"


def _as_good(words: str, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    if found.keys() != expected.keys():
        return OTHER
    near = (
        found[name].shape == delta.shape
        and bool((found[name] - delta).abs().max() <= CLOSE * delta.abs().max().clamp(min=1e-30))
        for name, delta in expected.items()
    )
    return words if all(near) else OTHER


def _said(action: Callable[[], str]) -> str:
    try:
        return action()
    except ImportError as error:
        return f"{NOT_CHECKED}: {error}"
    except Exception as error:  # whatever another project raises is what is recorded
        first = re.split(r"(?<=\w)\.\s|\n|: [{\[]", str(error))[0]
        first = re.sub(r"/\S*/", "", first)
        return f"{type(error).__name__}: {first[:120]}"


def in_vllm(row: Row, folder: Path, expected: Mapping[str, torch.Tensor]) -> str:
    """What vLLM's loader does with a folder.

    row:      whose model it is for.
    folder:   the adapter.
    expected: its deltas by PEFT's names.
    """
    model = _vllm_class(row.architecture) if row.architecture in VLLM_CLASSES else None
    if model is None:
        return NO_LORA
    return _said(lambda: _loaded(model, row, folder, expected))


@cache
def _vllm_class(architecture: str) -> Any | None:
    from vllm.model_executor.models.interfaces import supports_lora

    module, name = VLLM_CLASSES[architecture].split(".")
    path = f"vllm.model_executor.models.{module}"
    try:
        found = getattr(importlib.import_module(path), name)
    except ModuleNotFoundError:  # vLLM's Gemma 3 needs torchvision; what it says of names can be read
        return _as_written(path, name)
    return found if supports_lora(found) else None


def _as_written(path: str, name: str) -> Any:
    """What a class of vLLM says of names, from its source."""
    from vllm.model_executor.models.utils import WeightsMapper

    spec = importlib.util.find_spec(path)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    said: dict[str, Any] = {"embedding_modules": {}}
    for node in next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name).body:
        match node:
            case ast.Assign([ast.Name("hf_to_vllm_mapper" | "embedding_modules" as key)], value):
                said[key] = eval(
                    compile(ast.Expression(value), path, "eval"), {"WeightsMapper": WeightsMapper}
                )
    return type(name, (), said)


def _loaded(model: Any, row: Row, folder: Path, expected: Mapping[str, torch.Tensor]) -> str:
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.utils import parse_fine_tuned_lora_name

    helper = PEFTHelper.from_local_dir(str(folder), 32)
    helper.validate_legal(LoRAConfig(max_lora_rank=64))
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapper = mapper.get_rename_mapper() if mapper else None
    loaded = LoRAModel.from_local_checkpoint(
        str(folder),
        _adaptable(model, row),
        helper,
        lora_model_id=1,
        device="cpu",
        dtype=torch.float64,
        weights_mapper=mapper,
    )

    def renamed(name: str) -> str:
        module, dot, expert = name.rpartition(".") if name.endswith("]") else (name, "", "")
        mapped, _ = parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", mapper)
        return f"{mapped}{dot}{expert}"

    found: dict[str, torch.Tensor] = {}
    for name, weights in loaded.loras.items():
        found |= _vllm_deltas(name, weights)
    words = _as_good(SAME, found, {renamed(name): delta for name, delta in expected.items()})
    return HEAD if getattr(loaded, "modules_to_save", None) and words == SAME else words


def _vllm_deltas(name: str, weights: Any) -> dict[str, torch.Tensor]:
    a, b, experts = weights.lora_a, weights.lora_b, EXPERTS["num_experts"]
    if not name.endswith((".experts", ".experts.base_layer")):
        return {name: weights.scaling * (b @ a)}
    parameter = "gate_up_proj" if name.endswith(".base_layer") else "down_proj"
    holder = name.removesuffix(".base_layer")
    each = torch.einsum(
        "brx,xra->xba", b.reshape(b.shape[0], -1, experts), a.reshape(experts, -1, a.shape[1])
    )
    return {f"{holder}.{parameter}[{e}]": weights.scaling * delta for e, delta in enumerate(each)}


def _adaptable(model: Any, row: Row) -> set[str]:
    """Last parts of the names of modules that vLLM adapts: linear ones, and those that its class names."""
    linear = {
        name.rpartition(".")[2]
        for name, module in build(row.architecture, **row.model).named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return linear - {"lm_head", "proj_out"} | set(model.embedding_modules) | {"experts", "gate"}


def recorded() -> dict[str, Any]:
    """What was recorded: the releases, and for every row what PEFT and vLLM did."""
    found: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return found


def releases() -> Facts:
    """The releases of those who read here."""
    from importlib.metadata import version

    return {"PEFT": version("peft"), "vLLM": version("vllm").partition("+")[0]}


def of_row(of: Built) -> dict[str, Any]:
    """What both do with a row."""
    return {"PEFT": in_peft(of), "vLLM": in_vllm(of.row, of.folders["a"], of.deltas["a"])}


def of_odd(of: Built, kind: str, place: Path) -> dict[str, Any]:
    """What both do with files of a kind, made in a place from the first adapter of a row."""
    found = ODD[kind](of.folders["a"], place)
    reads = _said(lambda: _as_good(SAME, building.deltas(building.load(of.row, found)), of.deltas["a"]))
    return {"PEFT": {"reads": reads}, "vLLM": in_vllm(of.row, found, of.deltas["a"])}


def main() -> None:
    """Write down what PEFT and vLLM do with every row, and with odd files."""
    facts: dict[str, Any] = {"releases": releases(), "rows": {}, "odd": {}}
    with tempfile.TemporaryDirectory() as place:
        for i, (name, row) in enumerate(ROWS.items()):
            of = build_twice(row, Path(place) / str(i))
            facts["rows"][name] = of_row(of)
            if name == OF:
                for kind in ODD:
                    (Path(place) / kind).mkdir()
                    facts["odd"][kind] = of_odd(of, kind, Path(place) / kind)
    text = json.dumps(facts, indent=1)
    RECORDED.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
