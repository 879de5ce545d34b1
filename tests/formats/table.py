"""The adapters that PEFT builds for these tests, a row for each, and what is to become of them.

Knows nothing of PEFT or torch: the tests build the rows, and ``page.py`` renders them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from formats.kinds import KINDS, Kind


@dataclass(frozen=True)
class Row:
    """One adapter that PEFT builds.

    kind:         what is to become of it and why, a key of KINDS.
    architecture: a key of ``models.ARCHITECTURES``.
    config:       fields of LoraConfig, over ``PLAIN``.
    model:        ``head`` and fields of the model's configuration.
    saving:       arguments of ``save_pretrained``.
    written:      fields that are set in the file afterwards, for what PEFT builds only elsewhere.
    dtype:        of the adapter's tensors.
    also:         what has to be dropped besides the kind's own flag.
    """

    kind: str
    architecture: str
    config: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)
    saving: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    also: tuple[str, ...] = ()

    @property
    def of(self) -> Kind:
        """The kind of the row."""
        return KINDS[self.kind]

    @property
    def drop(self) -> list[str]:
        """What ``--drop`` needs to leave out all but the factors."""
        return [self.of.flag, *self.also] if self.of.flag else []


PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
"""The fields of every row that it does not set itself."""

QV = ["q_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LONG = "|".join(
    rf"model\.layers\.0\.self_attn\.{name}_proj_of_a_branch_that_is_not_there" for name in "abcdefgh"
)
SEQUENCE, TOKEN, QUESTION = "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"


def linear(architecture: str, **config: Any) -> Row:
    """A plain adapter of all linear layers."""
    return Row("plain", architecture, {"target_modules": "all-linear"} | config)


ROWS: dict[str, Row] = {
    # Every architecture, all of its linear layers.
    "Llama, all linear layers": linear("Llama"),
    "Qwen3, all linear layers": linear("Qwen3"),
    "Gemma 3 text, all linear layers": linear("Gemma 3 text"),
    "Gemma 3, text and vision": linear("Gemma 3"),
    "Gemma 3, text alone": Row("plain", "Gemma 3", {"target_modules": r".*language_model.*\.(q|v)_proj"}),
    "Mistral, all linear layers": linear("Mistral"),
    "Phi-3, fused projections": linear("Phi-3"),
    "GPT-2, all linear layers": Row(
        "transposed", "GPT-2", {"target_modules": "all-linear", "fan_in_fan_out": True}
    ),
    "GPT-2, some layers": Row("transposed", "GPT-2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "BERT, features": linear("BERT", task_type="FEATURE_EXTRACTION"),
    "T5, all linear layers": linear("T5", task_type=None),
    "T5, a few": Row("plain", "T5", {"target_modules": ["q", "v", "wi"], "task_type": None}),
    "Whisper, all linear layers": linear("Whisper", task_type=None),
    "Whisper, cross-attention": Row(
        "plain", "Whisper", {"target_modules": r".*encoder_attn\.(k|v)_proj", "task_type": None}
    ),
    "ViT, attention": Row("plain", "ViT", {"target_modules": QV, "task_type": None}),
    "ViT, the classifier's factors too": linear("ViT", task_type=None),
    # Ranks and scalings.
    "rank 1": linear("Llama", r=1, lora_alpha=32),
    "rank of a whole module": Row("plain", "Llama", {"target_modules": QV, "r": 16, "lora_alpha": 16}),
    "alpha that is no multiple": linear("Qwen3", r=3, lora_alpha=7),
    "rsLoRA": Row("rslora", "Llama", {"target_modules": QV, "use_rslora": True, "r": 5}),
    "rsLoRA of T5": Row(
        "rslora", "T5", {"target_modules": ["q", "o"], "use_rslora": True, "task_type": None}
    ),
    "ranks by suffix": Row("patterns", "Llama", {"target_modules": QV, "rank_pattern": {"q_proj": 2}}),
    "alphas by suffix": Row(
        "patterns", "Mistral", {"target_modules": QV, "alpha_pattern": {"layers.1.self_attn.v_proj": 16}}
    ),
    "both patterns, by regular expressions, and rsLoRA": Row(
        "rslora",
        "Qwen3",
        {
            "target_modules": [*QV, "down_proj"],
            "rank_pattern": {r"^model\.layers\.0\..*v_proj": 7, "v_proj": 3, r"(down|up)_proj": 2},
            "alpha_pattern": {r"layers\.\d\.mlp\.down_proj": 1, "q_proj": 9},
            "use_rslora": True,
        },
    ),
    "a pattern of 500 characters": Row(
        "patterns", "Llama", {"target_modules": QV, "rank_pattern": {f"({LONG}|.*q_proj)": 2}}
    ),
    "a pattern for every module": Row(
        "patterns",
        "Whisper",
        {
            "target_modules": ["q_proj"],
            "task_type": None,
            "rank_pattern": {
                rf"model\.{side}\.layers\.{i}\.self_attn\.q_proj": 2 + i
                for side in ("encoder", "decoder")
                for i in range(2)
            },
        },
    ),
    # Which modules.
    "modules by a regular expression": Row("plain", "Llama", {"target_modules": r".*\.1\..*(q|down)_proj"}),
    "modules left out": linear("Llama", exclude_modules=["k_proj", "gate_proj"]),
    "modules left out by a regular expression": linear("Qwen3", exclude_modules=r".*layers\.0.*"),
    "one layer": Row("layers", "Llama", {"target_modules": QV, "layers_to_transform": 1}),
    "layers of a named list": Row(
        "layers",
        "GPT-2",
        {
            "target_modules": ["c_attn"],
            "layers_to_transform": [0],
            "layers_pattern": "h",
            "fan_in_fan_out": True,
        },
    ),
    "dropout": linear("Llama", lora_dropout=0.1),
    "no task": Row("plain", "Llama", {"target_modules": QV, "task_type": None}),
    # Precision.
    "bfloat16": Row("plain", "Llama", {"target_modules": QV}, dtype="bfloat16"),
    "float16": Row("plain", "Qwen3", {"target_modules": QV}, dtype="float16"),
    # Initialisations.
    "default initialisation": Row(
        "initialisation", "Llama", {"target_modules": QV, "init_lora_weights": True}
    ),
    "gaussian": Row("initialisation", "Llama", {"target_modules": QV, "init_lora_weights": "gaussian"}),
    "orthogonal": Row("initialisation", "Llama", {"target_modules": QV, "init_lora_weights": "orthogonal"}),
    "eva": Row("initialisation", "Llama", {"target_modules": QV, "init_lora_weights": "eva"}),
    "mica": Row("initialisation", "Llama", {"target_modules": QV, "init_lora_weights": "mica"}),
    "pissa": Row("changed base", "Llama", {"target_modules": QV, "init_lora_weights": "pissa"}),
    "pissa_niter_4": Row(
        "changed base", "Llama", {"target_modules": QV, "init_lora_weights": "pissa_niter_4"}
    ),
    "olora": Row("changed base", "Llama", {"target_modules": QV, "init_lora_weights": "olora"}),
    "lora_ga": Row(
        "lora_ga",
        "Llama",
        {"target_modules": QV, "init_lora_weights": "lora_ga", "lora_ga_config": {}},
    ),
    "corda": Row("changed base", "Llama", {"target_modules": QV}, written={"init_lora_weights": "corda"}),
    "loftq": Row("changed base", "Llama", {"target_modules": QV}, written={"init_lora_weights": "loftq"}),
    "an initialisation of another library": Row(
        "unknown initialisation", "Llama", {"target_modules": QV}, written={"init_lora_weights": "lora-ga"}
    ),
    # Embeddings and heads as factors.
    "embedding": Row("embedding", "Llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head": Row("embedding", "Qwen3", {"target_modules": ["embed_tokens", "lm_head"]}),
    "embedding without its copy": Row(
        "embedding",
        "Llama",
        {"target_modules": ["embed_tokens", "q_proj"]},
        saving={"save_embedding_layers": False},
    ),
    "tied embedding": Row(
        "embedding", "Llama", {"target_modules": ["embed_tokens"]}, model={"tie_word_embeddings": True}
    ),
    "tied embedding, tied factors": Row(
        "tied",
        "Llama",
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        model={"tie_word_embeddings": True},
    ),
    "embedding of GPT-2": Row("embedding", "GPT-2", {"target_modules": ["wte", "c_attn"]}),
    "embedding of T5": Row("embedding", "T5", {"target_modules": ["shared", "q"], "task_type": None}),
    # Experts.
    "Mixtral, fused experts": Row(
        "experts", "Mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}
    ),
    "Qwen3-MoE, fused experts": Row(
        "experts", "Qwen3-MoE", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}
    ),
    "Qwen3-MoE, one of two parameters": Row(
        "experts", "Qwen3-MoE", {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}
    ),
    "Qwen3-MoE, experts alone, rsLoRA": Row(
        "experts", "Qwen3-MoE", {"target_modules": [], "target_parameters": EXPERTS, "use_rslora": True}
    ),
    "Mixtral, all linear layers": Row("experts", "Mixtral", {"target_modules": "all-linear"}),
    "Qwen3-MoE, all linear layers": Row("experts", "Qwen3-MoE", {"target_modules": "all-linear"}),
    "Qwen3-MoE, old names of projections": Row(
        "experts", "Qwen3-MoE", {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
    ),
    "Mixtral, attention": Row("plain", "Mixtral", {"target_modules": QV}),
    "Qwen3-MoE, attention": Row("plain", "Qwen3-MoE", {"target_modules": QV}),
    # Heads that are trained whole.
    "Llama, classifier of sequences": Row(
        "head", "Llama", {"target_modules": QV, "task_type": "SEQ_CLS"}, model={"head": SEQUENCE}
    ),
    "Qwen3, classifier of tokens": Row(
        "head", "Qwen3", {"target_modules": QV, "task_type": "TOKEN_CLS"}, model={"head": TOKEN}
    ),
    "BERT, classifier of sequences": Row(
        "head", "BERT", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    ),
    "BERT, questions and answers": Row(
        "head",
        "BERT",
        {"target_modules": ["query"], "task_type": "QUESTION_ANS"},
        model={"head": QUESTION},
    ),
    "ViT, classifier": Row(
        "head", "ViT", {"target_modules": QV, "task_type": None, "modules_to_save": ["classifier"]}
    ),
    "Llama, head": Row("head", "Llama", {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    # Embeddings that are trained or saved whole.
    "Llama, whole embedding": Row(
        "whole embedding", "Llama", {"target_modules": QV, "modules_to_save": ["embed_tokens"]}
    ),
    "Llama, resized vocabulary": Row(
        "whole embedding",
        "Llama",
        {"target_modules": QV},
        saving={"save_embedding_layers": True},
        also=("heads",),
    ),
    "GPT-2, resized vocabulary": Row(
        "whole embedding",
        "GPT-2",
        {"target_modules": ["c_attn"]},
        saving={"save_embedding_layers": True},
        also=("heads",),
    ),
    # Biases.
    "biases of all, of which there are none": Row("no bias", "Llama", {"target_modules": QV, "bias": "all"}),
    "biases of targets, of which there are none": Row(
        "no bias", "Mistral", {"target_modules": QV, "bias": "lora_only"}
    ),
    "biases of all": Row(
        "bias", "BERT", {"target_modules": ["query"], "bias": "all", "task_type": "FEATURE_EXTRACTION"}
    ),
    "biases of targets": Row(
        "bias", "Whisper", {"target_modules": ["q_proj"], "bias": "lora_only", "task_type": None}
    ),
    "a bias of B": Row("lora_bias", "Llama", {"target_modules": QV, "lora_bias": True}),
    # Tokens.
    "trained tokens": Row("tokens", "Llama", {"target_modules": QV, "trainable_token_indices": [1, 5]}),
    "trained tokens, tied": Row(
        "tokens",
        "Qwen3",
        {"target_modules": QV, "trainable_token_indices": [2], "ensure_weight_tying": True},
        model={"tie_word_embeddings": True},
    ),
    # Variants.
    "VeLoRA": Row("training only", "Llama", {"target_modules": QV, "velora_config": {"num_groups": 4}}),
    "MonteCLoRA": Row(
        "training only",
        "Llama",
        {"target_modules": QV, "monteclora_config": {"num_samples": 2, "buffer_size": 3}},
    ),
    "DoRA": Row("dora", "Llama", {"target_modules": QV, "use_dora": True}),
    "DoRA of an embedding": Row("dora", "Llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "KaSA": Row("kasa", "Llama", {"target_modules": QV, "kasa_config": {}}),
    "block-diagonal": Row(
        "bdlora",
        "Llama",
        {"target_modules": ["q_proj"], "use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}},
    ),
    "QALoRA": Row("qalora", "Llama", {"target_modules": QV}, written={"use_qalora": True}),
    "aLoRA": Row("alora", "Llama", {"target_modules": QV, "alora_invocation_tokens": [3, 4]}),
    "aLoRA of IBM's first format": Row(
        "alora string", "Llama", {"target_modules": QV}, written={"invocation_string": "<|start|>"}
    ),
    "replicated layers": Row(
        "replication", "Llama", {"target_modules": QV, "layer_replication": [[0, 2], [1, 2]]}
    ),
    "Arrow": Row("arrow", "Llama", {"target_modules": QV}, written={"arrow_config": {"top_k": 2}}),
    "Megatron": Row(
        "megatron", "Llama", {"target_modules": QV}, written={"megatron_config": {"hidden_size": 16}}
    ),
}
"""By name, what PEFT builds."""
