"""The harness of skills: what a template means, what a score is, and that a measured row is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from encoding import Encoded, packed
from evaluate import load_adapted, score
from judge import Judge
from merged_lora.adapters import Adapter
from skills import Report, Row, alarms, spec_of, summary, with_retention
from smollm2 import MODEL_DIR, load_model
from tasks import TASKS, examples
from train import ADAPTERS_DIR

COUNT = 8


@pytest.mark.parametrize(
    ("template", "spec"),
    [
        ("knots weights=auto", "knots(1*a, 1*b, weights=auto)"),
        ("linear 1/N", "linear(0.500000*a, 0.500000*b)"),
        ("ties 0.7 density=0.2 scale=0.9", "ties(0.7*a, 0.7*b, density=0.2, scale=0.9)"),
    ],
)
def test_a_template_means_a_merge_of_every_set(template: str, spec: str) -> None:
    assert spec_of(template, ("a", "b")) == spec


def test_retention_is_the_share_of_the_score_alone() -> None:
    row = with_retention({"scores": {"a": 0.45, "b": 1.0}}, {"a": 0.9, "b": 1.0, "c": 0.1})
    assert row["retention"] == {"a": 0.5, "b": 1.0}
    assert (row["mean"], row["worst"]) == (0.75, 0.5)


def test_a_report_goes_on_from_its_file_and_refuses_that_of_another_count(tmp_path: Path) -> None:
    file = tmp_path / "skills.json"
    row = Report(file, 60).add({"kind": "alone", "adapter": "a", "scores": {"a": 1.0}})
    again = Report(file, 60)
    assert again.find(kind="alone", adapter="a") == row
    assert again.find(kind="alone", adapter="b") is None
    with pytest.raises(SystemExit, match="--count 60, not 30"):
        Report(file, 30)


def row_of(names: str, kept: list[float], **others: object) -> Row:
    row: Row = {"kind": "report", "template": "iso", "limit": None, "set": list(names)}
    scores = dict(zip(names, kept, strict=True))
    return with_retention(row | {"scores": scores} | others, dict.fromkeys(names, 1.0))


def test_a_summary_has_a_line_for_each_strategy_and_size_with_what_is_lost() -> None:
    rows: list[Row] = [
        {"kind": "base", "scores": {}},
        row_of("ab", [1.0, 0.25]),
        row_of("cd", [0.5, 0.75]),
        row_of("ab", [0.0, 1.0], limit=16),
        row_of("abc", [1.0, 1.0, 1.0]),
        {"kind": "report", "template": "slerp", "limit": None, "set": ["a", "b", "c"], "error": "two only"},
    ]
    assert list(summary(rows))[2:] == [
        "| report: 1 of 2 | iso, rank 16 | 50 | 0 | 1 of 2 |",
        "| report: 2 of 2 | iso | 62 | 25 | 1 of 4 |",
        "| report: 1 of 3 | iso | 100 | 100 | 0 of 3 |",
    ]


def test_replays_are_set_against_what_the_tests_find() -> None:
    rows = [
        row_of("abc", [0.0, 0.3, 0.95], replay={"a": [0, 8], "b": [3, 8], "c": [7, 8]}),
        row_of("ab", [0.6, 0.4], replay={"a": [4, 8], "b": [6, 8]}),
        row_of("ab", [1.0, 1.0]),
    ]
    assert list(alarms(rows))[2:] == [
        "| none | 1 | 1 | 0 | 0 |",
        "| under half | 1 | 1 | 0 | 0 |",
        "| half to 3/4 | 1 | 0 | 1 | 0 |",
        "| 3/4 or more | 2 | 1 | 0 | 1 |",
    ]


def test_examples_in_one_row_share_their_beginning_and_do_not_see_each_other() -> None:
    row = packed([Encoded([1, 5, 6, 7, 8], 2), Encoded([1, 9, 3], 1)])
    inputs = {name: tensor.tolist() for name, tensor in row.inputs.items()}
    assert inputs["input_ids"] == [[1, 5, 6, 7, 8, 9, 3]]
    assert inputs["position_ids"] == [[0, 1, 2, 3, 4, 1, 2]]
    assert inputs["logits_to_keep"] == [2, 3, 5]
    assert row.labels.tolist() == [7, 8, 3]
    seen = {place: {at for at in range(7) if inputs["attention_mask"][0][0][place][at]} for place in range(7)}
    assert [seen[place] for place in (0, 4, 6)] == [{0}, {0, 1, 2, 3, 4}, {0, 5, 6}]


@pytest.mark.parametrize("batch", [[Encoded([1, 2, 3], 2)], [Encoded([1, 2, 3], 1), Encoded([1, 2, 4], 1)]])
def test_the_token_before_an_answer_is_never_shared(batch: list[Encoded]) -> None:
    row = packed(batch)
    before = [example.ids[-example.answer - 1] for example in batch]
    lengths = torch.tensor([example.answer for example in batch])
    first = row.inputs["logits_to_keep"][lengths.cumsum(0) - lengths]
    assert row.inputs["input_ids"][0, first].tolist() == before


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["json", None])
def test_an_answer_is_right_if_greedy_decoding_gives_it(adapter: str | None) -> None:
    folder = ADAPTERS_DIR / adapter if adapter else None
    judge = Judge(*load_model(MODEL_DIR))
    judge.take_on(Adapter.load(folder) if folder else None)
    for name, task in TASKS.items():
        verdict = judge.judge(judge.encode(task, examples(task, "test", COUNT)))
        assert verdict.right == score(*load_adapted(MODEL_DIR, folder), name, COUNT)
