"""A server on which some merges are better than others, and known to be: for searches."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from merged_lora.errors import MergeError
from merged_lora.prompts import Example
from merged_lora.spec import parse
from openai_server import OpenAIServer

TASKS = ("chat", "sql")
WORST, BEST = math.log(0.1), math.log(0.9)
"""Log-probability of a token of a right answer, of the base model and of a task's source."""


def examples(count: int) -> dict[str, Sequence[Example]]:
    """So many of each task; half of them will be the report's."""
    return {task: [Example(i, f"{task} {i}", (answer(task, i),)) for i in range(count)] for task in TASKS}


def answer(task: str, number: int) -> str:
    """The right one."""
    return f"{task[0].upper()}{number:02}"


def gain(model: str, task: str) -> float:
    """How far a model comes from the base model to a task's source.

    A merge loses a fifth for each doubling of its weights away from twice as much chat as sql, on the task
    that gets less than that; knots loses half of everything.
    """
    if model in ("base", *TASKS):
        return float(model == task)
    spec = parse(model)
    weights = {source.name: source.weight for source in spec.sources}
    octaves = math.log2(weights.get("chat", 2.0) / weights.get("sql", 1.0)) - 1.0
    lost = 0.2 * max(0.0, -octaves if task == "chat" else octaves)
    return (0.5 if spec.strategy == "knots" else 1.0) * (1.0 - lost)


class Landscape(OpenAIServer):
    """Answers as :func:`gain` has it: a right answer to as many of a task's examples.

    refuses: strategies that the server makes no merge by.
    """

    refuses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.answers = self._answer
        self.fault = self._fault
        super().__post_init__()

    def reply(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        found = super().reply(path, body)
        prompt = body.get("prompt")
        if self.rates and path == "/v1/completions" and isinstance(prompt, list):
            task = "".join(map(chr, prompt)).partition(" ")[0]
            entry = {"logprob": WORST + gain(body["model"], task) * (BEST - WORST)}
            found["choices"][0]["prompt_logprobs"] = [None, *({str(token): entry} for token in prompt[1:])]
        return found

    def _answer(self, model: str, prompt: str) -> str:
        task, number = prompt.split()
        right = int(number) // 2 % 10 < 10 * gain(model, task)  # in each half of the examples
        return answer(task, int(number)) if right else "wrong"

    def _fault(
        self, path: str, body: Mapping[str, Any]
    ) -> tuple[int, Mapping[str, Any], Mapping[str, str]] | None:
        try:
            strategy = parse(body["model"]).strategy if "(" in body["model"] else ""
        except MergeError as error:
            return 400, {"error": {"message": str(error)}}, {}
        if strategy in self.refuses:
            return 400, {"error": {"message": f"{strategy} needs a calibration of every source"}}, {}
        return None


def rows(text: str) -> list[Any]:
    """The values of a file of results."""
    return [json.loads(line) for line in text.splitlines()]
