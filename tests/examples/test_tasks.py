"""The tasks of the examples: right answers are well formed, and no test prompt occurs in training."""

from __future__ import annotations

import json
import re
from datetime import datetime

import pytest

from more_tasks import ALL_TASKS
from tasks import TEST_SIZE, TRAIN_SIZE, Example, examples
from train import BATCH_SIZE, TRAININGS

FORMS = {
    "sql": r"SELECT .+ FROM orders WHERE .+;",
    "json": r"\{.*\}",
    "tone": r"Dear friend, .+[.?] Warmly, Fernhill",
    "topic": r"Amber|Cobalt|Ivory|Jade|Ruby|Violet",
    "steps": r"(\d\. .+\.\n){6}7\. Close the gate\.",
    "query": r"SELECT .+ FROM \[staff\] WHERE \[\w+\] = N'\w+' AND .+",
    "terse": r".+ STOP",
    "dates": r"(Plan|Move|Cancel) the \w+ with \w+.* \[.+\]\.",
    "fields": r"ev=\w+;n=\d+;by=\w+;svc=\w+;at=\w+@\d\d:\d\d",
}


def split(task: str, name: str) -> list[Example]:
    """All examples of a split."""
    if name == "test":
        return examples(ALL_TASKS[task], "test", TEST_SIZE)
    return examples(ALL_TASKS[task], "train", TRAIN_SIZE)


@pytest.mark.parametrize("task", ALL_TASKS)
def test_prompts_are_distinct_and_none_is_in_both_splits(task: str) -> None:
    prompts = [example.prompt for name in ("train", "test") for example in split(task, name)]
    assert len(set(prompts)) == len(prompts) == TEST_SIZE + TRAIN_SIZE


@pytest.mark.parametrize("task", ALL_TASKS)
def test_prompts_begin_with_the_words_of_their_task_and_no_other(task: str) -> None:
    def words(name: str) -> set[str]:
        return {example.prompt.partition(":")[0] for example in split(name, "test")}

    assert len(words(task)) == 1
    assert not [other for other in ALL_TASKS if other != task and words(other) & words(task)]


@pytest.mark.parametrize("task", ALL_TASKS)
def test_right_answers_are_well_formed(task: str) -> None:
    answers = [example.answer for name in ("train", "test") for example in split(task, name)]
    assert not [answer for answer in answers if not re.fullmatch(FORMS[task], answer)]
    assert all(answer == answer.strip() for answer in answers)


def test_a_record_is_json() -> None:
    for example in split("json", "test"):
        record = json.loads(example.answer)
        assert record["who"] in example.prompt
        assert str(record["eur"]) in example.prompt


def test_a_normalized_date_is_the_one_that_the_prompt_names() -> None:
    for example in split("dates", "test"):
        when = datetime.fromisoformat(example.answer.partition("[")[2].removesuffix("]."))
        assert f"{when:%H:%M}" in example.prompt
        assert re.search(rf"\b{when.day}\b", example.prompt)
        assert str(when.year) in example.prompt


def test_a_label_does_not_follow_from_the_names_and_numbers_of_a_message() -> None:
    answers: dict[str, set[str]] = {}
    for example in split("topic", "train"):
        for word in re.findall(r"[A-Z]\w+|\d+", example.prompt.partition(":")[2]):
            answers.setdefault(word, set()).add(example.answer)
    assert min(len(answers[word]) for word in ("Chile", "Grace", "50")) > 2


def test_every_adapter_has_a_seed_of_its_own_and_examples_left_over() -> None:
    assert TRAININGS.keys() == ALL_TASKS.keys()
    assert len({training.seed for training in TRAININGS.values()}) == len(TRAININGS)
    assert all(training.steps * BATCH_SIZE < TRAIN_SIZE for training in TRAININGS.values())
