"""Examples as token ids, for training and for judging alike.

Knows of a tokenizer and its chat template, nothing of models and adapters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smollm2 import STOP_TOKEN, chat_text
from tasks import Example, Task


@dataclass(frozen=True)
class Encoded:
    """An example as token ids, of which the last `answer` are the right answer and its stop token."""

    ids: list[int]
    answer: int


def encode(tokenizer: PreTrainedTokenizerBase, task: Task, chosen: Sequence[Example]) -> list[Encoded]:
    """The token ids of examples of `task`, prompts in the chat template unless the task is plain text."""
    texts = [chat_text(tokenizer, e.prompt) if task.chat else e.prompt for e in chosen]
    prompts = tokenizer(texts)["input_ids"]
    answers = tokenizer([e.answer + STOP_TOKEN for e in chosen])["input_ids"]
    pairs = zip(prompts, answers, strict=True)
    return [Encoded(prompt + answer, len(answer)) for prompt, answer in pairs]


@dataclass(frozen=True)
class Packed:
    """Several examples in one row, of which the beginning that their prompts share is there only once.

    inputs: keywords for the model, which then gives logits `[1, answer tokens, vocabulary]`: `input_ids` and
            `position_ids` `[1, length]`, the attention mask `[1, 1, length, length]`, under which an example
            sees itself and the shared beginning, and the positions whose logits predict answers.
    labels: the tokens of all answers, one answer after the other, int64 `[answer tokens]`.
    """

    inputs: dict[str, Tensor]
    labels: Tensor

    def to(self, device: torch.device) -> "Packed":
        """The same on another device."""
        return Packed({name: value.to(device) for name, value in self.inputs.items()}, self.labels.to(device))


def packed(batch: Sequence[Encoded]) -> Packed:
    """Examples in one row."""
    # Without the last token of a prompt: it predicts the answer, and is not shared.
    prompts = [example.ids[: -example.answer - 1] for example in batch]
    pairs = zip(min(prompts), max(prompts), strict=False)  # what these two share, all share
    shared = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    ids, positions, owners = list(shared), list(range(len(shared))), [0] * len(shared)
    kept: list[int] = []
    for owner, example in enumerate(batch, 1):
        ids += example.ids[len(shared) :]
        positions += range(len(shared), len(example.ids))
        owners += [owner] * (len(example.ids) - len(shared))
        kept += range(len(ids) - example.answer - 1, len(ids) - 1)
    row, order, owner_of = torch.tensor([ids]), torch.arange(len(ids)), torch.tensor(owners)
    seen = (owner_of == 0) | (owner_of == owner_of[:, None])
    inputs = {
        "input_ids": row,
        "position_ids": torch.tensor([positions]),
        "attention_mask": (seen & (order <= order[:, None]))[None, None],
        "logits_to_keep": torch.tensor(kept),
    }
    return Packed(inputs, row[0, torch.tensor(kept) + 1])
