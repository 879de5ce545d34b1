"""A tiny random Qwen3 with a byte tokenizer, and adapters for it: all that a server needs.

vLLM serves this architecture on all its routes for text, including the one for decisions.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.bench import cases
from merged_lora.calibration import CALIBRATION_NAME, Calibration, Exchange, write_calibration
from merged_lora.files.layout import Header

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, LAYERS = 64, 160, 2, 1, 2
VOCABULARY = 320

_HEAD = HIDDEN // HEADS
MODULES = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(LAYERS)
    for name, shape in {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * _HEAD, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * _HEAD, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }.items()
}
"""Every linear module of the model, as ``name: (out, in)``."""

_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}<assistant>"


FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8")
MAX_RANK = 16
MAX_AD_HOC = 40
CALIBRATED = ("sql", "tone")
"""The adapters of a :class:`Place` that have a calibration."""

SPECS = {
    "merged_sum": "0.7*sql + 0.3*chat - 0.2*tone",
    "merged_cat": "cat(sql, chat)",
    "merged_svd": "svd(sql, chat, rank=8)",
    "merged_slerp": "slerp(sql, chat, t=0.3)",
    "merged_linear": "linear(sql, -0.5*chat)",
    "merged_ties": 'ties(0.7*sql, 0.3*chat, density=0.5, majority_sign_method="frequency")',
    "merged_dare_linear": "dare_linear(sql, chat, seed=7)",
    "merged_dare_ties": "dare_ties(sql, chat, density=[0.3, 0.8])",
    "merged_prune": "magnitude_prune(sql, chat)",
    "merged_parts": "sum(sql, attention)",
    "merged_della": "della(sql, chat)",
    "merged_karcher": "karcher(sql, chat, tone)",
    "merged_knots": "knots(sql, 0.5*chat, tone)",
    "merged_core": "core_ties(sql, chat, tone, weights=auto)",
    "merged_ties_svd": "ties_svd(sql, chat, density=0.3)",
    "merged_sce_svd": "sce_svd(sql, chat, select_topk=0.4)",
    "merged_regmean": "regmean(sql, 0.5*tone)",
    "merged_modules": 'ties(sql, chat, modules="*.self_attn.* down_proj", without="layers.1.mlp")',
}
"""A merge for every path that a strategy may take, by the name under which its offline twin is served."""


def importing_tests() -> dict[str, str]:
    """The environment of a server that imports this folder's modules and the vLLM under test."""
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, folders))}


@dataclass(frozen=True)
class Place:
    """The folders of the model, of the adapters and of further sources; the last one is empty at first."""

    model: Path
    adapters: dict[str, Path]
    sources: Path

    @property
    def hold(self) -> Path:
        """The file that holds merges up; see ``faults.py``."""
        return self.sources.with_name("hold")


def make_model(folder: Path) -> Path:
    """Write the model; returns its folder."""
    # Takes seconds, which tests of a file that needs no model do not wait for.
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=_HEAD,
        max_position_embeddings=256,
        eos_token_id=VOCABULARY - 1,
        bos_token_id=VOCABULARY - 2,
        initializer_range=0.2,
    )
    model: Any = Qwen3ForCausalLM
    model(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "no", "ye", "yes"]  # a decision is read off one token
    merges = [("n", "o"), ("y", "e"), ("ye", "s")]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    make_tokenizer: Any = PreTrainedTokenizerFast
    fast = make_tokenizer(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>")
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(folder)
    return folder


def make_adapter(seed: int, rank: int = 8, only: str = "", scaling: float = 2.0) -> Adapter:
    """A bfloat16 adapter of all modules, or of those whose name contains ``only``, without a calibration."""
    modules = {name: shape for name, shape in MODULES.items() if only in name}
    header = Header(base_model="tiny", task_type="CAUSAL_LM")
    adapter = random_adapter(modules, rank, torch.bfloat16, seed, scaling, header=header)
    return replace(adapter, calibration=None)


def calibrate(folder: Path, *exchanges: Exchange, seed: int = 0) -> None:
    """Write a calibration of random inputs, with these exchanges, beside the adapter in a folder."""
    calibration = cases.calibrated(Adapter.load(folder), seed, exchanges=exchanges).calibration
    assert isinstance(calibration, Calibration)
    write_calibration(folder / CALIBRATION_NAME, calibration)
