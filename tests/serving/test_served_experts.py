"""Merges of experts on a server that computes experts in plain torch; see ``plain_experts.py``."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import tiny
from merged_lora.adapters import Adapter
from merged_lora.engine import merge
from merged_lora.factors import Factors
from tiny import FLAGS, HEADS, HIDDEN, KV_HEADS, LAYERS, MAX_RANK, VOCABULARY, importing_tests
from vllm_server import Server

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("other engines")]

EXPERTS, INNER = 4, 32
SPEC = "ties(apart, other, attention, density=0.5)"
PROMPT = [5, 11, 40, 90, 17]


@dataclass(frozen=True)
class Served:
    """A server, and the folders of its model and of its adapters."""

    server: Server
    model: Path
    adapters: dict[str, Path]


def trained(model: Any, folder: Path, seed: int, **config: Any) -> Path:
    """An adapter that PEFT wrote, with normal entries."""
    made: Any = get_peft_model(
        copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **config)
    )
    torch.manual_seed(seed)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    made.save_pretrained(folder)
    return folder


def apart(adapter: Adapter) -> Adapter:
    """The same deltas with the modules of each expert by themselves, as adapters had them before."""
    found: dict[str, Factors] = {}
    for name, factors in adapter.modules.items():
        parameter, _, expert = name.removesuffix("]").partition("[")
        holder = f"{parameter.rpartition('.')[0]}.{expert}"
        if name.endswith("gate_up_proj" + f"[{expert}]"):
            found[f"{holder}.gate_proj"] = replace(factors, b=factors.b[:INNER].contiguous())
            found[f"{holder}.up_proj"] = replace(factors, b=factors.b[INNER:].contiguous())
        else:
            found[f"{holder}.down_proj" if expert else name] = factors
    return Adapter(found, adapter.header)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("experts")
    plain = tiny.make_model(root / "plain")
    make: Any = Qwen3MoeConfig
    config = make(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=160,
        moe_intermediate_size=INNER,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=256,
        eos_token_id=VOCABULARY - 1,
        bos_token_id=VOCABULARY - 2,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    make_model: Any = Qwen3MoeForCausalLM
    model = make_model(config)
    model.save_pretrained(root / "model")
    for file in plain.glob("tokenizer*"):
        shutil.copy(file, root / "model")
    (root / "sources").mkdir()
    parameters = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    adapters = {
        "whole": trained(model, root / "sources" / "whole", 1, **parameters),
        "attention": trained(model, root / "attention", 2, target_modules=["q_proj", "o_proj"]),
    }
    second = trained(model, root / "second", 3, **parameters)
    for name, folder in (("apart", adapters["whole"]), ("other", second)):
        apart(Adapter.load(folder)).save(root / name)
        adapters[name] = root / name
    merge(SPEC, adapters, rank=MAX_RANK).save(root / "twin")
    adapters["twin"] = root / "twin"
    modules = (f"{name}={folder}" for name, folder in adapters.items() if name != "whole")
    with Server(
        root / "model",
        *(*FLAGS, "--enable-merged-lora", "--max-lora-rank", str(MAX_RANK)),
        *("--lora-modules", *modules, "--merged-lora-source-dir", str(root / "sources")),
        *("--worker-extension-cls", "plain_experts.PlainExperts"),
        log=root / "server.log",
        environment=importing_tests(),
    ) as running:
        yield Served(running, root / "model", adapters)


def test_a_merge_of_experts_is_served_with_the_values_of_its_offline_twin(served: Served) -> None:
    assert served.server.logprobs(SPEC) == served.server.logprobs("twin")
    assert served.server.logprobs(SPEC) != served.server.logprobs("apart")


@pytest.mark.parametrize(
    ("spec", "folder"), [("sum(whole)", "whole"), ("apart", "whole"), ("sum(attention)", "attention")]
)
def test_what_is_served_is_what_peft_computes(served: Served, spec: str, folder: str) -> None:
    exchange, likelihood = served.server.exchange(spec, PROMPT)
    make: Any = Qwen3MoeForCausalLM
    model: Any = PeftModel.from_pretrained(make.from_pretrained(served.model), served.adapters[folder])
    tokens = torch.tensor([[*exchange.prompt, *exchange.answer]])
    with torch.no_grad():
        logprobs = model(tokens).logits[0].log_softmax(-1)
    rows = range(len(PROMPT) - 1, tokens.shape[1] - 1)
    expected = [float(logprobs[row, tokens[0, row + 1]]) for row in rows]
    assert likelihood == pytest.approx(expected, abs=1e-4)


def test_an_adapter_of_attention_alone_merges_with_one_of_experts(served: Served) -> None:
    both = served.server.logprobs("sum(whole, attention)")
    assert both != served.server.logprobs("sum(whole)")
    assert both == pytest.approx(served.server.logprobs("cat(whole, attention)"), abs=1e-4)
