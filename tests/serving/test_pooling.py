"""A merge works for the embeddings of a pooling model as well."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

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
