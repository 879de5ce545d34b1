"""A merge works for the embeddings of a pooling model as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merged_lora.engine import merge
from tiny import FLAGS, MAX_RANK, SPECS, Place
from vllm_server import Server

pytestmark = pytest.mark.engine


def test_an_embedding_of_a_merge_is_that_of_its_offline_twin(place: Place, tmp_path: Path) -> None:
    merge(SPECS["merged_ties"], place.adapters, rank=MAX_RANK).save(tmp_path / "twin")
    modules = (f"{name}={path}" for name, path in {**place.adapters, "twin": tmp_path / "twin"}.items())
    with Server(
        place.model,
        *(*FLAGS, "--runner", "pooling", "--convert", "embed", "--enable-merged-lora"),
        *("--max-lora-rank", str(MAX_RANK), "--lora-modules", *modules),
        log=tmp_path / "server.log",
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
