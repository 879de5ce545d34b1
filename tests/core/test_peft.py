"""PEFT itself reads what we write and writes what we read: its deltas and ours are the same."""

import warnings
from pathlib import Path
from typing import Any

import peft as typed_peft
import pytest
import torch
import transformers as typed_transformers

from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.engine import merge
from merged_lora.errors import AdapterError

peft: Any = typed_peft  # their annotations are narrower than what they take
transformers: Any = typed_transformers

VOCABULARY, HIDDEN, FFN, KV = 96, 32, 48, 16
EMBED = "model.embed_tokens"
SHAPES = {
    EMBED: (HIDDEN, VOCABULARY),
    **{f"model.layers.{i}.self_attn.q_proj": (HIDDEN, HIDDEN) for i in range(2)},
    **{f"model.layers.{i}.self_attn.v_proj": (KV, HIDDEN) for i in range(2)},
    **{f"model.layers.{i}.mlp.down_proj": (HIDDEN, FFN) for i in range(2)},
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def llama(tied: bool = False, biased: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=biased,
    )
    return transformers.LlamaForCausalLM(config)


def deltas(model: Any, transposed: bool = False) -> dict[str, torch.Tensor]:
    """PEFT's own delta of every module that its one adapter changes, as ``[out, in]``."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            turned = transposed or isinstance(module, peft.tuners.lora.Embedding)
            delta = module.get_delta_weight("default").detach()
            found[name.removeprefix("base_model.model.")] = delta.T if turned else delta
    return found


def assert_deltas_agree(adapter: Adapter, theirs: dict[str, torch.Tensor]) -> None:
    """PEFT's float32 deltas are ours to within what float32 rounds.

    A product of inner size r rounds r products and r - 1 sums; the scaling is rounded to float32 and
    multiplied: n = 2 r + 1 roundings of 2^-24 each at most, relative to the sum of magnitudes (Higham,
    Accuracy and Stability, eq. 3.12). One more covers the second-order terms, n^2 2^-48 < 2^-24.
    """
    assert sorted(adapter.modules) == sorted(theirs)
    for name, f in adapter.modules.items():
        assert theirs[name].dtype == torch.float32
        bound = (2 * f.rank + 2) * 2.0**-24 * abs(f.scaling) * (f.b.double().abs() @ f.a.double().abs())
        assert bool(((theirs[name].double() - f.delta()).abs() <= bound).all()), name
        assert bool(f.delta().any()), name


def in_peft(folder: Path, tied: bool = False) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return deltas(peft.PeftModel.from_pretrained(llama(tied), folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", ["ties(a, 0.5*b)", "dare_linear(a, b)", "slerp(a, b)", "svd(a, b, rank=3)"])
def test_a_saved_merge_has_the_same_deltas_in_peft(tmp_path: Path, spec: str, dtype: torch.dtype) -> None:
    sources = {n: random_adapter(SHAPES, 4, dtype, i, embeddings={EMBED}) for i, n in enumerate("ab")}
    merged = merge(spec, sources)
    merged.save(tmp_path / "merged")
    assert_deltas_agree(merged, in_peft(tmp_path / "merged"))


def test_a_saved_merge_of_different_modules_and_ranks_has_the_same_deltas_in_peft(tmp_path: Path) -> None:
    ranks = {name: 2 + i for i, name in enumerate(SHAPES)}
    without_v = {name: shape for name, shape in SHAPES.items() if "v_proj" not in name}
    without_down = {name: shape for name, shape in SHAPES.items() if "down_proj" not in name}
    a = random_adapter(without_v, ranks, seed=1, embeddings={EMBED})
    b = random_adapter(without_down, 5, seed=2, embeddings={EMBED})
    merged = merge("a - 0.5*b", {"a": a, "b": b})
    assert sorted(merged.modules) == sorted(SHAPES)
    assert len({f.rank for f in merged.modules.values()}) > 3
    merged.save(tmp_path / "merged")
    assert_deltas_agree(merged, in_peft(tmp_path / "merged"))


def test_an_adapter_whose_scaling_is_not_one_has_the_same_deltas_in_peft(tmp_path: Path) -> None:
    scalings = {name: 0.5 + i for i, name in enumerate(SHAPES)}
    ranks = {name: 1 + i for i, name in enumerate(SHAPES)}
    adapter = random_adapter(SHAPES, ranks, torch.bfloat16, 0, scalings, {EMBED})
    adapter.save(tmp_path / "a")
    assert_deltas_agree(adapter, in_peft(tmp_path / "a"))


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all linear layers": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*\.1\..*(q|down)_proj"},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "rsLoRA": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "r": 5},
    "rank pattern": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3}},
    "alpha pattern": {
        "target_modules": ["q_proj", "v_proj"],
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5},
    },
    "all patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {r"^model\.layers\.0\..*v_proj": 7, "v_proj": 3, "down_proj": 2},
        "alpha_pattern": {r"layers\.\d\.mlp\.down_proj": 1, "q_proj": 9},
        "use_rslora": True,
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_saves_is_read_with_its_own_deltas(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | CONFIGS[name]
    model = peft.get_peft_model(llama(), peft.LoraConfig(**settings))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(tmp_path / "theirs")
    adapter = Adapter.load(tmp_path / "theirs")
    assert {t.dtype for f in adapter.modules.values() for t in (f.a, f.b)} == {dtype}
    assert adapter.header.task_type == "CAUSAL_LM"
    assert_deltas_agree(adapter, deltas(model.float()))
    adapter.save(tmp_path / "ours")
    assert_deltas_agree(adapter, in_peft(tmp_path / "ours"))


def test_an_embedding_tied_to_the_head_is_read_with_peft_s_own_delta(tmp_path: Path) -> None:
    settings = peft.LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False)
    model = peft.get_peft_model(llama(tied=True), settings)
    model.save_pretrained(tmp_path / "theirs")
    adapter = Adapter.load(tmp_path / "theirs")
    assert_deltas_agree(adapter, deltas(model))
    adapter.save(tmp_path / "ours")
    assert_deltas_agree(adapter, in_peft(tmp_path / "ours", tied=True))


def test_the_layout_fan_in_fan_out_stays(tmp_path: Path) -> None:
    def gpt2() -> Any:
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2)
        )

    settings = peft.LoraConfig(
        r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False
    )
    model = peft.get_peft_model(gpt2(), settings)
    model.save_pretrained(tmp_path / "theirs")
    theirs = deltas(model, transposed=True)
    adapter = Adapter.load(tmp_path / "theirs")
    assert_deltas_agree(adapter, theirs)
    merge("sum(a)", {"a": adapter}).save(tmp_path / "ours")
    reloaded = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "ours")
    assert_deltas_agree(Adapter.load(tmp_path / "ours"), deltas(reloaded, transposed=True))
    assert peft.PeftConfig.from_pretrained(tmp_path / "ours").fan_in_fan_out is True


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "heads"),
        ({"bias": "lora_only"}, "biases"),
        ({"bias": "all"}, "biases"),
        ({"trainable_token_indices": [1]}, "tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ],
    ids=str,
)
def test_what_peft_saves_beyond_factors_is_refused_by_name(
    tmp_path: Path, extra: dict[str, Any], key: str
) -> None:
    model = peft.get_peft_model(llama(biased=True), peft.LoraConfig(r=4, target_modules=["q_proj"], **extra))
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterError, match=f"uses what no merge supports: {key}"):
        Adapter.load(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ({"modules_to_save": ["lm_head"]}, "heads"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "biases"),
        ({"bias": "lora_only"}, "biases"),
        ({"trainable_token_indices": [1]}, "tokens"),
    ],
    ids=str,
)
def test_dropping_what_peft_saved_leaves_its_deltas(tmp_path: Path, extra: dict[str, Any], kind: str) -> None:
    settings = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **extra}
    model = peft.get_peft_model(llama(biased=True), peft.LoraConfig(**settings))
    model.save_pretrained(tmp_path / "theirs")
    assert_deltas_agree(Adapter.load(tmp_path / "theirs", [kind]), deltas(model))


def test_dropping_target_parameters_leaves_the_deltas_of_modules(tmp_path: Path) -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Parameter(torch.randn(3, 8, 6))
            self.down = torch.nn.Parameter(torch.randn(3, 6, 8))

    base = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8), "experts": Experts()})
    settings = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["experts.up", "experts.down"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(base, settings)
    model.save_pretrained(tmp_path / "theirs")
    theirs = {"q_proj": model.base_model.model["q_proj"].get_delta_weight("default").detach()}
    assert_deltas_agree(Adapter.load(tmp_path / "theirs", ["target_parameters"]), theirs)
