"""A merge works wherever a plain adapter works: each feature gives the same as the merge's offline twin."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest

from tiny import SPECS
from vllm_server import Server

pytestmark = pytest.mark.engine

TWIN, SPEC = "merged_ties", SPECS["merged_ties"]
HELLO = [{"role": "user", "content": "hello"}]
BYE = [{"role": "user", "content": "bye"}]
CHOICE = {"type": "choice", "instructions": "Is it?", "criteria": {"a": "one", "b": "other"}}
LIMITED = ("/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch")
LIMITS = {"max_tokens", "max_output_tokens"}
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


ROUTES: list[tuple[str, dict[str, Any]]] = [
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
    ("/v1/messages/count_tokens", {"messages": HELLO}),
    ("/v1/chat/completions/batch", {"messages": [HELLO, BYE], "temperature": 0, "logprobs": True}),
    ("/v1/decisions", {"input": "hello", "questions": [{"type": "predicate", "instructions": "Is it?"}]}),
    ("/v1/systemone", {"state": "hello", "questions": {"it": CHOICE}}),
    ("/generative_scoring", {"query": "hello", "items": ["a", "b"], "label_token_ids": [5, 6]}),
    ("/inference/v1/generate", {"token_ids": [5, 6], "sampling_params": {"max_tokens": 4, "seed": 1}}),
    ("/v1/chat/completions/render", {"messages": HELLO}),
    ("/v1/completions/render", {"prompt": "hello"}),
    ("/v1/responses/render", {"input": "hello"}),
    ("/v1/messages/render", {"messages": HELLO, "max_tokens": 6}),
    ("/tokenize", {"prompt": "hello"}),
    ("/detokenize", {"tokens": [5, 6]}),
]
"""Every route that takes a model, with bodies for it."""


@pytest.mark.parametrize(("route", "body"), ROUTES)
def test_a_merge_answers_as_its_offline_twin(server: Server, route: str, body: dict[str, Any]) -> None:
    """max_tokens stays small; identifiers and times differ between any two replies."""
    if route not in server.get("/openapi.json")[1]["paths"]:
        pytest.skip("this release has no such route")
    limit = {"max_tokens": 6} if route in LIMITED and not LIMITS & set(body) else {}
    replies = []
    for model in (SPEC, TWIN):
        status, reply = server.post(route, {"model": model} | limit | body)
        assert status == 200, reply
        assert not isinstance(reply, dict) or reply.get("model", model) == model
        replies.append(without_marks(reply))
    assert replies[0] == replies[1]


def test_a_batch_of_chats_is_served_with_the_merge_of_its_body(server: Server) -> None:
    """vLLM splits this request into several, and looks up the adapter of each."""
    merge = {"ids": ["sql", "chat"], "weights": [0.7, 0.3], "merge_strategy": "ties", "density": 0.5}
    body = {"messages": [HELLO, BYE], "max_tokens": 4, "temperature": 0, "logprobs": True}
    asked = ({"model": "base", "merged_adapters": merge}, {"model": "ties(0.7*sql, 0.3*chat, density=0.5)"})
    replies = [server.post("/v1/chat/completions/batch", one | body) for one in asked]
    assert [status for status, _ in replies] == [200, 200], replies
    assert replies[0][1]["model"] == "base"
    assert without_marks(replies[0][1]) == without_marks(replies[1][1])
    status, of_base = server.post("/v1/chat/completions/batch", {"model": "base"} | body)
    assert status == 200
    assert without_marks(of_base) != without_marks(replies[0][1])


NO_MODEL = {
    "/invocations": "one of the others, by what its body looks like",
    "/v1/chat/completions/derender": "of tokens that were generated elsewhere",
    "/v1/completions/derender": "of tokens that were generated elsewhere",
    "/v1/load_lora_adapter": "about adapters",
    "/v1/unload_lora_adapter": "about adapters",
}
"""Routes that take a body and no merge."""


def test_every_route_that_names_a_model_is_tried(server: Server) -> None:
    """A route that is new in a release fails here until it was read and is listed above."""
    api = server.get("/openapi.json")[1]
    with_body = {path for path, methods in api["paths"].items() if "requestBody" in methods.get("post", {})}
    assert with_body <= {route for route, _ in ROUTES} | set(NO_MODEL)


def without_marks(value: Any) -> Any:
    """A reply without the fields that differ between any two replies."""
    if isinstance(value, dict):
        marks = ("id", "request_id", "created", "created_at", "model", "completed_at")
        return {key: without_marks(item) for key, item in value.items() if key not in marks}
    return [without_marks(item) for item in value] if isinstance(value, list) else value


def said(events: list[dict[str, Any]]) -> Any:
    """What a stream says, however many tokens each event brings: a late API server sends several at once."""
    choices: dict[int, dict[str, Any]] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        reply = choices.setdefault(choice["index"], {"text": "", "logprobs": [], "finish": []})
        logprobs = choice.get("logprobs") or {}
        reply["text"] += choice.get("text") or choice.get("delta", {}).get("content") or ""
        reply["logprobs"] += logprobs.get("content") or [*logprobs.get("top_logprobs", [])]
        reply["finish"] += [choice["finish_reason"]] if choice["finish_reason"] else []
    usage = [event["usage"] for event in events if event.get("usage")]
    return choices, usage, set(events[0])


def test_structured_output_is_structured(server: Server) -> None:
    body = {"model": SPEC, "prompt": "x", "max_tokens": 6, "structured_outputs": {"choice": ["yes", "no"]}}
    assert server.post("/v1/completions", body)[1]["choices"][0]["text"] in ("yes", "no")


def test_a_tool_is_called(server: Server) -> None:
    choice = {"type": "function", "function": {"name": "find"}}
    # The grammar allows white space without end, and random weights would write it.
    blank = {"model": "base", "prompt": "\n\r\t ", "add_special_tokens": False}
    bias = {str(token): -100 for token in server.post("/tokenize", blank)[1]["tokens"]}
    body = {"model": SPEC, "messages": HELLO, "max_tokens": 200, "tools": [TOOL], "tool_choice": choice}
    status, reply = server.post("/v1/chat/completions", body | {"temperature": 0, "logit_bias": bias})
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
        replies.append(said(events))
    assert replies[0] == replies[1]
