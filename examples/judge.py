"""Judges adapters by teacher-forced exact match, which needs no generation.

An answer counts if greedy decoding would give it, token for token with the stop token after it. That is
read off one pass over prompt and right answer instead of generating: the first token at which the model
would say something else makes the answer wrong, whatever would follow.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from encoding import Encoded, encode, packed
from merged_lora.adapters import Adapter
from tasks import Example, Task

BATCH_SIZE = 12


@dataclass(frozen=True)
class Verdict:
    """The share of right answers, 0 to 1, and the mean negative log-likelihood of an answer's token, in nats.

    Every token of all answers counts alike, the stop tokens included.
    """

    right: float
    nll: float


class Judge:
    """The base model, which takes on one adapter after the other."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._weights = dict(model.named_parameters())
        self._base = {
            name: weight.detach().clone() for name, weight in self._weights.items() if "_proj" in name
        }

    def encode(self, task: Task, chosen: Sequence[Example]) -> list[Encoded]:
        """The token ids of examples of `task`."""
        return encode(self._tokenizer, task, chosen)

    @torch.inference_mode()
    def take_on(self, adapter: Adapter | None) -> None:
        """Adds an adapter to the float32 weights of the base model, in place of the one before."""
        for name, weight in self._base.items():
            target = self._weights[name]
            target.copy_(weight)
            factors = adapter.modules.get(name.removesuffix(".weight")) if adapter else None
            if factors is not None:
                target.add_(factors.scaling * (factors.b.float() @ factors.a.float()))

    @torch.inference_mode()
    def judge(self, encoded: Sequence[Encoded]) -> Verdict:
        """How well the model with its adapter answers the examples."""
        right, nll = 0, 0.0
        for batch in _batches(encoded):
            together = packed(batch).to(self._model.device)
            logits = self._model(**together.inputs).logits[0]
            nll += float(cross_entropy(logits, together.labels, reduction="sum"))
            said = logits.argmax(-1) == together.labels
            right += sum(bool(answer.all()) for answer in said.split([e.answer for e in batch]))
        return Verdict(right / len(encoded), nll / sum(example.answer for example in encoded))

    @torch.inference_mode()
    def text_nll(self, text: str) -> float:
        """The mean negative log-likelihood of the tokens of a plain text after its first, in nats."""
        ids = torch.tensor([self._tokenizer(text)["input_ids"]], device=self._model.device)
        logits = self._model(input_ids=ids).logits
        return float(cross_entropy(logits[0, :-1], ids[0, 1:]))


def _batches(encoded: Sequence[Encoded]) -> Iterator[Sequence[Encoded]]:
    for first in range(0, len(encoded), BATCH_SIZE):
        yield encoded[first : first + BATCH_SIZE]
