"""What the tensors of an adapter are besides factors, and which words of ``--drop`` leave them out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch

from merged_lora.errors import AdapterError, listed

from .keys import Key

TOKEN_HEADS = ("lm_head", "embed_out", "output_layer", "output_projection", "proj_out")
"""Last parts of the names of output heads with a row for each token."""
HEADS = (
    *TOKEN_HEADS,
    *("score", "classifier", "pre_classifier", "classification_head", "qa_outputs", "cls", "v_head"),
)
"""Last parts of the names of output heads, in transformers, in models with code of their own and in TRL."""
EMBEDDINGS = (
    *("embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "token_type_embeddings"),
    *("embed_positions", "embed_in", "tok_embeddings", "shared", "embeddings"),
)
"""Last parts of the names of embeddings in transformers."""

KINDS: Mapping[str, str] = {
    "heads": "whole output heads",
    "embeddings": "whole embeddings",
    "modules_to_save": "whole modules of any kind, heads and embeddings too",
    "biases": "biases of the base model's modules",
    "lora_bias": "biases of the factors B",
    "tokens": "trained rows of embeddings",
    "target_parameters": "factors of parameters, such as experts",
    "base_copies": "copies of the base model's own tensors, which are compared between sources",
}
"""What can be left out without changing the meaning of the rest, by the word that says so."""
CARRIED = ("heads", "embeddings", "modules_to_save")
"""Kinds of whole tensors that a result can take over from one source."""

_TRAINING = ("lora_velora_embed", "lora_monteclora_sampler")
"""Parts of names of buffers that serve training alone."""
_TOKENS = ("trainable_tokens_delta", "trainable_tokens_original")


@dataclass
class Parts:
    """The tensors of an adapter besides factors, sorted out.

    whole:   those that the result may take over, by the name of their module, and by their own.
    copies:  digests of the copies of base tensors, by name.
    used:    words of the choice that had an effect.
    refused: what the choice does not cover, with the word that would leave it out; None if nothing would.
    """

    whole: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    refused: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What to do with the parts of an adapter that no merge supports.

    drop: kinds and names of modules, also as patterns, that are left out.
    take: kinds of whole tensors that are kept as they are.
    rename: new beginnings of module names, by those that they replace.
    """

    drop: frozenset[str] = frozenset()
    take: frozenset[str] = frozenset()
    rename: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, drop: Iterable[str], take: Iterable[str], rename: Mapping[str, str] | None) -> Choice:
        """The choice, checked; raises AdapterError."""
        rename = {} if rename is None else rename
        if not isinstance(rename, Mapping):
            raise AdapterError(f"rename must be a mapping, not {type(rename).__name__}")
        made = cls(_words("drop", drop), _words("take", take), dict(rename))
        for each in (*made.rename, *made.rename.values()):
            if not isinstance(each, str):
                raise AdapterError(f"rename must hold text alone, got {each!r}")
        for kind in sorted(made.take - set(CARRIED)):
            raise AdapterError(f"cannot take {kind!r} from a source; it can be one of {', '.join(CARRIED)}")
        for word in made.drop:
            if not re.fullmatch(r"[\w.*?\[\]-]{1,256}", word):
                raise AdapterError(
                    f"cannot drop {word[:64]!r}; it can be one of {', '.join(KINDS)}, or the name of a "
                    "module that was saved whole"
                )
        return made


def _words(what: str, given: Iterable[str]) -> frozenset[str]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise AdapterError(f"{what} must be a list of words, not {type(given).__name__}")
    words = list(given)
    for word in words:
        if not isinstance(word, str):
            raise AdapterError(f"{what} must be a list of words, got {word!r} in it")
    return frozenset(words)


def sort_out(
    others: Mapping[Key, torch.Tensor], announced: Collection[str], biased: bool, choice: Choice
) -> Parts:
    """The tensors besides factors, by what is to be done with them.

    others:    those tensors.
    announced: the names in ``modules_to_save``.
    biased:    whether biases were trained; otherwise those that PEFT saved are the base model's.
    choice:    what to do with which kind.
    """
    parts = Parts()
    for key, tensor in others.items():
        name = f"{key.module}.{key.role}" if key.module else key.role
        if any(f".{buffer}." in f".{name}." for buffer in _TRAINING):
            continue
        if key.module.endswith(".base_layer") and key.role in ("weight", *(() if biased else ("bias",))):
            if "base_copies" in choice.drop:
                parts.used.add("base_copies")
            else:
                parts.copies[name] = _digest(tensor)
            continue
        kind, module = _kind(key, announced)
        if biased and key.role == "bias" and replace(key, role="weight") not in others:
            kind, module = "biases", key.module  # of a head or an embedding too
        words: set[str | None] = {kind, "modules_to_save"} if kind in CARRIED else {kind}
        taking = {word for word in choice.take if word in words}
        dropping = {word for word in choice.drop if word in words or _is_named(word, key)}
        if taking and dropping:
            raise AdapterError(
                f"{name} is to be both taken ({listed(sorted(taking))}) and dropped "
                f"({listed(sorted(dropping))})"
            )
        if taking:
            parts.used |= taking
            parts.whole.setdefault(module, {})[name] = tensor
        elif dropping:
            parts.used |= dropping
        else:
            parts.refused[name] = kind or (module or None)
    return parts


def _kind(key: Key, announced: Iterable[str]) -> tuple[str | None, str]:
    """The kind of a tensor, None if it has none, and the name of the module that was saved as a whole.

    The name is empty for what cannot be left out.
    """
    if key.role in ("lora_A.bias", "lora_B.bias"):
        return "lora_bias", key.module
    if any(part in f"{key.module}.{key.role}" for part in _TOKENS):
        return "tokens", key.module
    if "lora_" in f"{key.module}.{key.role}" or key.role not in ("weight", "bias"):
        return None, ""
    path = key.module.split(".")
    for kind, known in (("heads", HEADS), ("embeddings", EMBEDDINGS)):
        for part in path:
            if part in known:
                return kind, part
    for name in announced:
        if f".{name}." in f".{key.module}.":
            return "modules_to_save", name
    return ("biases" if key.role == "bias" else None), path[-1]


def _is_named(word: str, key: Key) -> bool:
    """Whether a word is a whole module's name, or a pattern of it: all of it, or its end from a dot on."""
    if word in KINDS or "lora_" in f"{key.module}.{key.role}":
        return False
    return fnmatchcase(key.module, word) or fnmatchcase(key.module, f"*.{word}")


def _digest(tensor: torch.Tensor) -> str:
    """A digest of a tensor's values, the same for copies of one tensor in several dtypes."""
    if tensor.is_floating_point():
        tensor = tensor.to(torch.bfloat16)  # a copy in a larger dtype rounds to the same
    content = tensor.contiguous().view(torch.uint8).numpy().data
    return hashlib.blake2b(f"{tuple(tensor.shape)}".encode() + content, digest_size=16).hexdigest()
