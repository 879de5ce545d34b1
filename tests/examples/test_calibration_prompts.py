"""The prompts to calibrate on are those that their script writes, and no training or test has used them."""

from __future__ import annotations

import json

import pytest

from calibration_prompts import COUNT, prompts_file, prompts_text
from more_tasks import ALL_TASKS
from tasks import TASKS, TEST_SIZE, examples
from train import BATCH_SIZE, TRAININGS


@pytest.mark.parametrize("task", TASKS)
def test_the_prompts_in_the_repository_are_those_of_the_script(task: str) -> None:
    assert prompts_file(task).read_text(encoding="utf-8") == prompts_text(TASKS[task])


@pytest.mark.parametrize("name", ALL_TASKS)
def test_prompts_are_neither_of_the_training_nor_of_the_test(name: str) -> None:
    task = ALL_TASKS[name]
    lines = [json.loads(line) for line in prompts_text(task).splitlines()]
    prompts = {line["messages"][0]["content"] if task.chat else line["prompt"] for line in lines}
    used = examples(task, "train", TRAININGS[name].steps * BATCH_SIZE) + examples(task, "test", TEST_SIZE)
    assert len(prompts) == COUNT
    assert not prompts & {example.prompt for example in used}
