"""Searches on a landscape that is known: what they find, what they ask for, and what a report says."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from landscape import TASKS, Landscape, examples, gain, rows
from merged_lora import MergeError, tune
from merged_lora.errors import EvaluationError
from merged_lora.judging import proposals
from merged_lora.judging.scores import Interval
from merged_lora.judging.tuned import Trial, Tuning
from merged_lora.judging.tuning import divided
from merged_lora.prompts import Example
from merged_lora.spec import parse

DATA = examples(12)
SUMS = ("sum",)


@pytest.fixture
def server() -> Iterator[Landscape]:
    made = Landscape()
    yield made
    made.close()


@pytest.fixture(scope="module")
def found() -> Iterator[Tuning]:
    made = Landscape()
    yield tune(made.url, DATA, strategies=("sum", "ties", "knots"), trials=36)
    made.close()


def test_the_best_merge_beats_every_default_where_weights_matter(found: Tuning) -> None:
    spec = parse(found.best.spec)
    weights = {source.name: source.weight for source in spec.sources}
    assert weights["chat"] / weights["sql"] == pytest.approx(2.0, rel=0.2)
    assert not found.best.default
    assert found.default.value == pytest.approx(0.8)
    assert found.best.value > 0.95


def test_gains_are_shares_of_the_way_from_the_base_model_to_the_source(found: Tuning) -> None:
    for trial in found.trials:
        assert trial.gains == pytest.approx({task: gain(trial.spec, task) for task in TASKS})
        assert trial.value == pytest.approx(min(trial.gains.values()))


def test_a_search_begins_with_what_it_has_to_beat(found: Tuning) -> None:
    first = [trial.spec for trial in found.trials if trial.default]
    assert first == [trial.spec for trial in found.trials[: len(first)]]
    assert first == [
        'sum(chat, sql, weights="auto")',
        "sum(chat, sql)",
        "ties(chat, sql, density=0.2)",
        'knots(chat, sql, weights="auto")',
    ]


def test_a_trial_that_cannot_win_is_pruned_and_asks_for_less(server: Landscape) -> None:
    made = tune(server.url, examples(24), strategies=SUMS, trials=16)
    pruned = [trial for trial in made.trials if trial.state == "pruned"]
    assert len(pruned) > 3
    assert not any(trial.default for trial in pruned)
    asked = {trial.spec: server.asked["/v1/completions", trial.spec] for trial in pruned}
    assert max(asked.values()) < 24  # of two tasks with twelve dev examples each
    assert {trial.requests for trial in pruned} <= {12, 18}


def test_the_report_is_on_examples_that_took_no_part(server: Landscape) -> None:
    asked: dict[str, set[str]] = {}
    reply = server.reply

    def noted(path: str, body: Any) -> dict[str, Any]:
        prompt = body.get("prompt")
        text = "".join(map(chr, prompt)) if isinstance(prompt, list) else prompt
        if path != "/tokenize":
            asked.setdefault(body["model"], set()).add(re.match(r"\w+ \d+", text)[0])  # type: ignore[index]
        return reply(path, body)

    server.reply = noted  # type: ignore[method-assign]
    made = tune(server.url, DATA, strategies=SUMS, trials=6)
    dev, rest = (
        {example.prompt for each in half.values() for example in each} for half in divided(DATA, None, None)
    )
    assert (len(dev), len(rest), dev & rest) == (12, 12, set())
    compared = {made.best.spec, made.default.spec}
    assert asked.pop("base") == dev | rest
    for spec in (trial.spec for trial in made.trials):
        assert asked[spec] <= (dev | rest if spec in compared else dev)
    assert all(asked[spec] >= rest for spec in compared)


def test_examples_of_one_prompt_stay_in_one_half() -> None:
    twice = [Example(i, f"sql {i // 3}", (f"S{i}",)) for i in range(30)]
    dev, rest = divided({"sql": twice}, None, None)
    assert sorted(e.line for half in (dev, rest) for e in half["sql"]) == list(range(30))
    assert not {e.prompt for e in dev["sql"]} & {e.prompt for e in rest["sql"]}
    assert len(dev["sql"]) == 15


def test_a_report_that_cannot_be_made_is_refused_before_the_search(server: Landscape) -> None:
    same = [Example(i, f"chat {i}", (f"C{i:02}",)) for i in range(100, 104)]
    with pytest.raises(EvaluationError, match="sql: sql is not better at it than the base model"):
        tune(server.url, DATA, report={"chat": same, "sql": same}, strategies=SUMS)
    assert not any("(" in model for _, model in server.asked)


def test_a_merge_that_comes_again_is_not_rated_again(
    server: Landscape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposals, "WEIGHTS", (1.0, 1.0))
    monkeypatch.setattr(proposals, "SCALES", (1.0, 1.0))
    made = tune(server.url, DATA, strategies=SUMS, trials=8)
    assert {trial.spec for trial in made.trials} == {trial.spec for trial in made.trials if trial.default}
    assert {trial.requests for trial in made.trials if not trial.default} == {0}


def test_a_margin_that_chance_cannot_explain_is_claimed_and_a_smaller_one_is_not(server: Landscape) -> None:
    dev, many, few = examples(4), examples(44), examples(8)
    some = tune(server.url, dev, report={task: many[task][4:] for task in TASKS}, strategies=SUMS, trials=20)
    assert some.beats
    assert some.margin is not None
    assert some.margin.value == pytest.approx(0.2)
    assert "differ by +20.0 points (" in some.verdict()[0]
    assert some.verdict()[1].startswith("By likelihood, their worst-task gains differ by +")
    assert "What was found kept more: serve that." in some.verdict()
    less = tune(server.url, dev, report={task: few[task][4:] for task in TASKS}, strategies=SUMS, trials=20)
    assert not less.beats
    assert "What was found kept more all the same: serve that." in less.verdict()
    assert "not better" in less.verdict()[0]


def test_without_a_right_answer_of_any_source_gains_alone_are_compared(server: Landscape) -> None:
    server.answers = lambda model, prompt: "wrong"
    made = tune(server.url, DATA, strategies=SUMS, trials=16)
    assert made.margin is None
    assert not made.beats
    assert made.verdict()[0].endswith("no right answer by exact of the source of chat, sql.")
    assert made.gain_margin is not None
    assert made.gain_margin.low == pytest.approx(min(made.gains[made.best.spec].values()) - 0.8)
    assert made.chosen is made.best


def test_a_task_without_a_right_answer_of_its_source_leaves_nothing_to_compare_unless_it_does_not_count(
    server: Landscape,
) -> None:
    own = server.answers
    server.answers = lambda model, prompt: "wrong" if prompt.startswith("chat") else own(model, prompt)
    made = tune(server.url, DATA, strategies=SUMS, trials=16)
    assert made.margin is None
    assert made.verdict()[0].endswith("no right answer by exact of the source of chat.")
    made = tune(server.url, DATA, strategies=SUMS, trials=4, objective={"sql": 1.0})
    assert made.margin is not None


def test_a_default_that_nothing_beats_is_the_result(server: Landscape) -> None:
    made = tune(server.url, DATA, strategies=SUMS, trials=2)
    assert made.best is made.default
    assert made.verdict()[0].startswith("Nothing that was tried is better than the default sum(")
    assert made.margin == Interval(0.0, 0.0, 0.0)


def test_what_does_worse_on_the_report_examples_is_not_the_one_to_serve(server: Landscape) -> None:
    dev, others = examples(4), {task: each[4:] for task, each in examples(44).items()}
    own = server.answers

    def forgetful(model: str, prompt: str) -> str:
        """Merges with weights have no right answer to examples that the search did not see."""
        return "wrong" if "*" in model and int(prompt.split()[1]) >= 4 else own(model, prompt)

    server.answers = forgetful
    made = tune(server.url, dev, report=others, strategies=["sum"], trials=20)
    assert "*" in made.best.spec
    assert made.margin is not None
    assert made.margin.high < 0
    assert f"{made.best.spec} is worse than the best default, {made.default.spec}: " in made.verdict()[0]
    assert made.chosen is made.default
    assert "The default is the one to serve." in made.verdict()
    assert json.loads(made.body())["spec"] == made.default.spec
    assert "how to serve the default\n" in str(made)


def test_where_retentions_are_the_same_gains_decide_what_to_serve(server: Landscape) -> None:
    own = server.answers
    server.answers = lambda model, prompt: own(prompt.split()[0] if "(" in model else model, prompt)
    made = tune(server.url, DATA, strategies=SUMS, trials=16)
    assert made.margin == Interval(0.0, 0.0, 0.0)
    assert made.gain_margin is not None
    assert made.gain_margin.value > 0
    assert made.chosen is made.best


def test_luck_is_the_worst_gain_on_dev_above_that_on_the_report_examples(found: Tuning) -> None:
    assert found.gains[found.best.spec] == pytest.approx(found.best.gains)
    assert found.luck == pytest.approx(0.0, abs=1e-9)
    assert f"The best of {len(found.trials)} was not lucky: its worst-task gain is " in found.verdict()[-2]
    less = {spec: {task: gain - 0.1 for task, gain in gains.items()} for spec, gains in found.gains.items()}
    other = replace(found, gains=less)
    assert other.luck == pytest.approx(0.1)
    assert f"The best of {len(found.trials)} was lucky by 10.0 points: " in other.verdict()[-2]


def test_a_strategy_that_is_refused_is_not_tried_again(server: Landscape) -> None:
    server.refuses = ("regmean",)
    made = tune(server.url, DATA, strategies=("regmean", "sum"), trials=8)
    refused = [trial for trial in made.trials if trial.state == "refused"]
    assert [(trial.strategy, trial.default) for trial in refused] == [("regmean", True)]
    assert "needs a calibration" in refused[0].reason
    assert "1 refused" in made.verdict()[-1]
    assert made.as_dict()["trials"][0]["value"] is None
    json.dumps(made.as_dict(), allow_nan=False)


def test_a_merge_that_is_refused_in_the_middle_of_a_search_does_not_end_it(server: Landscape) -> None:
    fault = server.fault

    def later(path: str, body: Any) -> Any:
        if "scale=" in body["model"]:
            return 404, {"error": {"message": "the folder of sql is gone"}}, {}
        return fault(path, body)

    server.fault = later
    made = tune(server.url, DATA, strategies=("sum", "ties"), trials=20)
    assert {trial.state for trial in made.trials} >= {"refused", "complete"}
    assert len(made.trials) == 20
    assert made.best.value > made.default.value


def test_with_every_default_refused_there_is_nothing_to_search(server: Landscape) -> None:
    server.refuses = SUMS
    with pytest.raises(EvaluationError, match="refuses every merge that the search begins with: sum"):
        tune(server.url, DATA, strategies=SUMS)


def test_a_server_that_fails_ends_a_search_that_can_go_on(server: Landscape, tmp_path: Path) -> None:
    study = tmp_path / "study.jsonl"
    whole = tune(server.url, DATA, strategies=SUMS, trials=12)
    fault, seen = server.fault, set()

    def failing(path: str, body: Any) -> Any:
        seen.add(body["model"])
        return (500, {"error": {"message": "out of order"}}, {}) if len(seen) > 8 else fault(path, body)

    server.fault = failing
    with pytest.raises(EvaluationError, match=r"status 500 .* out of order"):
        tune(server.url, DATA, strategies=SUMS, trials=12, study=study)
    kept = rows(study.read_text())[1:]
    assert [row["trial"]["number"] for row in kept] == list(range(5))  # base and two sources are not trials
    server.fault = fault
    server.asked.clear()
    made = tune(server.url, DATA, strategies=SUMS, trials=12, study=study)
    assert [trial.spec for trial in made.trials[:5]] == [trial.spec for trial in whole.trials[:5]]
    assert len(made.trials) == 12
    report = {made.best.spec, made.default.spec}
    again = {row["trial"]["spec"] for row in kept} - report - {trial.spec for trial in made.trials[5:]}
    assert again
    assert not again & {model for _, model in server.asked}


def test_a_study_of_other_examples_or_choices_is_refused(server: Landscape, tmp_path: Path) -> None:
    study = tmp_path / "study.jsonl"
    tune(server.url, examples(8), strategies=SUMS, trials=2, study=study)
    with pytest.raises(EvaluationError, match="another examples"):
        tune(server.url, examples(10), strategies=SUMS, trials=2, study=study)
    with pytest.raises(EvaluationError, match="another objective"):
        tune(server.url, examples(8), strategies=SUMS, trials=2, study=study, objective="mean")


def test_objectives_weigh_tasks(server: Landscape) -> None:
    made = tune(server.url, DATA, strategies=SUMS, trials=16, objective={"sql": 1.0})
    assert made.best.gains["sql"] == pytest.approx(1.0)
    assert made.best.value == pytest.approx(made.best.gains["sql"])
    mean = tune(server.url, DATA, strategies=SUMS, trials=4, objective="mean")
    for trial in mean.trials:
        assert trial.value == pytest.approx(sum(trial.gains.values()) / 2)


def test_ranks_are_tried_beside_a_strategys_own(server: Landscape) -> None:
    made = tune(server.url, DATA, strategies=("svd",), ranks=(4,), trials=12)
    assert {parse(trial.spec).option("rank") for trial in made.trials} == {None, 4}


def test_merges_can_be_chosen_by_their_answers(server: Landscape) -> None:
    server.rates = False
    with pytest.raises(EvaluationError, match="score answers instead, such as with --score exact"):
        tune(server.url, DATA, strategies=SUMS, trials=2)
    made = tune(server.url, examples(20), strategies=SUMS, trials=12, score="exact")
    assert made.best.value > made.default.value
    assert made.verdict()[1].startswith("By exact, their worst-task gains differ by +")
    assert made.as_dict()["score"] == "exact"


def test_one_adapter_may_have_two_tasks(server: Landscape) -> None:
    twice = {**DATA, "more sql": [Example(i, f"sql {i + 50}", (f"S{i + 50}",)) for i in range(10)]}
    made = tune(server.url, twice, sources={"more sql": "sql"}, strategies=SUMS, trials=4)
    assert parse(made.best.spec).names == ("chat", "sql")


def test_it_stops_when_the_time_is_over(server: Landscape) -> None:
    made = tune(server.url, DATA, strategies=SUMS, minutes=1e-6)
    assert [trial.default for trial in made.trials] == [True]


def test_it_runs_in_a_notebook_which_has_a_loop_of_its_own(server: Landscape) -> None:
    async def cell() -> Tuning:
        return tune(server.url, examples(8), strategies=SUMS, trials=2)

    made = asyncio.run(cell())
    assert "<table>" in made._repr_html_()


def test_what_is_printed_can_be_used(found: Tuning) -> None:
    assert parse(json.loads(found.body())["spec"]) == parse(found.best.spec)
    assert found.module_argument("team") == f"team={found.best.spec}"
    text = str(found)
    assert "how to serve what was found\n" in text
    assert f"--merged-lora-modules 'tuned={found.best.spec}'" in text
    assert f"POST /v1/merged_lora/tuned {found.body()}" in text


def test_the_front_has_no_trial_that_another_betters(found: Tuning) -> None:
    assert found.best in found.front
    assert len(found.front) < len([trial for trial in found.trials if trial.state == "complete"])
    for trial in found.front:
        assert not any(
            all(other.gains[task] > trial.gains[task] for task in TASKS)
            for other in found.trials
            if other.state == "complete"
        )


def test_the_weights_are_what_the_value_depends_on(found: Tuning) -> None:
    weights = sum(share for name, share in found.importance.items() if name.startswith("weight of"))
    assert weights > 0.5
    assert sum(found.importance.values()) == pytest.approx(1.0)


def test_progress_is_reported_with_the_best_so_far(server: Landscape) -> None:
    seen: list[tuple[Trial, Trial | None]] = []
    made = tune(
        server.url, DATA, strategies=SUMS, trials=6, progress=lambda trial, best: seen.append((trial, best))
    )
    assert [trial for trial, _ in seen] == list(made.trials)
    assert seen[-1][1] == made.best


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"trials": True}, "trials must be at least 1"),
        ({"minutes": 0.0}, "minutes must be more than 0"),
        ({"minutes": float("nan")}, "minutes must be more than 0"),
        ({"objective": "best"}, "objective must be worst, mean or weights of tasks, got 'best'"),
        ({"objective": {"nosuch": 1.0}}, "objective names nosuch, which has no examples"),
        ({"objective": {"sql": 0.0}}, "at least 0, and one of them more"),
        ({"objective": {"sql": -1.0, "chat": 2.0}}, "at least 0, and one of them more"),
        ({"objective": {}}, "at least 0, and one of them more"),
        ({"strategies": ()}, "there is no strategy to try"),
        ({"strategies": ("tise",)}, "did you mean"),
        ({"metric": "likelihood"}, "metric must be one of exact, contains, rouge-l"),
        ({"score": "bleu"}, "score must be one of likelihood, exact"),
        ({"sources": {"nosuch": "sql"}}, "nosuch has a source and no examples"),
        ({"sources": {"sql": "nosuch"}}, "serves no 'nosuch'"),
        ({"data": {}}, "there is no task"),
        ({"data": {"sql": DATA["sql"][:1]}}, "sql needs two prompts or more"),
        (
            {"report": {"sql": DATA["sql"]}},
            "chat: every task needs examples for the search",
        ),
        ({"report": DATA}, "chat: 12 prompts are among the examples of the search"),
        ({"ranks": (0,)}, "ranks must be whole numbers of at least 1"),
        ({"concurrency": 0}, "at least 1"),
        ({"base_url": "localhost"}, "no address of a server"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_the_reason(
    server: Landscape, arguments: dict[str, Any], words: str
) -> None:
    given: dict[str, Any] = {"base_url": server.url, "data": DATA, "strategies": ("sum", "svd"), "trials": 3}
    with pytest.raises(MergeError, match=words):
        tune(**given | arguments)


def test_a_source_that_is_no_better_than_the_base_model_is_named(server: Landscape) -> None:
    with pytest.raises(EvaluationError, match="sql: chat is not better at it than the base model"):
        tune(server.url, DATA, sources={"sql": "chat"}, strategies=SUMS)


@pytest.mark.parametrize("missing", ["optuna", "openai", "rouge_score.rouge_scorer"])
def test_a_library_that_is_missing_is_named_with_its_extra(
    server: Landscape, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(EvaluationError, match=r"pip install 'vllm-merged-lora\[(tune|eval)\]'"):
        tune(server.url, DATA, strategies=SUMS, trials=1)
    assert not server.asked
