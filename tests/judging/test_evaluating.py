"""Evaluations against a stand-in: who is asked what, what is kept, and each way in which a server fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from merged_lora.errors import EvaluationError
from merged_lora.judging import served
from merged_lora.judging.evaluating import evaluate
from merged_lora.prompts import Example
from openai_server import OpenAIServer

MIX, OTHER = "ties(chat, sql)", "sum(chat, sql)"
SQL = [Example(i, f"sql {i}", (f"S{i}",)) for i in range(10)]
CHAT = [Example(i, [{"role": "user", "content": f"chat {i}"}], (f"C{i}",)) for i in range(10)]
DATA = {"sql": SQL, "chat": CHAT}


def good_at(model: str, prompt: str) -> str:
    """Each source is right on its task, the merge on all of chat and every second of sql, the base never."""
    task, number = prompt.split()
    right = f"{task[0].upper()}{number}"
    if model == task or (model == MIX and (task == "chat" or int(number) % 2)):
        return right
    return "wrong"


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    made = OpenAIServer(answers=good_at, likely={"base": 0.1, "sql": 0.9, "chat": 0.8, MIX: 0.6})
    yield made
    made.close()


def test_retention_is_measured_by_task_and_the_worst_comes_first(server: OpenAIServer) -> None:
    found = evaluate(server.url, DATA, ["ties(sql, chat)"])
    assert (found.base, found.specs, found.worst) == ("base", (MIX,), 0.5)
    worst, best = found.of(MIX)
    assert (worst.task, worst.score.value, best.task) == ("sql", 0.5, "chat")
    assert worst.retention is not None
    assert best.retention is not None
    assert worst.retention.low < 0.5 < worst.retention.high
    assert (best.retention.value, best.retention.low) == (1.0, 1.0)
    assert found.judged("base", "sql").score.value == 0.0
    assert found.judged("sql", "sql").retention is None


def test_likelihood_is_the_mean_probability_of_a_token(server: OpenAIServer) -> None:
    found = evaluate(server.url, DATA, [MIX], metric="likelihood")
    assert found.judged(MIX, "sql").score.value == pytest.approx(0.6)
    assert found.judged("chat", "chat").score.value == pytest.approx(0.8)
    retention = found.judged(MIX, "chat").retention
    assert retention is not None
    assert retention.value == pytest.approx(0.75)


def test_a_server_that_cannot_rate_is_done_without_and_says_so(server: OpenAIServer) -> None:
    server.rates = False
    found = evaluate(server.url, DATA, [MIX])
    assert found.metrics == ("exact", "contains", "rouge-l")
    assert "no log-probabilities of prompts" in found.notes[0]
    with pytest.raises(EvaluationError, match="no log-probabilities of prompts"):
        evaluate(server.url, DATA, [MIX], metric="likelihood")


def test_requests_run_side_by_side_within_the_bound(server: OpenAIServer) -> None:
    barrier = threading.Barrier(3, timeout=10)

    def meet(path: str, body: Mapping[str, Any]) -> None:
        if path == "/v1/completions" and body["model"] == "base":
            barrier.wait()  # broken unless three come at a time

    server.fault = meet
    evaluate(server.url, {"sql": SQL[:9]}, concurrency=3, likelihood=False)
    assert server.most == 3


def test_an_interrupted_run_goes_on(server: OpenAIServer, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"

    def broken(path: str, body: Mapping[str, Any]) -> Any:
        return (500, {"error": {"message": "out of order"}}, {}) if body["model"] == MIX else None

    server.fault = broken
    with pytest.raises(EvaluationError, match=r"status 500 for ties\(chat, sql\).*out of order"):
        evaluate(server.url, DATA, [MIX], results=file)
    assert len(file.read_text().splitlines()) == 1 + 40
    server.fault = lambda path, body: None
    server.asked.clear()
    found = evaluate(server.url, DATA, [MIX], results=file)
    assert found.worst == 0.5
    assert {model for _, model in server.asked} == {MIX} | {m for p, m in server.asked if p == "/tokenize"}
    whole = evaluate(server.url, DATA, [MIX])
    assert json.dumps(whole.as_dict()) == json.dumps(found.as_dict())


def test_a_merge_that_is_refused_leaves_the_others(server: OpenAIServer) -> None:
    def refuse(path: str, body: Mapping[str, Any]) -> Any:
        return (400, {"error": {"message": "ranks differ"}}, {}) if body["model"] == OTHER else None

    server.fault = refuse
    found = evaluate(server.url, DATA, [OTHER, MIX])
    assert dict(found.refused) == {OTHER: f"{OTHER}: ranks differ"}
    assert found.ranking == [MIX]
    assert "ranks differ" in str(found)


def test_too_many_requests_are_asked_again(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "ATTEMPTS", 2)
    seen: set[str] = set()

    def busy(path: str, body: Mapping[str, Any]) -> Any:
        key = json.dumps(body)
        if key in seen:
            return None
        seen.add(key)
        return 429, {"error": {"message": "busy"}}, {"Retry-After": "0"}

    server.fault = busy
    assert evaluate(server.url, {"sql": SQL[:3]}, [MIX]).worst is not None


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "refuses access .*OPENAI_API_KEY"),
        (404, r"line \d of sql: base: sorry"),
        (429, "status 429 for base: sorry"),
        (503, "status 503 for base: sorry"),
    ],
)
def test_a_server_that_fails_is_one_line(server: OpenAIServer, status: int, words: str) -> None:
    server.fault = lambda path, body: (status, {"error": {"message": "sorry\nsorry"}}, {})
    with pytest.raises(EvaluationError, match=words) as failed:
        evaluate(server.url, DATA)
    assert "\n" not in str(failed.value)


def test_a_server_that_is_away_is_one_line() -> None:
    with pytest.raises(EvaluationError, match=r"no server answers at http://127\.0\.0\.1:9/v1"):
        evaluate("http://127.0.0.1:9/v1", DATA)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"data": {}}, "there is no task"),
        ({"data": {"sql": []}}, "sql has no examples"),
        ({"data": {"sql": SQL}, "metric": "f1"}, "the metric must be one of exact, contains"),
        ({"data": {"sql": SQL}, "count": 0}, "the number of examples must be at least 1"),
        ({"data": {"sql": SQL}, "concurrency": 0}, "requests at a time must be at least 1"),
        ({"data": {"sql": SQL}, "sources": {"chat": "chat"}}, "chat has a source and no examples"),
        ({"data": {"tone": SQL}}, "serves no 'tone'; it lists base, sql, chat"),
        ({"data": {"sql": SQL}, "base_url": "localhost:8000"}, "is no address of a server"),
    ],
)
def test_wrong_arguments_are_refused(server: OpenAIServer, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(EvaluationError, match=reason):
        evaluate(**{"base_url": server.url, **options})
