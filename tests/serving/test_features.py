"""A merge works wherever a plain adapter works: each feature gives the same as the merge's offline twin."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest

from merged_lora.bench.server import Server
from tiny import SPECS

pytestmark = pytest.mark.engine

TWIN, SPEC = "merged_ties", SPECS["merged_ties"]
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "strict": True,
        "parameters": {"type": "object", "properties": {"n": {"enum": [1, 2, 3]}}, "required": ["n"]},
    },
}


def streamed(server: Server, route: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream."""
    data = json.dumps({"stream": True, **body}).encode()
    request = urllib.request.Request(server.url + route, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        events = [line[6:] for line in reply.read().decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/completions", {"prompt": "hello", "n": 3, "temperature": 1.0, "seed": 1, "logprobs": 3}),
        ("/v1/completions", {"prompt": ["one", "two two"], "temperature": 0, "logprobs": 2}),
        (
            "/v1/completions",
            {"prompt": "x", "temperature": 0, "structured_outputs": {"choice": ["yes", "no"]}},
        ),
        (
            "/v1/chat/completions",
            {"messages": HELLO, "n": 2, "temperature": 1.0, "seed": 1, "logprobs": True},
        ),
        (
            "/v1/chat/completions",
            {
                "messages": HELLO,
                "temperature": 0,
                "max_tokens": 60,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": TOOL["function"]["parameters"]},  # type: ignore[index]
                },
            },
        ),
        (
            "/v1/chat/completions",
            {
                "messages": HELLO,
                "temperature": 0,
                "max_tokens": 200,
                "tools": [TOOL],
                "tool_choice": {"type": "function", "function": {"name": "find"}},
            },
        ),
        ("/v1/responses", {"input": "hello", "temperature": 0, "max_output_tokens": 6}),
        ("/v1/messages", {"messages": HELLO, "temperature": 0, "max_tokens": 6}),
        ("/tokenize", {"prompt": "hello"}),
    ],
)
def test_a_merge_answers_as_its_offline_twin(server: Server, route: str, body: dict[str, Any]) -> None:
    """max_tokens stays small; identifiers and times differ between any two replies."""
    limit = (
        {} if {"max_tokens", "max_output_tokens"} & set(body) or route == "/tokenize" else {"max_tokens": 6}
    )
    replies = []
    for model in (SPEC, TWIN):
        status, reply = server.post(route, {"model": model} | limit | body)
        assert status == 200, reply
        assert reply.get("model", model) == model
        replies.append(without_marks(reply))
    assert replies[0] == replies[1]


def without_marks(value: Any) -> Any:
    """A reply without what differs between any two."""
    if isinstance(value, dict):
        marks = ("id", "created", "created_at", "model", "completed_at")
        return {key: without_marks(item) for key, item in value.items() if key not in marks}
    return [without_marks(item) for item in value] if isinstance(value, list) else value


def test_structured_output_is_structured(server: Server) -> None:
    body = {"model": SPEC, "prompt": "x", "max_tokens": 6, "structured_outputs": {"choice": ["yes", "no"]}}
    assert server.post("/v1/completions", body)[1]["choices"][0]["text"] in ("yes", "no")


def test_a_tool_is_called(server: Server) -> None:
    choice = {"type": "function", "function": {"name": "find"}}
    body = {"model": SPEC, "messages": HELLO, "max_tokens": 200, "tools": [TOOL], "tool_choice": choice}
    status, reply = server.post("/v1/chat/completions", body)
    assert status == 200, reply
    (call,) = reply["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "find"
    assert json.loads(call["function"]["arguments"])["n"] in (1, 2, 3)


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (
            "/v1/completions",
            {"prompt": "hello", "logprobs": 1, "n": 2, "stream_options": {"include_usage": True}},
        ),
        ("/v1/chat/completions", {"messages": HELLO, "logprobs": True}),
    ],
)
def test_a_streamed_merge_is_its_streamed_twin(server: Server, route: str, body: dict[str, Any]) -> None:
    replies = []
    for model in (SPEC, TWIN):
        events = streamed(
            server, route, {"model": model, "max_tokens": 6, "temperature": 1, "seed": 3} | body
        )
        assert {event["model"] for event in events} == {model}
        events.sort(
            key=lambda event: [choice["index"] for choice in event["choices"]]
        )  # n of them take turns
        replies.append(without_marks(events))
    assert replies[0] == replies[1]
