"""A merge works for pooling models as well: for embeddings, and with a classifier's head."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3Config, Qwen3ForSequenceClassification

import tiny
from merged_lora.adapters import load_sources
from merged_lora.engine import merge
from tiny import FLAGS, MAX_RANK, SPECS, Place
from vllm_server import Server

SAGEMAKER = "X-Amzn-SageMaker-Adapter-Identifier"

pytestmark = pytest.mark.engine


def test_an_embedding_of_a_merge_is_that_of_its_offline_twin(place: Place, tmp_path: Path) -> None:
    merge(SPECS["merged_ties"], place.adapters, rank=MAX_RANK).save(tmp_path / "twin")
    modules = (f"{name}={path}" for name, path in {**place.adapters, "twin": tmp_path / "twin"}.items())
    with Server(
        place.model,
        *(*FLAGS, "--runner", "pooling", "--convert", "embed", "--enable-merged-lora"),
        *("--max-lora-rank", str(MAX_RANK), "--lora-modules", *modules),
        log=tmp_path / "server.log",
        api_key="a-secret",
    ) as server:

        def embed(model: str, **more: Any) -> tuple[int, Any]:
            found: tuple[int, Any] = server.post("/v1/embeddings", {"model": model, "input": "hello"} | more)
            return found

        replies = [embed(model) for model in (SPECS["merged_ties"], "twin", "sql")]
        assert [status for status, _ in replies] == [200, 200, 200]
        merged, twin, other = (reply["data"][0]["embedding"] for _, reply in replies)
        assert merged == twin
        assert merged != other
        assert replies[0][1]["model"] == SPECS["merged_ties"]
        by_field = embed("base", merged_adapters={"ids": ["sql"], "weights": [1]})
        assert by_field[1]["data"][0]["embedding"] == embed("linear(sql)")[1]["data"][0]["embedding"]
        for model, status in (("ties(sql, nobody)", 404), ("linear(sql, wide)", 400), ("ties(sql", 400)):
            got, reply = embed(model)
            assert (got, reply["error"]["code"]) == (status, status)
        got, reply = embed("Sql")
        assert got == 404
        assert "`Sql` does not exist. Did you mean `sql`? Adapters and merges: " in reply["error"]["message"]
        sent = server.send("/v1/embeddings", {"model": SPECS["merged_ties"], "input": "hello"})
        assert re.fullmatch(r'"[0-9a-f]{32}";new=0;ms=[0-9.]+', sent.headers["merged-lora"])
        assert_merges_need_the_key_everywhere(server)


def test_a_head_that_a_merge_took_from_one_source_is_served_as_peft_reads_it(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "plain")
    config = Qwen3Config.from_pretrained(folder)
    config.num_labels, config.pad_token_id = 3, 0
    make: Any = Qwen3ForSequenceClassification
    torch.manual_seed(0)
    make(config).save_pretrained(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    sources = {name: tmp_path / name for name in ("a", "b")}
    for seed, path in enumerate(sources.values()):
        torch.manual_seed(seed)
        targets = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        trained: Any = get_peft_model(make.from_pretrained(tmp_path / "model"), targets)
        for name, parameter in trained.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data.normal_(0, 0.3)
        trained.save_pretrained(path)
    taken = tmp_path / "taken"
    merge("sum(0.5*a, 0.5*b)", load_sources(sources, take={"heads": "a"}), rank=MAX_RANK).save(taken)
    prompt = [5, 11, 40, 90]
    merged: Any = PeftModel.from_pretrained(make.from_pretrained(tmp_path / "model"), taken)
    expected = merged(torch.tensor([prompt])).logits.softmax(-1)[0].tolist()
    with Server(
        tmp_path / "model",
        *(*FLAGS, "--runner", "pooling", "--enable-merged-lora", "--max-lora-rank", str(MAX_RANK)),
        *("--lora-modules", *(f"{name}={path}" for name, path in {**sources, "taken": taken}.items())),
        log=tmp_path / "server.log",
    ) as server:
        status, reply = server.post("/classify", {"model": "taken", "input": prompt})
        assert status == 200, reply
        assert reply["data"][0]["probs"] == pytest.approx(expected, abs=1e-5)
        status, reply = server.post("/classify", {"model": "sum(a, b)", "input": prompt})
        assert (status, "score.weight" in reply["error"]["message"]) == (400, True)


def assert_merges_need_the_key_everywhere(server: Server) -> None:
    """On routes that vLLM leaves open, plain requests need no key and merges do."""
    two = {"queries": "hello", "documents": ["bye"]}

    def send(route: str, body: dict[str, Any], key: str) -> httpx.Response:
        # SageMaker's route takes an adapter's name from a header, and ignores the body's.
        return server.send(route, body, authorization=key, **{SAGEMAKER: str(body["model"])})

    for route, body in (
        ("/pooling", {"input": "hello"}),
        ("/invocations", {"input": "hello"}),
        ("/score", two),
        ("/rerank", {"query": "hello", "documents": ["bye"]}),
        ("/tokenize", {"prompt": "hello"}),
    ):
        for asking in (
            {"model": "sum(0.123*sql)"},
            {"model": "ties(sql, nobody)"},
            {"model": "base", "merged_adapters": {"ids": ["sql"]}},
        ):
            for key in ("", "Bearer wrong"):
                reply = send(route, body | asking, key)
                assert reply.status_code == 401, (route, reply.text)
                assert reply.headers["www-authenticate"] == "Bearer"
                assert "sql" not in reply.text
        made = [live["spec"] for live in server.get("/v1/merged_lora")[1]["merges"]]
        assert "sum(0.123*sql)" not in made
        assert send(route, body | {"model": "sql"}, "").status_code == 200, route
        unknown = send(route, body | {"model": "nobody"}, "")
        assert (unknown.status_code, "chat" in unknown.text) == (404, False)
        reply = send(route, body | {"model": "sum(0.5*sql)"}, "Bearer a-secret")
        assert (reply.status_code, "merged-lora" in reply.headers) == (200, route != "/tokenize")
