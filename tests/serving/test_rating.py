"""How an answer is read off vLLM's log-probabilities of a prompt, and what is asked of vLLM for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.exceptions import VLLMValidationError
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from merged_lora.errors import CalibrationError, MergeError
from merged_lora.replay import Replayed
from merged_lora.spec import parse
from merged_lora.vllm_plugin.hooks.api_server import rate
from merged_lora.vllm_plugin.hooks.worker import wrap_add_lora_logits
from merged_lora.vllm_plugin.hooks.wrapping import ATTRIBUTE
from merged_lora.vllm_plugin.identity import MergeIdentity

MERGE = MergeIdentity(parse("ties(a, b)"), ("0" * 32, "1" * 32))


class Engine:
    """An engine that rates every prompt in the same way.

    rows: log-probabilities by token for each token of the prompt.
    config: what differs from a model that generates text.
    """

    def __init__(self, rows: list[dict[int, float] | None], **config: str) -> None:
        self.rows = rows
        self.asked: list[tuple[Any, Any, Any]] = []
        model = {"runner_type": "generate", "logprobs_mode": "raw_logprobs"} | config
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(**model))

    async def generate(
        self, prompt: Any, params: Any, request_id: str, *, lora_request: Any
    ) -> AsyncIterator[Any]:
        self.asked.append((prompt, params, lora_request))
        entries = [
            {token: SimpleNamespace(logprob=value) for token, value in row.items()} if row else None
            for row in self.rows
        ]
        yield SimpleNamespace(prompt_logprobs=entries)


def rated(engine: Engine) -> Replayed:
    """The answer 7, 8 to the prompt 1, 2."""
    return asyncio.run(rate(engine, MERGE, (1, 2), (7, 8)))


@pytest.mark.parametrize(
    ("last", "kept"),
    [
        ({8: -0.25}, True),
        ({8: -1.0, 9: -0.5}, False),
        ({8: -0.5, 9: -0.5}, True),  # a tie: neither is more likely
        ({8: float("nan"), 9: float("nan")}, False),
    ],
)
def test_an_answer_is_kept_while_no_token_is_more_likely(last: dict[int, float], kept: bool) -> None:
    found = rated(Engine([None, {2: -9.0, 5: -0.1}, {7: -0.5}, last]))
    assert (found.kept, found.tokens) == (kept, 2)
    if kept:
        assert found.log_likelihood == -0.5 + last[8]


def test_one_pass_over_the_prompt_is_all_that_is_asked_of_vllm() -> None:
    engine = Engine([None, {2: -9.0}, {7: -0.5}, {8: -0.5}])
    rated(engine)
    ((prompt, params, lora),) = engine.asked
    assert prompt["prompt_token_ids"] == [1, 2, 7, 8]
    assert (params.max_tokens, params.prompt_logprobs, params.detokenize) == (1, 1, False)
    assert (lora.lora_name, lora.lora_path) == (MERGE.name, MERGE.path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"runner_type": "pooling"}, "generates no text"),
        ({"logprobs_mode": "raw_logits"}, "--logprobs-mode raw_logits gives no likelihoods"),
        ({"logprobs_mode": "processed_logits"}, "--logprobs-mode processed_logits gives no likelihoods"),
    ],
)
def test_a_server_that_rates_no_prompts_says_so(config: dict[str, str], words: str) -> None:
    with pytest.raises(MergeError, match=words):
        rated(Engine([], **config))


def test_what_vllm_refuses_is_a_fault_of_the_calibration() -> None:
    class Refusing(Engine):
        async def generate(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
            raise VLLMValidationError("token 9 is out of vocabulary")
            yield

    with pytest.raises(CalibrationError, match=r"vLLM refuses the prompts of a calibration: .*vocabulary"):
        rated(Refusing([]))


# The output heads of a batch, on the CPU


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's operators for a batch of three tokens with the first adapter and four with the second."""
    original = vars(PunicaWrapperCPU)["add_lora_logits"]
    monkeypatch.setattr(PunicaWrapperCPU, "add_lora_logits", wrap_add_lora_logits(original))
    punica = PunicaWrapperCPU(16, 4, "cpu")
    setattr(punica, ATTRIBUTE, True)
    mapping = LoRAMapping((11, 11, 11, 12, 12, 12, 12), (11, 12), is_prefill=True)
    punica.update_metadata(mapping, [11, 12], 2, 8)
    return punica


@pytest.mark.parametrize(
    "rows", [slice(0, 1), slice(0, 2), slice(3, 5), slice(3, 6), slice(1, 4), slice(0, 7)]
)
def test_each_row_of_a_prompt_gets_the_output_head_of_its_own_adapter(batch: Any, rows: slice) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 6, generator=generator)
    a = torch.randn(2, 1, 4, 6, generator=generator)
    b = torch.randn(2, 1, 8, 4, generator=generator)
    logits = torch.zeros(7, 8)[rows]
    batch.add_lora_logits(logits, hidden[rows], a, b, 1.0)
    for row, token in zip(logits, range(7)[rows], strict=True):
        slot = 0 if token < 3 else 1
        torch.testing.assert_close(row, b[slot, 0] @ (a[slot, 0] @ hidden[token]))
    sampled = torch.zeros(2, 8)
    batch.add_lora_logits(sampled, hidden[[2, 6]], a, b, 1.0)
    for row, token, slot in zip(sampled, (2, 6), (0, 1), strict=True):
        torch.testing.assert_close(row, b[slot, 0] @ (a[slot, 0] @ hidden[token]))


def test_without_an_output_head_logits_stay_as_they_are(batch: Any) -> None:
    logits = torch.full((3, 8), 0.5)
    batch.add_lora_logits(logits, torch.ones(7, 6)[3:6], torch.zeros(2, 1, 4, 6), torch.ones(2, 1, 8, 4), 1.0)
    assert logits.eq(0.5).all()
