"""Whether adapters fit a base model, and what vLLM makes of them, without weights and without vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import tiny
from making import peft_tensors, random_adapter, write_by_hand
from merged_lora.adapters import Adapter
from merged_lora.errors import CalibrationError
from merged_lora.files.layout import Header
from merged_lora.judging.hosting import RANKS, Host, serving_of
from merged_lora.judging.inspecting import inspect
from running import Run

ENDS = {"model.embed_tokens": (tiny.HIDDEN, tiny.VOCABULARY), "lm_head": (tiny.VOCABULARY, tiny.HIDDEN)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model without its weights."""
    folder = Path(tiny.make_model(tmp_path_factory.mktemp("tiny")))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return folder


@pytest.fixture(scope="module")
def host(place: Path) -> Host:
    return Host(place)


def adapter(modules: dict[str, tuple[int, int]], base: str | None = None, **options: Any) -> Adapter:
    return random_adapter(modules, header=Header(base_model=base), **options)


def test_an_adapter_of_all_modules_fits_without_the_weights_of_the_model(host: Host) -> None:
    assert host.misfit(adapter(tiny.MODULES | ENDS, embeddings=["model.embed_tokens"])) is None


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ({"model.layers.7.self_attn.q_proj": (64, 64)}, "has no model.layers.7.self_attn.q_proj"),
        ({"model.layers.0.self_attn.p_proj": (64, 64)}, "has no model.layers.0.self_attn.p_proj"),
        (
            {"model.layers.0.self_attn.q_proj": (64, 60)},
            "is a matrix of shape (64, 64) in the model, and a matrix of shape (64, 60) in the adapter",
        ),
        ({"agent.layers.0.self_attn.q_proj": (64, 64)}, "--rename agent.=model."),
    ],
    ids=["layer", "module", "shape", "prefix"],
)
def test_a_misfit_is_named(host: Host, modules: dict[str, tuple[int, int]], words: str) -> None:
    assert words in str(host.misfit(adapter(modules)))


def test_names_of_other_classes_and_fused_projections_fit(host: Host) -> None:
    bare = {name.removeprefix("model."): shape for name, shape in tiny.MODULES.items()}
    assert host.misfit(adapter(bare)) is None
    assert host.misfit(adapter({"model.layers.0.mlp.gate_up_proj": (320, 64)})) is None
    assert "gate_up_proj" in str(host.misfit(adapter({"model.layers.0.mlp.gate_up_proj": (322, 64)})))


def test_experts_in_parameters_are_modules_of_the_model(tmp_path: Path) -> None:
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        vocab_size=32,
        architectures=[MixtralForCausalLM.__name__],
    )
    config.save_pretrained(tmp_path)
    host = Host(tmp_path)
    down = {f"model.layers.0.mlp.experts.down_proj[{i}]": (16, 24) for i in range(3)}
    assert host.misfit(adapter(down)) is None
    assert "has no" in str(host.misfit(adapter(down | {"model.layers.0.mlp.experts.down_proj[3]": (16, 24)})))


@pytest.mark.parametrize(
    ("base", "named"), [("org/TINY", True), ("/disk/tiny/", True), ("org/other", False), (None, False)]
)
def test_a_model_is_known_by_the_last_part_of_its_name(
    place: Path, tmp_path: Path, base: str | None, named: bool
) -> None:
    (tmp_path / "tiny").symlink_to(place)
    found = inspect({"a": adapter(tiny.MODULES, base)}, model=tmp_path / "tiny")
    assert (found.facts[0].named, found.facts[0].misfit, found.fails) == (named, None, False)
    assert any("make sure that it was trained on that model" in line for line in found.verdict()) is not named


def test_a_model_in_the_cache_of_the_hub_is_known_by_its_name(place: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--some-base" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(place)
    assert Host(snapshot).is_named_by(adapter(tiny.MODULES, "org/some-base"))


def test_the_command_says_what_fits_and_exits_3_if_something_does_not(
    place: Path, tmp_path: Path, run: Run
) -> None:
    adapter(tiny.MODULES).save(tmp_path / "a")
    adapter({"model.layers.0.self_attn.q_proj": (64, 60)}).save(tmp_path / "b")
    assert run("inspect", f"a={tmp_path / 'a'}", "--model", place)[0] == 0
    code, out, _ = run("inspect", f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}", "--model", place)
    assert code == 3
    assert "b does not fit the base model: model.layers.0.self_attn.q_proj is a matrix" in out


@pytest.mark.parametrize("name", [3, "/no/such/folder"])
def test_a_model_that_is_not_there_is_refused(name: Any) -> None:
    with pytest.raises(CalibrationError):
        inspect({"a": adapter(tiny.MODULES)}, model=name)


def test_a_folder_that_holds_no_model_is_refused_on_one_line(tmp_path: Path, run: Run) -> None:
    adapter(tiny.MODULES).save(tmp_path / "a")
    code, out, err = run("inspect", f"a={tmp_path / 'a'}", "--model", tmp_path / "a")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"merged-lora: error: cannot read the model {tmp_path / 'a'}: ")


@pytest.mark.parametrize(("rank", "needed"), [(1, 1), (2, 8), (16, 16), (17, 32), (257, 320), (600, None)])
def test_the_rank_that_vllm_needs_is_one_that_it_takes(rank: int, needed: int | None) -> None:
    found = serving_of(adapter({"model.layers.0.mlp.down_proj": (700, 700)}, rank=rank))
    assert found.max_lora_rank == needed
    assert found.flags == ((f"--max-lora-rank {needed}",) if needed and needed > 16 else ())
    assert list(found.limits) == ([] if needed else [f"rank {rank} is more than vLLM serves, which is 512"])


def test_the_ranks_are_those_of_the_vllm_that_is_installed() -> None:
    lora = pytest.importorskip("vllm.config.lora")
    assert lora.MaxLoRARanks.__args__ == RANKS


@pytest.mark.parametrize(
    ("module", "flags", "words"),
    [
        ("model.layers.0.mlp.experts.down_proj[0]", ("--merged-lora-backend cpu",), "in parameters"),
        ("model.layers.0.mlp.experts.0.down_proj", ("--merged-lora-backend cpu",), "apart"),
        ("mlp.experts.w2[0]", ("--enable-moe-shared-loras", "--merged-lora-backend cpu"), ""),
        ("model.vision_tower.layers.0.fc1", ("--enable-tower-connector-lora",), ""),
        ("lm_head", (), "LoRA for lm_head in some models alone"),
    ],
)
def test_what_a_server_needs_follows_from_the_names(module: str, flags: tuple[str, ...], words: str) -> None:
    found = serving_of(adapter({module: (32, 48)}))
    assert found.flags == flags
    assert words in " ".join(found.limits)


def test_projections_that_vllm_puts_together_are_named() -> None:
    kinds = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
    found = serving_of(adapter({f"model.layers.0.{kind}": (32, 48) for kind in kinds}))
    assert found.packed == ("qkv_proj",)


def test_what_only_the_command_leaves_out_is_refused_on_a_server(tmp_path: Path) -> None:
    tensors = peft_tensors("model.layers.0.q_proj") | {"base_model.model.score.weight": torch.ones(2, 8)}
    write_by_hand(tmp_path / "a", tensors, modules_to_save=["score"])
    (plain,) = inspect({"a": tmp_path / "a"}).facts
    assert "--drop heads" in str(plain.refused)
    (fact,) = inspect({"a": tmp_path / "a"}, drop=["heads"]).facts
    assert (fact.refused, fact.modules) == (None, 1)
    assert fact.vllm is not None
    assert "no merge on a server takes it as it is" in fact.vllm.limits[0]
