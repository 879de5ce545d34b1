"""The kinds of adapters, what is to become of each, and what others do with it.

The columns of PEFT and vLLM on the page follow from runs, see ``readers.py``.  What LoRAX and mergekit do was
read in their sources, to which the page has links.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["merged", "carried over", "dropped on request", "refused"]

NOT_CHECKED = "not checked"


@dataclass(frozen=True)
class Kind:
    """A kind of adapters.

    title:    its name on the page.
    outcome:  what becomes of it.
    why:      a sentence for the page.
    flag:     what ``--drop`` takes to leave it out, and ``--take`` to carry it over.
    reason:   a part of the message with which it is refused.
    lorax:    what LoRAX does with it.
    mergekit: what mergekit does with it.
    peft:     what PEFT does with it, if that is more than what was recorded.
    vllm:     what vLLM does with it, likewise.
    """

    title: str
    outcome: Outcome
    why: str
    flag: str | None = None
    reason: str | None = None
    lorax: str = NOT_CHECKED
    mergekit: str = NOT_CHECKED
    peft: str | None = None
    vllm: str | None = None


FACTORS = "merges `A` and `B` each on its own, if all `r` are equal, at the scaling of the first adapter"
UNREAD = "does not read the field, and merges"
SILENT = "leaves them out without a word"
THROUGH_PEFT = "what PEFT does"

KINDS: dict[str, Kind] = {
    "plain": Kind(
        "plain LoRA: any `r`, `lora_alpha`, `target_modules`, `exclude_modules`, `lora_dropout`, dtype",
        "merged",
        "The deltas are exact up to one rounding.",
        lorax=FACTORS,
    ),
    "rslora": Kind(
        "`use_rslora`",
        "merged",
        "The scaling is `lora_alpha / sqrt(r)`.",
        lorax=f"reads the field; {FACTORS}",
    ),
    "patterns": Kind(
        "`rank_pattern`, `alpha_pattern`",
        "merged",
        "A module has the rank and the scaling that PEFT gives it, for patterns of any length.",
        lorax="reads neither: these modules get the scaling of `r` and `lora_alpha`",
    ),
    "layers": Kind(
        "`layers_to_transform`, `layers_pattern`",
        "merged",
        "The tensors in the file say which layers there are.",
        lorax="leaves out a kind of module that any layer lacks",
    ),
    "transposed": Kind("`fan_in_fan_out` (GPT-2)", "merged", "The field is written into the result."),
    "initialisation": Kind(
        "`init_lora_weights`: true, false, `gaussian`, `eva`, `orthogonal`, `mica`",
        "merged",
        "These leave the base model as it was.",
        lorax=UNREAD,
    ),
    "embedding": Kind(
        "factors of an embedding or a head, with or without a copy of the base weight",
        "merged",
        "A copy (`base_layer.weight`) is not written. Copies that differ between sources are refused.",
        lorax="leaves out factors of embeddings without a word, and merges those of `lm_head`",
    ),
    "tied": Kind(
        "factors of a tied embedding and head (`ensure_weight_tying`)",
        "merged",
        "As two modules with equal factors.",
        lorax="leaves out factors of embeddings without a word, and merges those of `lm_head`",
    ),
    "experts": Kind(
        "fused experts (`target_parameters`)",
        "merged",
        "Expert by expert, and written in PEFT's fused form.",
        lorax=SILENT,
        vllm="reads it; Mixtral's by a name (`mlp.experts`) that no module of its class has",
    ),
    "no bias": Kind(
        "`bias` is `all` or `lora_only`, and the file holds none",
        "merged",
        "The base model has no biases, and nothing is lost.",
        lorax=UNREAD,
    ),
    "training only": Kind(
        "VeLoRA, MonteCLoRA",
        "merged",
        "They differ from LoRA in training alone. What only training needs is left out.",
        lorax=UNREAD,
        peft="reads it; adds up the factors",
    ),
    "head": Kind(
        "heads that are trained whole (`modules_to_save`; classifiers by `task_type`)",
        "carried over",
        "`--take heads=NAME` takes those of one source as they are, `--drop heads` leaves them out.",
        flag="heads",
        lorax=SILENT,
        vllm="reads it and the heads `score` and `classifier`; refuses others",
    ),
    "whole embedding": Kind(
        "embeddings that are saved whole (`modules_to_save`, `save_embedding_layers`, a resized vocabulary)",
        "dropped on request",
        "Whole matrices are no deltas.",
        flag="embeddings",
        lorax=SILENT,
        peft="reads it; does not add up with `modules_to_save`, and adds up the factors otherwise",
    ),
    "bias": Kind(
        "biases of the base model (`bias`)",
        "dropped on request",
        "They are values, not deltas, and vLLM serves no adapter with biases.",
        flag="biases",
        lorax=SILENT,
    ),
    "lora_bias": Kind(
        "a bias of `B` (`lora_bias`)",
        "dropped on request",
        "vLLM serves no adapter with biases.",
        flag="lora_bias",
        lorax=SILENT,
    ),
    "tokens": Kind(
        "trained tokens (`trainable_token_indices`)",
        "dropped on request",
        "They are rows of the embedding, not factors.",
        flag="tokens",
        lorax=SILENT,
    ),
    "changed base": Kind(
        "`init_lora_weights`: `pissa`, `pissa_niter_N`, `olora`, `corda`, `loftq`",
        "refused",
        "They changed the base model, and the deltas are not those from the original one. "
        "PEFT converts such an adapter (`path_initial_model_for_weight_conversion`).",
        reason="init_lora_weights",
        lorax=UNREAD,
        peft="reads `pissa` and `olora`, changes the base as in training, and adds up; refuses `corda` "
        "without its data; `loftq` was not checked",
        mergekit=THROUGH_PEFT,
    ),
    "lora_ga": Kind(
        "`init_lora_weights`: `lora_ga`",
        "refused",
        "It changed the base model in training, and PEFT and vLLM do not change it when they load.",
        reason="init_lora_weights",
        lorax=UNREAD,
    ),
    "unknown initialisation": Kind(
        "`init_lora_weights`: any other value",
        "refused",
        "It may have changed the base model.",
        reason="init_lora_weights",
        lorax=UNREAD,
    ),
    "dora": Kind(
        "DoRA (`use_dora`)",
        "refused",
        "The delta depends on the base weights.",
        reason="use_dora",
        lorax="leaves out the magnitudes without a word, and merges the factors",
    ),
    "kasa": Kind(
        "KaSA (`kasa_config`)",
        "refused",
        "It truncates the base weights.",
        reason="kasa_config",
        lorax="leaves out the diagonal without a word, and merges the factors",
    ),
    "bdlora": Kind(
        "block-diagonal LoRA (`use_bdlora`)",
        "refused",
        "One factor is stored as blocks.",
        reason="use_bdlora",
        peft="reads it; adding up was not checked",
    ),
    "qalora": Kind(
        "QALoRA (`use_qalora`)",
        "refused",
        "`A` acts on pooled inputs.",
        reason="use_qalora",
        peft="without GPTQ, reads it as plain LoRA; with it, not checked",
    ),
    "alora": Kind(
        "activated LoRA (`alora_invocation_tokens`)",
        "refused",
        "It acts from its invocation on. A merge would act on all tokens.",
        reason="alora_invocation_tokens",
        lorax=UNREAD,
    ),
    "alora string": Kind(
        "activated LoRA of the first format (`invocation_string`)",
        "refused",
        "It acts from its invocation on, too.",
        reason="invocation_string",
        peft="reads it as plain LoRA; adds up",
        lorax=UNREAD,
    ),
    "replication": Kind(
        "`layer_replication`",
        "refused",
        "It is an adapter of a model with more layers.",
        reason="layer_replication",
        lorax="leaves out the factors of layers that the model lacks, without a word",
    ),
    "arrow": Kind(
        "Arrow (`arrow_config`)",
        "refused",
        "It routes between adapters at run time.",
        reason="arrow_config",
        lorax=UNREAD,
    ),
    "megatron": Kind(
        "Megatron (`megatron_config`)",
        "refused",
        "Factors of parallel layers may be parts.",
        reason="megatron_config",
        lorax=UNREAD,
    ),
}
"""By name, the kinds that PEFT builds."""

ODD_KINDS: dict[str, Kind] = {
    "extracted": Kind(
        "extracted by mergekit (`mergekit-extract-lora`)",
        "dropped on request",
        "`--drop modules_to_save` leaves out norms. With `--skip-undecomposable` it has none, and is merged.",
        flag="modules_to_save",
        lorax=SILENT,
        mergekit="writes it",
    ),
    "wrapped": Kind(
        "names with what a wrapper added (`_orig_mod.`, `module.`)",
        "merged",
        "They are the names of the modules without it.",
        lorax=SILENT,
        mergekit=THROUGH_PEFT,
        peft="warns that keys are missing, and reads nothing",
        vllm="reads it by names that no module has",
    ),
    "named": Kind(
        "names with the adapter's own (`lora_A.default.weight`)",
        "merged",
        "They are the names without it.",
        lorax=SILENT,
        mergekit=THROUGH_PEFT,
    ),
    "shards": Kind(
        "shards that transformers wrote (`model.safetensors.index.json`)",
        "merged",
        "All shards that the index names are read.",
        lorax="reads all `.safetensors` files in the folder",
        mergekit=THROUGH_PEFT,
    ),
    "pickled": Kind(
        "pickled weights (`adapter_model.bin`)",
        "merged",
        "With `--allow-pickle` alone, by a loader that runs no code.",
        lorax="converts them to safetensors when it downloads them",
        mergekit=THROUGH_PEFT,
    ),
    "mlx": Kind(
        "mlx-lm (`adapters.safetensors`)", "merged", "The factors are transposed, `scale` is a factor."
    ),
    "byte order mark": Kind(
        "a byte order mark in `adapter_config.json`", "merged", "It is skipped.", mergekit=THROUGH_PEFT
    ),
    "deeper": Kind("an adapter one folder deeper", "merged", "If it is the only one.", mergekit=THROUGH_PEFT),
    "file": Kind("the weights file, not its folder", "merged", "Its folder is read.", mergekit=THROUGH_PEFT),
    "pointer": Kind(
        "a pointer of git-lfs instead of the weights",
        "refused",
        "The message says that the file was not downloaded.",
        reason="git-lfs",
        mergekit=THROUGH_PEFT,
    ),
}
"""By name, what other programs write, and what becomes of files on their way."""
