"""Replays on a running server: whose own answers a merge still gives, measured among other requests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from making import random_adapter
from merged_lora.calibration import CALIBRATION_NAME, Exchange
from merged_lora.spec import parse
from tiny import HIDDEN, MODULES, VOCABULARY, Place
from vllm_server import Server

pytestmark = pytest.mark.engine

PROMPTS = [[5 + 7 * i, 11, 40 + i, 90] for i in range(8)]
LONGEST = 255
"""Tokens of the longest prompt with its answer that fits the server's ``--max-model-len``."""


@pytest.fixture(scope="module")
def answers(server: Server, place: Place) -> dict[str, list[tuple[Exchange, list[float]]]]:
    """What the sources ``checked/one`` and ``checked/two`` answer; their calibrations hold it."""
    found = {}
    for seed, name in ((51, "checked/one"), (52, "checked/two")):
        tiny.make_adapter(seed).save(place.sources / name)
        found[name] = [server.exchange(f"sum({name})", prompt) for prompt in PROMPTS]
        tiny.calibrate(place.sources / name, *(exchange for exchange, _ in found[name]))
    return found


def check(server: Server, spec: str) -> dict[str, Any]:
    """The reply to a check."""
    status, reply = server.post("/v1/merged_lora/check", {"spec": spec})
    assert status == 200, reply
    found: dict[str, Any] = reply
    return found


def replay(server: Server, spec: str) -> list[dict[str, Any]]:
    """What the report shows of a merge's replay."""
    _, report = server.get("/v1/merged_lora")
    (found,) = [merge["replay"] for merge in report["merges"] if merge["spec"] == str(parse(spec))]
    replay: list[dict[str, Any]] = found
    return replay


@pytest.mark.parametrize("name", ["checked/one", "checked/two"])
def test_a_source_alone_keeps_its_answers_at_the_likelihood_that_they_had(
    server: Server, answers: dict[str, list[tuple[Exchange, list[float]]]], name: str
) -> None:
    reply = check(server, f"sum({name})")
    (source,) = reply["sources"]
    likelihood = [value for _, logprobs in answers[name] for value in logprobs]
    assert (source["name"], source["kept"], source["total"], source["lost"]) == (name, 8, 8, False)
    assert source["nll"] == pytest.approx(-sum(likelihood) / len(likelihood), abs=1e-4)
    assert (reply["spec"], reply["lost"]) == (f"sum({name})", [])


@pytest.mark.parametrize(
    "spec", ["sum(checked/one, 0.05*checked/two)", "ties(checked/one, checked/two)", "-1*checked/one"]
)
def test_an_answer_is_kept_if_the_merge_gives_it_by_itself(
    server: Server, answers: dict[str, list[tuple[Exchange, list[float]]]], spec: str
) -> None:
    """A greedy answer is the same to its end if and only if each of its tokens is the likeliest there."""
    for source in check(server, spec)["sources"]:
        own = [exchange for exchange, _ in answers[source["name"]]]
        given = [server.exchange(spec, list(exchange.prompt))[0] for exchange in own]
        assert source["kept"] == sum(a == b for a, b in zip(own, given, strict=True))
        assert source["lost"] == (source["kept"] < 4)


def test_a_merge_that_turns_a_source_around_loses_it(
    server: Server, answers: dict[str, list[tuple[Exchange, list[float]]]]
) -> None:
    before = server.metrics()
    reply = check(server, "-1*checked/one + 0.001*checked/two")
    assert reply["lost"] == ["checked/one", "checked/two"]
    after = server.metrics()
    lost = 'merged_lora_checks_total{result="lost"}'
    assert after[lost] - before.get(lost, 0.0) == 2
    assert f"{reply['spec']}: checked/one: 0 of 8 of its answers survive" in server.log.read_text()


def test_a_check_among_other_requests_finds_the_same_and_changes_nothing_for_them(
    server: Server, place: Place, answers: dict[str, list[tuple[Exchange, list[float]]]]
) -> None:
    specs = []
    for i in range(4):  # the same weights and answers under other identities, because a result is kept
        tiny.make_adapter(51).save(place.sources / f"again/{i}")
        own = (exchange for exchange, _ in answers["checked/one"])
        tiny.calibrate(place.sources / f"again/{i}", *own, seed=i)
        specs.append(f"sum(again/{i}, 0.4*chat)")
    server.post("/v1/merged_lora/checked/three", {"spec": "sum(0.3*sql)"})
    others = ["mix", "both", "checked/three"]
    expected = {model: server.logprobs(model, max_tokens=40) for model in others}
    server.post("/v1/merged_lora/check", {"spec": specs[0]})  # chat is not calibrated
    alone, *_ = replay(server, specs[0])
    with ThreadPoolExecutor(7) as pool:
        asked = {model: pool.submit(server.logprobs, model, max_tokens=40) for model in others}
        list(pool.map(lambda spec: server.post("/v1/merged_lora/check", {"spec": spec}), specs[1:]))
        for model, logprobs in asked.items():
            assert logprobs.result() == pytest.approx(expected[model], abs=1e-4)
    for spec in specs[1:]:
        again, *_ = replay(server, spec)
        assert again["kept"] == alone["kept"]
        assert again["nll"] == pytest.approx(alone["nll"], abs=1e-4)
    assert server.delete("/v1/merged_lora/checked/three")[0] == 200


