"""Searches for the merge that keeps most of every source, on a server that makes each when it is asked for.

A trial is scored by how likely it makes the right answers of some examples, the dev examples.  The best one
is then compared with the best default on examples that took no part in the search, the report examples.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from merged_lora.errors import EvaluationError, listed
from merged_lora.prompts import Example, Tasks
from merged_lora.strategies import find

from .evaluating import LIMIT, Data, evaluate, read_tasks, sources_of
from .evaluation import LIKELIHOOD
from .objectives import Objective
from .proposals import STRATEGIES
from .rating import Rater
from .results import Results
from .scores import METRICS, check_installed, difference
from .searching import SEED, Scale, Search, order, reference
from .served import Served, base_among, check_number
from .tuned import Trial, Tuning, best_of
from .waiting import finished

FORMAT = 1
"""Version of a study; a file of another is refused."""
Progress = Callable[[Trial, Trial | None], object]


def tune(
    base_url: str,
    data: Data,
    *,
    report: Data | None = None,
    sources: Mapping[str, str] | None = None,
    base: str | None = None,
    strategies: Sequence[str] = STRATEGIES,
    ranks: Sequence[int] = (),
    objective: str | Mapping[str, float] = "worst",
    score: str = LIKELIHOOD,
    trials: int = 60,
    minutes: float | None = None,
    metric: str = "exact",
    count: int | None = None,
    limit: int = LIMIT,
    concurrency: int = 8,
    study: str | os.PathLike[str] | None = None,
    api_key: str | None = None,
    progress: Progress = lambda trial, best: None,
) -> Tuning:
    """Search for the merge that keeps most of every source.

    base_url:    of the server's API, such as ``http://localhost:8000/v1``.
    data:        for each task a file of examples, or the examples.
    report:      examples of each task that take no part in the search; by default half of ``data``, drawn at
                 random, which the search then lacks.
    sources:     for each task the name of the adapter that was trained for it; by default the task's own.
    base:        the base model, if the server lists several; by default the one that the sources belong to.
    strategies:  that are tried.
    ranks:       that are tried of strategies with a rank to choose, beside their own.
    objective:   what is made large: the ``worst`` gain, the ``mean``, or a mean with these weights of tasks.
    score:       by which merges are chosen: the ``likelihood`` of the right answer, or a metric as below of
                 the merge's own, which needs many more examples.
    trials:      how many merges are tried at most, with those of an earlier run.
    minutes:     after which no trial is begun; the report comes after that.
    metric:      of the report: ``exact``, ``contains`` or ``rouge-l``.
    count:       the first so many examples of each task alone.
    limit:       largest number of tokens of an answer.
    concurrency: requests at a time.
    study:       a file of trials, which a later run goes on from.
    api_key:     of the server; by default in the environment variable OPENAI_API_KEY.
    progress:    called with every trial that ended, and with the best one so far.

    Needs optuna and openai, of the extra ``tune``.  Raises MergeError.
    """
    dev, rest = divided(data, report, count)
    aim = Objective(objective, tuple(dev))
    _check(strategies, ranks, trials, minutes, metric, limit)
    names = sources_of(dev, sources or {})
    started = time.monotonic()

    async def searched() -> tuple[Search, Scale, dict[str, dict[str, list[float]]], int]:
        server = Served(base_url, api_key, concurrency)
        try:
            rater = Rater(server, score, limit)
            model = base_among(await server.models(), names.values(), server.base_url, base)
            about = {
                "format": FORMAT,
                "base": model,
                "sources": names,
                "strategies": list(strategies),
                "ranks": list(ranks),
                "objective": aim.given,
                "score": score if score == LIKELIHOOD else f"{score}, {limit} tokens",
                "examples": _digest(dev),
            }
            kept = Results(None if study is None else Path(study), about)
            search = Search(dev, names, strategies, ranks, aim, kept, progress)
            # What the report needs is measured first: a search whose report fails would be lost.
            others = await reference(rater, model, rest, names)
            await search.run(rater, await reference(rater, model, dev, names), trials, minutes)
            specs = dict.fromkeys(trial.spec for trial in _compared(search.trials))
            every = {task: order(len(examples)) for task, examples in rest.items()}
            return search, others, {s: await rater.rate(s, rest, every) for s in specs}, rater.requests
        finally:
            await server.close()

    search, scale, rated, requests = finished(searched())
    best, default = _compared(search.trials)
    evaluation = evaluate(
        base_url,
        rest,
        list(rated),
        sources=names,
        base=base,
        metric=metric,
        limit=limit,
        likelihood=False,
        concurrency=concurrency,
        api_key=api_key,
    )
    chosen, usual, alone = (
        {task: evaluation.scores(model or names[task], task) for task in rest}
        for model in (best.spec, default.spec, None)
    )
    return Tuning(
        objective=aim,
        score=score,
        trials=tuple(search.trials),
        untried=tuple(search.untried),
        best=best,
        default=default,
        gains={spec: scale.gains(scores) for spec, scores in rated.items()},
        evaluation=evaluation,
        margin=difference(chosen, usual, alone, aim.value),
        gain_margin=difference(rated[best.spec], rated[default.spec], scale.own, aim.value, scale.base),
        importance=search.importance(),
        seconds=time.monotonic() - started,
        requests=requests + sum(map(len, evaluation.rows.values())),
    )


def _compared(trials: Sequence[Trial]) -> tuple[Trial, Trial]:
    """The best trial, and the best default; a search that ended has both."""
    best, default = best_of(trials), best_of([trial for trial in trials if trial.default])
    assert best is not None
    assert default is not None
    return best, default


def _check(
    strategies: Sequence[str],
    ranks: Sequence[int],
    trials: int,
    minutes: float | None,
    metric: str,
    limit: int,
) -> None:
    """Raise MergeError for what cannot be searched as asked."""
    try:
        import optuna
    except ImportError as error:
        raise EvaluationError(
            f"a search needs optuna, which cannot be imported ({error}): pip install 'vllm-merged-lora[tune]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if metric not in METRICS:
        raise EvaluationError(f"the metric must be one of {', '.join(METRICS)}, got {metric!r}")
    check_installed()
    check_number("trials", trials)
    check_number("tokens of an answer", limit)
    if minutes is not None and not minutes > 0:
        raise EvaluationError(f"the minutes must be more than 0, got {minutes!r}")
    if any(isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 for rank in ranks):
        raise EvaluationError(f"ranks must be whole numbers of at least 1, got {list(ranks)}")
    if not strategies:
        raise EvaluationError("there is no strategy to try")
    for name in strategies:
        find(name)


def _digest(tasks: Tasks) -> str:
    """What all examples together are known by."""
    text = json.dumps({task: [[e.prompt, e.answers] for e in each] for task, each in tasks.items()})
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def divided(data: Data, report: Data | None, count: int | None) -> tuple[Tasks, Tasks]:
    """The dev examples and the report examples of each task; raises EvaluationError.

    An example that is among both by its prompt would make the report worthless, and is an error.
    """
    given = read_tasks(data, count)
    if report is None:
        halves = {task: _halves(examples) for task, examples in given.items()}
        dev: Tasks = {task: first for task, (first, _) in halves.items()}
        rest: Tasks = {task: second for task, (_, second) in halves.items()}
        few = [task for task, examples in rest.items() if not examples]
        if few:
            raise EvaluationError(f"{listed(few)} needs two prompts or more, one of them for the report")
    else:
        dev, rest = given, read_tasks(report, count)
        if dev.keys() != rest.keys():
            different = ", ".join(sorted(dev.keys() ^ rest.keys()))
            raise EvaluationError(f"{different}: every task needs examples for the search and for the report")
    for task in dev:
        both = {str(e.prompt) for e in dev[task]} & {str(e.prompt) for e in rest[task]}
        if both:
            raise EvaluationError(
                f"{task}: {len(both)} prompts are among the examples of the search and of the report: "
                f"{sorted(both)[0][:80]}"
            )
    return dev, rest


def _halves(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """The examples in two halves, drawn at random, always the same; those of one prompt stay together."""
    prompts = list(dict.fromkeys(str(example.prompt) for example in examples))
    random.Random(SEED).shuffle(prompts)
    first = set(prompts[: (len(prompts) + 1) // 2])
    return (
        [example for example in examples if str(example.prompt) in first],
        [example for example in examples if str(example.prompt) not in first],
    )
