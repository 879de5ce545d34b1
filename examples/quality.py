"""Exact match per task of the base model, the example adapters and every strategy: the table and the plot.

    python examples/quality.py [--only STRATEGY ...] [--json FILE]

For every strategy the merge of all three adapters is measured twice: as a user gets it who names the adapters
and nothing else, and with the best of a small grid of weights and options. The grid is decided on DEV
examples per task that neither training nor the test has seen; what is reported is measured on TEST others.

An answer counts where greedy decoding would give it, token for token with the stop token after it. That is
read off one pass over prompt and right answer instead of generating: the first token at which the model
would say something else makes the answer wrong, whatever would follow. Merges have at most the rank of the
adapters unless told otherwise, so that a strategy that keeps all ranks has no advantage.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from torch.nn.functional import pad
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from merged_lora.adapters import Adapter
from merged_lora.engine import merge
from merged_lora.strategies import TABLE
from smollm2 import MODEL_DIR, STOP_TOKEN, chat_text, load_model
from tasks import TASKS, TRAIN_SIZE, Example, examples
from train import ADAPTERS_DIR, BATCH_SIZE, STEPS

DEV, TEST = 24, 60
TOKENS = 1536  # of a batch
RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"


@dataclass(frozen=True)
class Encoded:
    """An example as token ids ``[length]``, of which the last ``answer`` are the right answer and its stop."""

    ids: list[int]
    answer: int


class Judge:
    """The base model, which takes on one adapter after the other."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model.eval(), tokenizer
        self._weights = dict(model.named_parameters())
        self._base = {
            name: weight.detach().clone() for name, weight in self._weights.items() if "_proj" in name
        }
        dev_start = STEPS * BATCH_SIZE
        assert dev_start + DEV <= TRAIN_SIZE
        self.sets = {
            "dev": {
                task: self._encode(examples(task, "train", dev_start + DEV)[dev_start:]) for task in TASKS
            },
            "test": {task: self._encode(examples(task, "test", TEST)) for task in TASKS},
        }

    def scores(self, adapter: Adapter | None, split: str) -> dict[str, float]:
        """The share of right answers per task, 0 to 1."""
        self._take_on(adapter)
        return {task: self._score(encoded) for task, encoded in self.sets[split].items()}

    def _encode(self, chosen: Sequence[Example]) -> list[Encoded]:
        prompts = self._tokenizer([chat_text(self._tokenizer, e.prompt) for e in chosen])["input_ids"]
        answers = self._tokenizer([e.answer + STOP_TOKEN for e in chosen])["input_ids"]
        pairs = zip(prompts, answers, strict=True)
        return [Encoded(prompt + answer, len(answer)) for prompt, answer in pairs]

    @torch.inference_mode()
    def _take_on(self, adapter: Adapter | None) -> None:
        for name, weight in self._base.items():
            target = self._weights[name]
            target.copy_(weight)
            factors = adapter.modules.get(name.removesuffix(".weight")) if adapter else None
            if factors is not None:
                target.add_(factors.scaling * (factors.b.float() @ factors.a.float()))

    @torch.inference_mode()
    def _score(self, encoded: Sequence[Encoded]) -> float:
        right = 0
        for batch in _batches(encoded):
            longest = max(len(one.ids) for one in batch)
            ids = torch.stack([pad(torch.tensor(one.ids), (longest - len(one.ids), 0)) for one in batch])
            mask = torch.stack(
                [pad(torch.ones(len(one.ids)), (longest - len(one.ids), 0)) for one in batch]
            ).long()
            answer = max(one.answer for one in batch)
            logits = self._model(input_ids=ids, attention_mask=mask, logits_to_keep=answer + 1).logits
            said = logits[:, :-1].argmax(-1)
            for row, one in enumerate(batch):
                right += bool((said[row, -one.answer :] == ids[row, -one.answer :]).all())
        return right / len(encoded)


def _batches(encoded: Sequence[Encoded]) -> Iterator[list[Encoded]]:
    batch: list[Encoded] = []
    for one in sorted(encoded, key=lambda one: len(one.ids)):
        if batch and len(one.ids) * (len(batch) + 1) > TOKENS:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch
