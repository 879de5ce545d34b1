"""What a client sees: merges named in requests, served by real vLLM."""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from merged_lora.spec import parse
from promises import assert_together_as_alone
from tiny import SPECS, Place
from vllm_server import Server

pytestmark = pytest.mark.engine

HELLO = [{"role": "user", "content": "hello"}]


def chat(server: Server, model: str, **more: Any) -> tuple[str, list[float]]:
    """Model name and log-probabilities of four greedy tokens of a chat."""
    body = {"model": model, "messages": HELLO, "max_tokens": 4, "temperature": 0, "logprobs": True}
    status, reply = server.post("/v1/chat/completions", body | more)
    assert status == 200, reply
    return reply["model"], [token["logprob"] for token in reply["choices"][0]["logprobs"]["content"]]


@pytest.mark.parametrize("offline", SPECS)
def test_a_merge_on_demand_equals_the_same_merge_written_to_disk(server: Server, offline: str) -> None:
    assert server.logprobs(SPECS[offline]) == server.logprobs(offline)


def test_different_merges_give_different_answers(server: Server) -> None:
    models = ["sql", "chat", "mix", "both", *SPECS.values()]
    answers = {tuple(server.logprobs(model)) for model in models}
    assert len(answers) == len(models)


def test_an_alias_is_the_merge_that_it_stands_for(server: Server) -> None:
    assert server.logprobs("mix") == server.logprobs("ties(sql, chat, density=0.2)")
    assert server.logprobs("both") == server.logprobs("sum(0.5*chat, 0.5*sql)")


def test_the_spelling_of_a_spec_does_not_matter(server: Server) -> None:
    assert server.logprobs("ties( chat,sql , density=0.20 )") == server.logprobs("mix")


@pytest.mark.parametrize(
    ("plain", "usual"),
    [
        ("ties(0.7 sql + 0.3 chat; density 0.4)", "ties(0.7*sql, 0.3*chat, density=0.4)"),
        ("dare_ties(sql + chat; density [0.3 0.8])", SPECS["merged_dare_ties"]),
        ("0.7 sql + 0.3 chat - 0.2 tone", SPECS["merged_sum"]),
    ],
)
def test_the_spelling_for_gateways_is_the_same_merge(server: Server, plain: str, usual: str) -> None:
    assert server.logprobs(plain) == server.logprobs(usual)
    assert chat(server, plain)[0] == plain


@pytest.mark.parametrize("strategy", ["linear", "ties", "dare_linear", "dare_ties"])
def test_all_fields_of_lorax_go_with_each_of_its_strategies(server: Server, strategy: str) -> None:
    fields = {"ids": ["sql", "chat"], "weights": [1, 0.5], "merge_strategy": strategy, "density": 0.5}
    expected = chat(server, f"{strategy}(sql, 0.5*chat)")[1]
    assert chat(server, "base", merged_adapters=fields | {"majority_sign_method": "total"})[1] == expected


def test_a_density_of_0_answers_with_the_base_model_as_lorax_does(server: Server) -> None:
    fields = {"ids": ["sql", "chat"], "weights": [1, 0.5], "merge_strategy": "ties", "density": 0.0}
    assert chat(server, "base", merged_adapters=fields)[1] == pytest.approx(chat(server, "base")[1], abs=1e-5)


def test_a_body_field_names_a_merge_as_lorax_does(server: Server) -> None:
    fields = {"ids": ["sql", "chat"], "weights": [1, 1], "merge_strategy": "ties", "density": 0.2}
    assert chat(server, "base", merged_adapters=fields)[1] == chat(server, "mix")[1]


def test_the_reply_names_the_model_as_the_client_sent_it(server: Server) -> None:
    spec = "ties( sql, chat,density=0.2)"
    assert chat(server, spec)[0] == spec
    assert chat(server, "mix")[0] == "mix"
    assert chat(server, "sql")[0] == "sql"
    assert chat(server, "base", merged_adapters={"ids": ["sql", "chat"]})[0] == "base"


