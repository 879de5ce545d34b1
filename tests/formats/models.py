"""Tiny random models of 13 classes in 12 architectures, as PEFT's users adapt them.

Knows nothing of adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as typed_transformers

transformers: Any = typed_transformers  # its annotations are narrower than what it takes

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS, VOCABULARY = 16, 24, 4, 2, 2, 40
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HIDDEN // HEADS,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 3,
    "tie_word_embeddings": False,
}
"""What the decoders have in common."""

VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 8,
    "patch_size": 4,
}
LABELS = {f"LABEL_{i}": i for i in range(3)}
CLASSES = {"label2id": LABELS, "id2label": {i: name for name, i in LABELS.items()}}

CAUSAL, CLASSIFIER, TOKENS = "ForCausalLM", "ForSequenceClassification", "ForTokenClassification"


def _decoder(family: str, **more: Any) -> Callable[..., Any]:
    def build(head: str = CAUSAL, **changed: Any) -> Any:
        config = getattr(transformers, f"{family}Config")(**TEXT | more | changed)
        return getattr(transformers, f"{family}{head}")(config)

    return build


def _gemma3_text(head: str = CAUSAL, **changed: Any) -> Any:
    text = {key: value for key, value in TEXT.items() if key != "num_labels"}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**text | changed))


def _gemma3(head: str = "ForConditionalGeneration", **changed: Any) -> Any:
    text = transformers.Gemma3TextConfig(**{k: v for k, v in TEXT.items() if k != "num_labels"})
    vision = transformers.SiglipVisionConfig(**VISION)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=3, **changed
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _gpt2(head: str = "LMHeadModel", **changed: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=HIDDEN, n_inner=FFN, n_layer=LAYERS, n_head=HEADS,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **CLASSES, **changed,
    )  # fmt: skip
    return getattr(transformers, f"GPT2{head}")(config)


def _bert(head: str = CLASSIFIER, **changed: Any) -> Any:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=32, **CLASSES, **changed,
    )  # fmt: skip
    return getattr(transformers, f"Bert{head}")(config)


def _t5(head: str = "ForConditionalGeneration", **changed: Any) -> Any:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=HIDDEN // HEADS, d_ff=FFN, num_layers=LAYERS,
        num_heads=HEADS, decoder_start_token_id=0, **changed,
    )  # fmt: skip
    return getattr(transformers, f"T5{head}")(config)


def _whisper(head: str = "ForConditionalGeneration", **changed: Any) -> Any:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=HIDDEN, num_mel_bins=8, max_source_positions=16,
        max_target_positions=16, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_ffn_dim=FFN,
        decoder_ffn_dim=FFN, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None, **changed,
    )  # fmt: skip
    return getattr(transformers, f"Whisper{head}")(config)


def _vit(head: str = "ForImageClassification", **changed: Any) -> Any:
    return getattr(transformers, f"ViT{head}")(transformers.ViTConfig(**VISION | CLASSES | changed))


EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": FFN}

ARCHITECTURES: dict[str, Callable[..., Any]] = {
    "Llama": _decoder("Llama"),
    "Qwen3": _decoder("Qwen3"),
    "Gemma 3 text": _gemma3_text,
    "Gemma 3": _gemma3,
    "Mistral": _decoder("Mistral"),
    "Mixtral": _decoder("Mixtral", num_local_experts=3, num_experts_per_tok=2),
    "Qwen3-MoE": _decoder("Qwen3Moe", **EXPERTS),
    "Phi-3": _decoder("Phi3"),
    "GPT-2": _gpt2,
    "BERT": _bert,
    "T5": _t5,
    "Whisper": _whisper,
    "ViT": _vit,
}
"""For every architecture what builds its model: the end of the class's name, then fields of its config."""


def build(architecture: str, **settings: Any) -> Any:
    """The model with the same random weights for the same arguments, in float32.

    architecture: a key of ARCHITECTURES.
    settings:     ``head``, the end of the class's name, and fields of the model's configuration.
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        return ARCHITECTURES[architecture](**settings).eval()
    finally:
        torch.random.set_rng_state(state)
