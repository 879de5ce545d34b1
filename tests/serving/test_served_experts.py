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
from expert_layers import EXPERTS, INNER, sharing
from merged_lora.adapters import Adapter
from merged_lora.calibration import Exchange
from merged_lora.engine import merge
from merged_lora.factors import Factors
from tiny import FLAGS, HEADS, HIDDEN, KV_HEADS, LAYERS, MAX_RANK, VOCABULARY, importing_tests
from vllm_server import Server

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("other engines")]

SPEC = "ties(apart, other, attention, density=0.5)"
PROMPT = [5, 11, 40, 90, 17]


@dataclass(frozen=True)
class Served:
    """A server, and the folders of its adapters."""

    server: Server
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
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with experts."""
    root = tmp_path_factory.mktemp("mixture")
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
    make_model(config).save_pretrained(root / "model")
    for file in plain.glob("tokenizer*"):
        shutil.copy(file, root / "model")
    return root / "model"


def in_transformers(mixture: Path) -> Any:
    """The model as transformers computes it."""
    make: Any = Qwen3MoeForCausalLM
    return make.from_pretrained(mixture)


def likelihood_of(model: Any, exchange: Exchange) -> list[float]:
    """The log-probabilities of the tokens of an answer."""
    tokens = torch.tensor([[*exchange.prompt, *exchange.answer]])
    with torch.no_grad():
        logprobs = model(tokens).logits[0].log_softmax(-1)
    rows = range(len(exchange.prompt) - 1, tokens.shape[1] - 1)
    return [float(logprobs[row, tokens[0, row + 1]]) for row in rows]


@pytest.fixture(scope="module")
def served(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root, model = tmp_path_factory.mktemp("experts"), in_transformers(mixture)
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
        mixture,
        *(*FLAGS, "--enable-merged-lora", "--max-lora-rank", str(MAX_RANK)),
        *("--lora-modules", *modules, "--merged-lora-source-dir", str(root / "sources")),
        *("--worker-extension-cls", "plain_experts.PlainExperts"),
        log=root / "server.log",
        environment=importing_tests(),
    ) as running:
        yield Served(running, adapters)


def test_a_merge_of_experts_is_served_with_the_values_of_its_offline_twin(served: Served) -> None:
    assert served.server.logprobs(SPEC) == served.server.logprobs("twin")
    assert served.server.logprobs(SPEC) != served.server.logprobs("apart")


@pytest.mark.parametrize(
    ("spec", "folder"), [("sum(whole)", "whole"), ("apart", "whole"), ("sum(attention)", "attention")]
)
def test_what_is_served_is_what_peft_computes(served: Served, mixture: Path, spec: str, folder: str) -> None:
    exchange, likelihood = served.server.exchange(spec, PROMPT)
    model: Any = PeftModel.from_pretrained(in_transformers(mixture), served.adapters[folder])
    assert likelihood == pytest.approx(likelihood_of(model, exchange), abs=1e-4)


def test_an_adapter_of_attention_alone_merges_with_one_of_experts(served: Served) -> None:
    both = served.server.logprobs("sum(whole, attention)")
    assert both != served.server.logprobs("sum(whole)")
    assert both == pytest.approx(served.server.logprobs("cat(whole, attention)"), abs=1e-4)


def test_a_merge_whose_experts_share_a_factor_is_served_as_if_its_deltas_were_in_the_model(
    mixture: Path, tmp_path: Path
) -> None:
    adapters = {name: tmp_path / name for name in "ab"}
    for seed, folder in enumerate(adapters.values()):
        sharing(seed).save(folder)
    spec = "ties(a, b, density=0.5)"
    merged = merge(spec, adapters, rank=MAX_RANK)
    merged.save(tmp_path / "twin")
    modules = (f"{name}={tmp_path / name}" for name in ("a", "b", "twin"))
    with Server(
        mixture,
        *(*FLAGS, "--enable-merged-lora", "--max-lora-rank", str(MAX_RANK), "--enable-moe-shared-loras"),
        *("--lora-modules", *modules, "--worker-extension-cls", "plain_experts.PlainExperts"),
        log=tmp_path / "server.log",
        environment=importing_tests(),
    ) as server:
        assert server.logprobs(spec) == server.logprobs("twin")
        exchange, likelihood = server.exchange(spec, PROMPT)
    model = in_transformers(mixture)
    assert likelihood != pytest.approx(likelihood_of(model, exchange), abs=1e-2)
    with torch.no_grad():
        for name, factors in merged.modules.items():
            holder, _, module = name.rpartition(".")
            place, delta = model.get_submodule(holder), factors.delta().float()
            stack, _, expert = module.removesuffix("]").partition("[")
            match stack:
                case "w1":
                    place.gate_up_proj[int(expert), :INNER] += delta
                case "w2":
                    place.down_proj[int(expert)] += delta
                case "w3":
                    place.gate_up_proj[int(expert), INNER:] += delta
                case _:
                    getattr(place, module).weight += delta
    assert likelihood == pytest.approx(likelihood_of(model, exchange), abs=1e-4)
