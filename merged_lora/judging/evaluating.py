"""Evaluates merges on a server: the base model, each source and each merge on labelled examples."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merged_lora.errors import EvaluationError, listed
from merged_lora.prompts import Example, Tasks, read_examples
from merged_lora.spec import MergeSpec, parse

from .evaluation import LIKELIHOOD, Evaluation, Row
from .results import Results
from .scores import METRICS, check_installed
from .served import Likelihood, NoLikelihoodError, RefusedError, Served, base_among, check_number
from .waiting import finished, gathered

LIMIT = 256
"""Tokens of an answer."""
FORMAT = 1
"""Version of a file of results; one of another is refused."""
Data = Mapping[str, str | os.PathLike[str] | Sequence[Example]]
"""For each task a file of examples, or the examples."""


def evaluate(
    base_url: str,
    data: Data,
    specs: Iterable[str | MergeSpec] = (),
    *,
    sources: Mapping[str, str] | None = None,
    base: str | None = None,
    metric: str = "exact",
    count: int | None = None,
    limit: int = LIMIT,
    likelihood: bool = True,
    concurrency: int = 8,
    results: str | os.PathLike[str] | None = None,
    api_key: str | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Evaluation:
    """Run a served base model, its adapters and merges of them on labelled examples.

    Models are run one after the other, and the examples of each at the same time.  What ``results`` has is
    not measured again.  A merge that the server refuses is a part of the result.

    base_url:    of the server's API, such as ``http://localhost:8000/v1``.
    data:        for each task a file of examples, or the examples.
    specs:       merges to evaluate, or names of served models, such as aliases.
    sources:     for each task the name of the adapter that was trained for it; by default the task's own.
    base:        the base model, if the server lists several; by default the one that the sources belong to.
    metric:      ``exact``, ``contains``, ``rouge-l`` or ``likelihood``: what the tables and retention are of.
    count:       the first so many examples of each task alone.
    limit:       largest number of tokens of an answer.
    likelihood:  whether to measure how likely right answers are, if the server can say.
    concurrency: requests at a time.
    results:     a file of rows, which is written as they are measured.
    api_key:     of the server; by default in the environment variable OPENAI_API_KEY.
    progress:    called with the number of examples that are done, and of all.

    Raises MergeError: for examples that cannot be read, a server that fails, and results that cannot be
    written.
    """
    tasks = read_tasks(data, count)
    if metric not in (*METRICS, LIKELIHOOD):
        raise EvaluationError(
            f"the metric must be one of {', '.join((*METRICS, LIKELIHOOD))}, got {metric!r}"
        )
    check_number("tokens of an answer", limit)
    named = sources_of(tasks, sources or {})
    if metric == LIKELIHOOD and not likelihood:
        raise EvaluationError("the metric likelihood cannot be had without likelihoods")
    check_installed()
    kept = Results(None if results is None else Path(results), {"format": FORMAT, "limit": limit})
    run = _Run(tasks, named, base, tuple(specs), metric, limit, likelihood, kept, progress)
    return finished(run.run(Served(base_url, api_key, concurrency)))


def read_tasks(data: Data, count: int | None = None) -> dict[str, Sequence[Example]]:
    """The examples of every task; raises EvaluationError.

    count: the first so many of each alone.
    """
    if not isinstance(data, Mapping) or not data:
        raise EvaluationError("there is no task; name at least one with a file of examples")
    if count is not None:
        check_number("examples", count)
    found: dict[str, Sequence[Example]] = {}
    for task, given in data.items():
        found[task] = read_examples(Path(given)) if isinstance(given, str | os.PathLike) else list(given)
        if not found[task]:
            raise EvaluationError(f"{task} has no examples")
        blank = [
            each.line for each in found[task] if not each.answers or not all(map(str.strip, each.answers))
        ]
        if blank:
            raise EvaluationError(f"line {blank[0]} of {task} has an answer without any text, or none")
    return {task: examples[:count] for task, examples in found.items()}


def sources_of(tasks: Tasks, given: Mapping[str, str]) -> dict[str, str]:
    """The adapter of each task, by default the one of its name; raises EvaluationError.

    given: those that are named otherwise.
    """
    if unused := sorted(given.keys() - tasks.keys()):
        raise EvaluationError(f"{listed(unused)} has a source and no examples")
    return {task: given.get(task, task) for task in tasks}


class _Run:
    """One evaluation."""

    def __init__(
        self,
        tasks: Tasks,
        sources: Mapping[str, str],
        base: str | None,
        specs: Sequence[str | MergeSpec],
        metric: str,
        limit: int,
        likelihood: bool,
        results: Results,
        progress: Callable[[int, int], object],
    ) -> None:
        self._tasks, self._sources, self._base, self._given = tasks, sources, base, specs
        self._specs: tuple[str, ...] = ()
        self._metric, self._limit, self._likelihood = metric, limit, likelihood
        self._results, self._progress = results, progress
        self._notes: list[str] = []
        self._done = self._total = 0

    async def run(self, server: Served) -> Evaluation:
        """Measure what is missing."""
        try:
            listed_models = await server.models()
            base = base_among(listed_models, self._sources.values(), server.base_url, self._base)
            # A name that the server lists need not be a spec.
            names = [str(g) if str(g) in listed_models else str(parse(str(g))) for g in self._given]
            self._specs = tuple(dict.fromkeys(names))
            jobs = [(base, task) for task in self._tasks]
            jobs += [(source, task) for task, source in self._sources.items()]
            jobs += [(spec, task) for spec in self._specs for task in self._tasks]
            self._total = sum(len(self._tasks[task]) for _, task in jobs)
            refused: dict[str, str] = {}
            rows: dict[tuple[str, str], Sequence[Row]] = {}
            with self._results.open():
                for model, task in jobs:
                    if model not in refused:
                        try:
                            rows[model, task] = await self._measure(server, model, task)
                        except RefusedError as error:
                            if model not in self._specs:
                                raise
                            refused[model] = str(error)
                            rows = {key: value for key, value in rows.items() if key[0] != model}
            return Evaluation(
                base, self._sources, self._specs, refused, rows, self._metric, tuple(self._notes)
            )
        finally:
            await server.close()

    async def _measure(self, server: Served, model: str, task: str) -> Sequence[Row]:
        """A row for each example of a task, all at the same time."""
        return await gathered(self._row(server, model, task, each) for each in self._tasks[task])

    async def _row(self, server: Served, model: str, task: str, example: Example) -> Row:
        key = hashlib.blake2b(
            json.dumps([model, task, example.prompt, example.answers]).encode(), digest_size=16
        ).hexdigest()
        there = self._results.get(key)
        try:
            row = await self._measured(server, model, example, there)
        except RefusedError as error:
            if model in self._specs:
                raise
            raise EvaluationError(f"line {example.line} of {task}: {error}") from None
        if row is not there:
            self._results.add(key, {"model": model, "task": task, **row})
        self._done += 1
        self._progress(self._done, self._total)
        scores = {name: score(row["answer"], example.answers) for name, score in METRICS.items()}
        if self._likelihood and row[LIKELIHOOD] is not None:
            scores[LIKELIHOOD] = row[LIKELIHOOD]
        return Row(row["answer"], scores)

    async def _measured(
        self, server: Served, model: str, example: Example, there: Mapping[str, Any] | None
    ) -> Mapping[str, Any]:
        """An answer, and how likely the right one is: what is there, or with what it lacks."""
        row = there
        if row is None:
            answer = await server.answer(model, example.prompt, self._limit)
            row = {"answer": answer, LIKELIHOOD: None}
        if row[LIKELIHOOD] is not None or (found := await self._rated(server, model, example)) is None:
            return row
        return {**row, LIKELIHOOD: math.exp(found.log_likelihood / found.tokens)}

    async def _rated(self, server: Served, model: str, example: Example) -> Likelihood | None:
        """How likely the first right answer is; None if the server cannot say."""
        if not self._likelihood:
            return None
        try:
            return await server.likelihood_of(model, example.prompt, example.answers[0])
        except NoLikelihoodError as error:
            if self._metric == LIKELIHOOD:
                raise
            if self._likelihood:  # else another request, which ran beside this one, has said so
                self._likelihood = False
                self._notes.append(f"The likelihood of right answers was not measured: {error}.")
            return None
