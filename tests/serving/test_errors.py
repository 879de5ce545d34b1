"""A client's mistake is answered with 400 or 404 and the way out, and the server keeps running."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from vllm_server import Server

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def the_server_lives_on(server: Server) -> Iterator[None]:
    """After every mistake, a good request is answered as before."""
    before = server.logprobs("mix")
    yield
    assert server.logprobs("mix") == before


def ask(server: Server, model: Any, **more: Any) -> tuple[int, str]:
    """Status and error message of a completion."""
    status, reply = server.post("/v1/completions", {"model": model, "prompt": "x", "max_tokens": 1} | more)
    assert set(reply["error"]) == {"message", "type", "param", "code"}, reply
    assert reply["error"]["code"] == status
    return status, reply["error"]["message"]


@pytest.mark.parametrize(
    ("model", "status", "words"),
    [
        ("ties(sql, nobody)", 404, ("'nobody'", "known: ", "attention and")),
        (
            "nobody",
            404,
            ("The model `nobody` does not exist.", "Adapters and merges: attention, both, chat,"),
        ),
        ("Sqll", 404, ("does not exist", "Did you mean `sql`?")),
        ("ties(0.7 sql + chat; density 2)", 400, ("density", "at most 1", "2")),
        ("ties(0.7 sql + chat, density=1)", 400, ("character 20", "',' does not go with '+'")),
        ("tie(sql, chat)", 400, ("'tie'", "ties", "svd")),
        ("ties(sql, chat", 400, ("character 15", "')'")),
        ("sql - - chat", 400, ("character", "name")),
        ("0.5*sql-chat + tone", 404, ("'sql-chat'", "known: ")),
        ("ties(sql, chat, density=2)", 400, ("density", "at most 1", "2")),
        ("ties(sql, chat, rank=4)", 400, ("'rank'", "density", "elect")),
        ("ties(sql, sql)", 400, ("'sql'", "more than once")),
        ("linear(1e999*sql, chat)", 400, ("weight", "'sql'")),
        ("slerp(sql, chat, tone)", 400, ("exactly 2", "got 3")),
        ("cat(sql, chat, tone)", 400, ("rank 24", "limit is 16", "sum")),
        ("svd(sql, chat, rank=32)", 400, ("rank=32", "limit of 16")),
        ("linear(sql, wide)", 400, ("equal ranks", "8 in sql", "16 in wide", "svd")),
        ("ties(mix, tone)", 400, ("'mix'", "itself a merge", "chat")),
        ('sum("../sql", chat)', 400, ("is a path",)),
        ('sum("/etc/passwd", chat)', 400, ("is a path",)),
        ('sum("a\\u0000b", chat)', 400, ("control character",)),
        ("(" * 10_000, 400, ("10000 characters", "2048")),
        ("a+" * 50_000, 400, ("100000 characters", "2048")),
        ("linear(1e15*sql, 1e15*chat, scale=1e30)", 400, ("1e+45", "at most 1000000")),
    ],
)
def test_a_wrong_spec_is_refused_with_the_way_out(
    server: Server, model: str, status: int, words: tuple[str, ...]
) -> None:
    got, message = ask(server, model)
    assert got == status, message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ids": ["sql", "chat"], "weights": [1]}, ("1 values for 2 ids",)),
        ({"ids": "sql"}, ('"ids"',)),
        ({"ids": ["sql"], "weights": ["1"]}, ("numbers",)),
        ({"ids": ["sql", "chat"], "merge_strategy": 7}, ("merge_strategy",)),
        ({"ids": ["sql", "chat"], "merge_strategy": "linear", "epsilon": 0.5}, ("'epsilon'", "scale")),
        ({"ids": ["sql", "chat"], "merge_strategy": "linear", "density": 2}, ('"density"', "from 0 to 1")),
        ([1, 2], ("object",)),
        ({}, ('"ids"',)),
    ],
)
def test_a_wrong_body_field_is_refused(server: Server, fields: Any, words: tuple[str, ...]) -> None:
    status, message = ask(server, "base", merged_adapters=fields)
    assert status == 400
    for word in words:
        assert word in message


MERGE = {"ids": ["sql", "chat"], "weights": [1, 1]}
MISPLACED: list[tuple[dict[str, Any], str]] = [
    ({"merged_adapter": MERGE}, "merged_adapter"),
    ({"mergedAdapters": MERGE}, "mergedAdapters"),
    ({"parameters": {"merged_adapters": MERGE}}, "parameters.merged_adapters"),
    ({"adapter_id": "sql"}, "adapter_id"),
]


@pytest.mark.parametrize(("fields", "param"), MISPLACED, ids=[param for _, param in MISPLACED])
def test_a_merge_asked_for_where_nothing_reads_it_is_refused(
    server: Server, fields: dict[str, Any], param: str
) -> None:
    for route, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        status, reply = server.post(route, {"model": "base"} | body | fields)
        assert (status, reply["error"]["param"]) == (400, param)
        assert f'nothing reads "{param}"' in reply["error"]["message"]


def test_unknown_fields_are_taken_as_vllm_takes_them(server: Server) -> None:
    more = {"parameters": {"max_new_tokens": 1}, "adapter_id": None, "anything": 1}
    assert server.post("/v1/completions", {"model": "base", "prompt": "x", "max_tokens": 1} | more)[0] == 200


def test_a_body_field_beside_an_adapter_is_refused(server: Server) -> None:
    status, message = ask(server, "sql", merged_adapters={"ids": ["sql", "chat"]})
    assert status == 400
    assert "base model" in message


def test_infinite_and_nan_weights_in_a_body_are_refused(server: Server) -> None:
    for number in ("NaN", "Infinity", "1e999"):
        text = json.dumps(
            {"model": "base", "prompt": "x", "merged_adapters": {"ids": ["sql"], "weights": ["W"]}}
        )
        status, reply = server.post("/v1/completions", text.replace('"W"', number).encode())
        assert status == 400, reply


def test_chat_and_responses_refuse_alike(server: Server) -> None:
    message = {"messages": [{"role": "user", "content": "x"}]}
    for route, body in (("/v1/chat/completions", message), ("/v1/responses", {"input": "x"})):
        status, reply = server.post(route, {"model": "ties(sql, nobody)"} | body)
        assert status == 404
        assert "'nobody'" in reply["error"]["message"]