def test_prompts_of_several_adapters_are_rated_in_one_batch_as_they_are_alone(
    server: Server, tmp_path: Path
) -> None:
    """An adapter with an output head shows whether each row of a batch gets the head of its own adapter."""
    head = random_adapter({**MODULES, "lm_head": (VOCABULARY, HIDDEN)}, 8, torch.bfloat16, 61)
    head.save(tmp_path / "head")
    body = {"lora_name": "head", "lora_path": str(tmp_path / "head")}
    assert server.post("/v1/load_lora_adapter", body)[0] == 200
    exchange, generated = server.exchange("head", PROMPTS[0], 20)

    def rated(model: str) -> list[float]:
        prompt = [*exchange.prompt, *exchange.answer]
        body = {"model": model, "prompt": prompt, "max_tokens": 30, "ignore_eos": True, "prompt_logprobs": 0}
        status, reply = server.post("/v1/completions", body)
        assert status == 200, reply
        rows = reply["choices"][0]["prompt_logprobs"][len(exchange.prompt) :]
        return [row[str(token)]["logprob"] for row, token in zip(rows, exchange.answer, strict=True)]

    models = ["head", "sql", "head", "sql", "head"]
    alone = {model: rated(model) for model in set(models)}
    assert alone["head"] == pytest.approx(generated, abs=1e-4)
    with ThreadPoolExecutor(len(models)) as pool:
        for model, together in zip(models, pool.map(rated, models), strict=True):
            assert together == pytest.approx(alone[model], abs=1e-4)
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "head"})[0] == 200


# Aliases


@pytest.fixture
def team(server: Server) -> Iterator[str]:
    """The name of an alias, which is removed afterwards."""
    yield "team"
    assert server.delete("/v1/merged_lora/team")[0] == 200


def test_an_alias_is_replayed_when_it_is_defined_and_the_report_keeps_the_result(
    server: Server, answers: dict[str, list[tuple[Exchange, list[float]]]], team: str
) -> None:
    status, reply = server.post(f"/v1/merged_lora/{team}", {"spec": "sum(checked/one, -2*checked/two)"})
    assert status == 201
    one, two = reply["replay"]
    assert (two["name"], two["kept"], two["total"], two["lost"]) == ("checked/two", 0, 8, True)
    assert replay(server, reply["spec"]) == [one, two]
    assert f"alias {team}: checked/two: 0 of 8 of its answers survive" in server.log.read_text()
    assert check(server, team)["sources"] == [one, two]


def test_an_alias_given_at_the_start_was_checked_as_far_as_it_could_be(server: Server) -> None:
    log = server.log.read_text()  # once more for each time that other tests made the server forget the merge
    assert "alias mix: chat is not checked: " in log
    assert "alias mix: sql: 0 of 1 of its answers survive" in log
    status, reply = server.post("/v1/merged_lora/check", {"spec": "mix"})  # the server may have forgotten it
    assert status == 400
    assert "merged-lora calibrate" in reply["error"]["message"]
    sources = replay(server, "ties(chat, sql, density=0.2)")
    assert [source["name"] for source in sources] == ["chat", "sql"]
    assert "merged-lora calibrate" in sources[0]["refusal"]
    assert (sources[1]["kept"], sources[1]["total"]) == (0, 1)  # an answer that nobody gave


# What goes wrong


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"spec": "2.5*chat"}, 400, "make one with: merged-lora calibrate"),
        ({"spec": "sum(nobody)"}, 404, "unknown adapter 'nobody'"),
        ({"spec": "sum(mix, sql)"}, 400, "itself a merge"),
        ({"spec": "linear(sql, wide)"}, 400, "equal ranks"),
        ({"spec": 7}, 400, '"spec"'),
    ],
)
def test_a_check_that_cannot_be_made_says_why(
    server: Server, body: dict[str, Any], status: int, words: str
) -> None:
    got, reply = server.post("/v1/merged_lora/check", body)
    assert (got, reply["error"]["code"]) == (status, status)
    assert words in reply["error"]["message"]


@pytest.mark.parametrize("tokens", [LONGEST, LONGEST + 1, "foreign"])
def test_a_prompt_that_does_not_fit_is_one_clear_error(
    server: Server, place: Place, tokens: int | str
) -> None:
    name = f"fits/{tokens}"
    tiny.make_adapter(53).save(place.sources / name)
    prompt = (7,) * (tokens - 2) if isinstance(tokens, int) else (VOCABULARY + 5,)
    tiny.calibrate(place.sources / name, Exchange(prompt, (8, 9), fitted=False))
    status, reply = server.post("/v1/merged_lora/check", {"spec": f"sum({name})"})
    assert status == (200 if tokens == LONGEST else 400), reply
    if tokens == LONGEST + 1:
        assert f"have 256 tokens, more than the {LONGEST} that fit here" in reply["error"]["message"]
    if tokens == "foreign":
        assert "vLLM refuses the prompts of a calibration" in reply["error"]["message"]
    assert server.get("/health")[0] == 200


def test_a_calibration_that_goes_or_changes_under_way_leaves_requests_as_they_began(
    server: Server, place: Place, answers: dict[str, list[tuple[Exchange, list[float]]]]
) -> None:
    name = "checked/two"
    file = place.sources / name / CALIBRATION_NAME
    before, whole = server.logprobs(f"ties({name}, sql)", max_tokens=150), file.read_bytes()
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(server.logprobs, f"ties({name}, sql)", max_tokens=150)
        time.sleep(0.2)
        file.unlink()
        status, reply = server.post("/v1/merged_lora/check", {"spec": f"sum({name})"})
        assert (status, "has none" in reply["error"]["message"]) == (400, True)
        file.write_bytes(whole[:-3])
        status, reply = server.post("/v1/merged_lora/check", {"spec": f"sum({name})"})
        assert (status, "cannot use" in reply["error"]["message"]) == (400, True)
        assert under_way.result() == pytest.approx(before, abs=1e-4)
    assert server.logprobs(f"ties({name}, sql)", max_tokens=150) == before
    file.write_bytes(whole)
    assert check(server, f"sum({name})")["sources"][0]["kept"] == 8
