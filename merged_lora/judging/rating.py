"""Rates a served model on labelled examples, each by one number: for a search, which compares many models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merged_lora.errors import EvaluationError
from merged_lora.prompts import Example, Tasks

from .evaluation import LIKELIHOOD
from .scores import METRICS
from .served import NoLikelihoodError, Served
from .waiting import gathered


class Rater:
    """Rates models of a server.

    server:   which is asked.
    score:    ``likelihood``, in nats per token of the first right answer, or a metric of the model's answer.
    limit:    largest number of tokens of such an answer.
    """

    def __init__(self, server: Served, score: str, limit: int) -> None:
        if score not in (LIKELIHOOD, *METRICS):
            raise EvaluationError(
                f"the score must be one of {', '.join((LIKELIHOOD, *METRICS))}, got {score!r}"
            )
        self._server, self._score, self._limit = server, score, limit

    @property
    def requests(self) -> int:
        """How many requests the server has answered."""
        return self._server.requests

    async def rate(
        self, model: str, tasks: Tasks, which: Mapping[str, Sequence[int]]
    ) -> dict[str, list[float]]:
        """The ratings of some examples of each task, by their numbers, all asked for at the same time.

        Raises RefusedError if the server refuses the model.
        """
        asked = [(task, i) for task, numbers in which.items() for i in numbers]
        found = await gathered(self._rated(model, tasks[task][i]) for task, i in asked)
        rated: dict[str, list[float]] = {task: [] for task in which}
        for (task, _), value in zip(asked, found, strict=True):
            rated[task].append(value)
        return rated

    async def _rated(self, model: str, example: Example) -> float:
        if self._score != LIKELIHOOD:
            answer = await self._server.answer(model, example.prompt, self._limit)
            return METRICS[self._score](answer, example.answers)
        try:
            found = await self._server.likelihood_of(model, example.prompt, example.answers[0])
        except NoLikelihoodError as error:
            raise EvaluationError(f"{error}; score answers instead, such as with --score exact") from None
        return found.log_likelihood / found.tokens