def test_the_responses_route_serves_merges(server: Server) -> None:
    body = {"input": "hello", "max_output_tokens": 4, "temperature": 0}
    replies = [
        server.post("/v1/responses", body | {"model": m}) for m in ("mix", "ties(sql, chat, density=0.2)")
    ]
    assert [status for status, _ in replies] == [200, 200]
    assert replies[0][1]["output"][0]["content"] == replies[1][1]["output"][0]["content"]


def test_a_stream_serves_merges(server: Server) -> None:
    import urllib.request

    data = b'{"model": "mix", "prompt": "hello", "max_tokens": 4, "temperature": 0, "stream": true}'
    request = urllib.request.Request(
        server.url + "/v1/completions", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        events = reply.read().decode().split("\n\n")
    assert events[-2] == "data: [DONE]"
    assert all('"model":"mix"' in event for event in events[:-2])


ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "x", "max_tokens": 1}),
    ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1}),
    ("/v1/responses", {"input": "x", "max_output_tokens": 1}),
    ("/v1/messages", {"messages": HELLO, "max_tokens": 1}),
]


def merge_of(header: str) -> tuple[str, bool, float]:
    """Digest, whether the merge was new, and milliseconds, as the reply's header has them."""
    found = re.fullmatch(r'"([0-9a-f]{32})";new=([01]);ms=([0-9]+\.[0-9])', header)
    assert found, header
    return found[1], found[2] == "1", float(found[3])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("route", "body"), ROUTES, ids=[route for route, _ in ROUTES])
def test_a_header_names_the_merge_that_answered(
    server: Server, route: str, body: dict[str, Any], stream: bool
) -> None:
    spec = f"linear(sql, 0.{ROUTES.index((route, body)) + 2}{int(stream) + 1}*chat)"
    replies = [server.send(route, body | {"model": spec, "stream": stream}) for _ in range(2)]
    assert [reply.status_code for reply in replies] == [200, 200], replies[0].text
    first, second = (merge_of(reply.headers["merged-lora"]) for reply in replies)
    digests = {m["spec"]: m["digest"] for m in server.get("/v1/merged_lora")[1]["merges"]}
    (digest,) = [digests[name] for name in digests if name == str(parse(spec))]
    assert first == (digest, True, first[2])
    assert second == (digest, False, first[2])
    assert first[2] > 0


@pytest.mark.parametrize("model", ["base", "sql", "nobody", "ties(sql, nobody)"])
def test_a_reply_without_a_merge_has_no_such_header(server: Server, model: str) -> None:
    assert "merged-lora" not in server.send("/v1/completions", {"model": model, "prompt": "x"}).headers


def test_aliases_stand_in_the_list_of_models(server: Server) -> None:
    _, models = server.get("/v1/models")
    cards = {card["id"]: card for card in models["data"]}
    assert cards["mix"]["root"] == "ties(chat, sql, density=0.2)"
    assert cards["mix"]["parent"] == "base"
    assert {"base", "sql", "chat", "both"} <= set(cards)
    assert not [name for name in cards if name.startswith("merged-lora:")]


def test_many_requests_for_one_new_merge_get_one_answer(server: Server) -> None:
    spec = "dare_ties(sql, chat, seed=12345)"
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.logprobs(spec), range(8)))
    assert len({tuple(answer) for answer in answers}) == 1
    assert server.log.read_text().count("seed=12345)' digest") == 1


def test_more_merges_at_a_time_than_slots_are_all_served(server: Server) -> None:
    assert_together_as_alone(server)


def test_a_merge_is_made_from_memory_after_its_sources_are_gone(server: Server, place: Place) -> None:
    before = server.logprobs("svd(sql, tone, rank=4)")
    for weight in (0.6, 0.7, 0.8, 0.9):  # more than --max-cpu-loras, so that vLLM forgets the first merge
        server.logprobs(f"linear({weight}*sql, tone)")
    moved = place.adapters["tone"].with_name("tone_moved")
    shutil.move(place.adapters["tone"], moved)
    try:
        assert server.logprobs("svd(sql, tone, rank=4)") == before
        assert server.logprobs("linear(0.35*sql, tone)") != before
    finally:
        shutil.move(moved, place.adapters["tone"])
