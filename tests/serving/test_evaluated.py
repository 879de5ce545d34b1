"""An evaluation of a running server: likelihoods are those of transformers, alone and side by side."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from merged_lora.adapters import Adapter
from merged_lora.engine import merge
from merged_lora.judging.evaluating import evaluate
from merged_lora.judging.evaluation import LIKELIHOOD, Evaluation
from merged_lora.judging.served import Served
from merged_lora.judging.tuning import divided, tune
from merged_lora.language_model import LanguageModel
from merged_lora.prompts import Example
from running import Run
from tiny import MAX_RANK, Place
from vllm_server import Server

pytestmark = pytest.mark.engine

SPEC = "ties(chat, sql, density=0.4)"
DATA: Mapping[str, list[Example]] = {
    "sql": [Example(i, f"SELECT {i} FROM", (f" orders{i};",)) for i in range(6)],
    "chat": [Example(i, [{"role": "user", "content": f"hello {i}"}], (f"Hi {i} ü",)) for i in range(6)],
}
WITHIN = 1e-4
"""Nats that float32 may differ by between ways to compute a log-probability."""


def wait_for_replays(server: Server) -> None:
    """Wait until no alias is replayed: vLLM's CPU build spoils base-model rows beside those of a merge."""
    deadline = time.monotonic() + 120
    while not all(f"alias {name}: sql: " in server.log.read_text() for name in ("mix", "both")):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def found(server: Server) -> Evaluation:
    """The base model, two adapters, a merge and an alias on two tasks, eight requests at a time."""
    wait_for_replays(server)
    return evaluate(f"{server.url}/v1", DATA, [SPEC, "mix"], limit=8)


def test_base_sources_merges_and_aliases_are_rated(found: Evaluation) -> None:
    assert (found.base, found.refused, found.notes) == ("base", {}, ())
    assert set(found.rows) == {
        *(("sql", "sql"), ("chat", "chat")),
        *((model, task) for model in ("base", SPEC, "mix") for task in DATA),
    }
    assert LIKELIHOOD in found.metrics


def test_likelihoods_are_those_of_transformers(server: Server, place: Place, found: Evaluation) -> None:
    plain = LanguageModel.load(place.model)

    def wearing(model: str) -> AbstractContextManager[None]:
        if model == "base":
            return plain.wearing({})
        if model == SPEC:
            return plain.wearing(merge(SPEC, place.adapters, rank=MAX_RANK).modules)
        return plain.wearing(Adapter.load(place.adapters[model]).modules)

    async def tokens(example: Example) -> tuple[list[int], list[int]]:
        asked = Served(f"{server.url}/v1")
        try:
            return await asked.tokens("base", example.prompt, example.answers[0])
        finally:
            await asked.close()

    for task, model in (("sql", "base"), ("sql", "sql"), ("chat", "chat"), ("sql", SPEC), ("chat", SPEC)):
        with wearing(model):
            for example, rated in zip(DATA[task], found.scores(model, task, LIKELIHOOD), strict=True):
                prompt, answer = asyncio.run(tokens(example))
                assert tuple(prompt) == plain.encode(example.prompt)
                replayed = plain.replay(tuple(prompt), tuple(answer))
                assert replayed.tokens == len(answer)
                expected = replayed.log_likelihood / replayed.tokens
                assert math.log(rated) == pytest.approx(expected, abs=WITHIN)


def test_one_request_at_a_time_gives_the_same(server: Server, found: Evaluation) -> None:
    alone = evaluate(f"{server.url}/v1", DATA, [SPEC, "mix"], limit=8, concurrency=1)
    for (model, task), rows in found.rows.items():
        assert [row.answer for row in alone.rows[model, task]] == [row.answer for row in rows]
        ours = found.scores(model, task, LIKELIHOOD)
        assert alone.scores(model, task, LIKELIHOOD) == pytest.approx(ours, rel=WITHIN)


def test_a_merge_that_the_server_refuses_leaves_the_others(run: Run, server: Server, tmp_path: Path) -> None:
    file = tmp_path / "sql.jsonl"
    file.write_text(json.dumps({"prompt": "a", "answer": "b"}), encoding="utf-8")
    arguments = ["--base-url", f"{server.url}/v1", "--data", f"sql={file}", "--limit", "2"]
    refused = "cat(sql, wide, chat)"  # of rank 32
    code, out, err = run("eval", *arguments, "--spec", refused, "--spec", SPEC)
    assert (code, err) == (3, "merged-lora: the server refuses cat(chat, sql, wide)\n")
    assert f"\n{SPEC}\n" in out


def test_a_search_finds_gains_that_an_evaluation_confirms(server: Server, tmp_path: Path) -> None:
    wait_for_replays(server)
    url, study = f"{server.url}/v1", tmp_path / "study.jsonl"
    answered = evaluate(url, DATA, limit=8, likelihood=False)
    own = {
        task: [
            Example(example.line, example.prompt, (row.answer,))
            for example, row in zip(DATA[task], answered.rows[task, task], strict=True)
            if row.answer.strip()
        ]
        for task in DATA
    }
    made = tune(url, own, trials=9, study=study, limit=8)
    assert len(made.trials) == 9
    assert {trial.state for trial in made.trials} <= {"complete", "pruned", "refused"}
    assert not [
        trial for trial in made.trials if trial.state == "refused" and "calibration" not in trial.reason
    ]

    dev, _ = divided(own, None, None)
    again = evaluate(url, dev, [made.best.spec], limit=8)

    def mean(model: str, task: str) -> float:
        scores = again.scores(model, task, LIKELIHOOD)
        return sum(map(math.log, scores)) / len(scores)

    for task, gain in made.best.gains.items():
        base, source = mean("base", task), mean(task, task)
        assert gain == pytest.approx((mean(made.best.spec, task) - base) / (source - base), abs=1e-3)
    resumed = tune(url, own, trials=9, study=study, limit=8)
    assert resumed.trials == made.trials
