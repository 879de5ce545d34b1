"""Searches for the merge that keeps most of every source, on a server that makes each when it is asked for.

A trial is scored by how likely it makes the right answers of some examples, the dev examples.  The best one
is then compared with the best default on examples that took no part in the search, the report examples.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merged_lora.errors import EvaluationError
from merged_lora.prompts import Example
from merged_lora.recipe import SCALED, Value
from merged_lora.spec import MergeSpec, Source
from merged_lora.strategies import find

from .evaluating import Tasks, evaluate, read_tasks
from .results import Results
from .scores import worst_difference
from .served import RefusedError, Served
from .tuned import State, Trial, Tuning, best_of

if TYPE_CHECKING:
    import optuna

DEFAULTS: tuple[tuple[str, Mapping[str, Value]], ...] = (
    ("regmean", {}),
    ("knots", {"automatic": True}),
    ("core_ties", {"automatic": True}),
    ("iso", {}),
    ("ties", {"density": 0.2}),
    ("sum", {}),
    ("sum", {"automatic": True}),
)
"""What a user would take without a search: merges that a search begins with, and has to beat."""
STRATEGIES = ("regmean", "knots", "core_ties", "iso", "ties", "ties_svd", "sum")
"""What is tried unless strategies are named: the better ones of docs/quality.md, one of each kind."""
WEIGHTS, SCALES, DENSITIES = (0.25, 4.0), (0.5, 2.0), (0.05, 1.0)
"""Ranges of what is tried."""
BLOCKS = 4
"""A trial is scored on so many parts of the examples, one after the other, and may be given up after each."""
DEV = 0.5
"""Share of the examples of each task that merges are chosen on, unless files keep them apart."""
SEED = 0


class Neutral:
    """Suggests what leaves a merge as it would be without a search, and writes down what it was asked for.

    given: what differs from that.
    """

    def __init__(self, given: Mapping[str, Value]) -> None:
        self._given = given
        self.params: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.params.setdefault(name, self._given.get(name, choices[0]))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> Any:
        del low, high, log
        return self.params.setdefault(name, self._given.get(name, 1.0))


def proposal(
    trial: optuna.Trial | Neutral, sources: Sequence[str], strategies: Sequence[str], ranks: Sequence[int]
) -> MergeSpec:
    """A merge from what the optimiser suggests: a strategy, and what that strategy takes.

    ranks: that a result may have; empty for the strategy's own.
    """
    strategy = find(trial.suggest_categorical("strategy", list(strategies)))
    recipe, options = strategy.recipe, dict[str, Value]()
    automatic = not recipe.balances and trial.suggest_categorical("automatic", [False, True])
    weights = [1.0] * len(sources)
    if automatic:
        options["weights"] = "auto"
    else:
        weights = [trial.suggest_float(f"weight of {name}", *WEIGHTS, log=True) for name in sources]
    if strategy.option("density"):
        options["density"] = round(trial.suggest_float("density", *DENSITIES), 2)
    if automatic or recipe.blend in (*SCALED, "agreeing_mean"):  # there, weights do not change the length
        options["scale"] = round(trial.suggest_float("scale", *SCALES, log=True), 2)
    if strategy.option("rank") and ranks:
        options["rank"] = trial.suggest_categorical("rank", list(ranks))
    named = tuple(Source(name, round(weight, 2)) for name, weight in zip(sources, weights, strict=True))
    return MergeSpec(strategy.name, named, tuple(options.items()))


def tune(
    base_url: str,
    data: Mapping[str, str | os.PathLike[str] | Sequence[Example]],
    *,
    report: Mapping[str, str | os.PathLike[str] | Sequence[Example]] | None = None,
    sources: Mapping[str, str] | None = None,
    strategies: Sequence[str] = STRATEGIES,
    ranks: Sequence[int] = (),
    objective: str | Mapping[str, float] = "worst",
    trials: int = 60,
    minutes: float | None = None,
    metric: str = "exact",
    count: int | None = None,
    limit: int = 256,
    concurrency: int = 8,
    study: str | os.PathLike[str] | None = None,
    api_key: str | None = None,
    progress: Callable[[Trial, Trial | None], object] = lambda trial, best: None,
) -> Tuning:
    """Search for the merge that keeps most of every source.

    base_url:    of the server's API, such as ``http://localhost:8000/v1``.
    data:        for each task a file of examples, or the examples.
    report:      examples of each task that take no part in the search; by default every second one of
                 ``data``, which then takes none.
    sources:     for each task the name of the adapter that was trained for it; by default the task's own.
    strategies:  that are tried.
    ranks:       that are tried of strategies with a rank to choose.
    objective:   what is made large: the ``worst`` gain, the ``mean``, or a mean with these weights of tasks.
    trials:      how many merges are tried at most, with those of an earlier run.
    minutes:     after which no trial is begun.
    metric:      of the report, as in :func:`merged_lora.judging.evaluating.evaluate`.
    count:       the first so many examples of each task alone.
    limit:       largest number of tokens of an answer in the report.
    concurrency: requests at a time.
    study:       a file of trials, which a later run goes on from.
    api_key:     of the server; by default in the environment variable OPENAI_API_KEY.
    progress:    called with every trial that ended, and with the best one so far.

    Needs optuna and openai, of the extra ``tune``.  Raises MergeError.
    """
    dev, rest = divided(data, report, count)
    names = {task: (sources or {}).get(task, task) for task in dev}
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
        raise EvaluationError(f"the number of trials must be at least 1, got {trials!r}")
    if minutes is not None and not minutes > 0:
        raise EvaluationError(f"the minutes must be more than 0, got {minutes!r}")
    if not isinstance(objective, str):
        unknown = sorted(objective.keys() - dev.keys())
        if unknown or not sum(objective.values()) > 0 or min(objective.values()) < 0:
            raise EvaluationError(f"the objective gives tasks their weights; {unknown or objective} does not")
    elif objective not in ("worst", "mean"):
        raise EvaluationError(f"the objective must be worst, mean or weights of tasks, got {objective!r}")
    for name in strategies:
        find(name)
    about = {
        "sources": names,
        "strategies": list(strategies),
        "ranks": list(ranks),
        "objective": objective if isinstance(objective, str) else dict(objective),
        "examples": {task: [[e.prompt, e.answers] for e in each] for task, each in dev.items()},
    }
    kept = Results(None if study is None else Path(study), about)
    search = _Search(dev, names, strategies, ranks, objective, kept, progress)
    began = time.monotonic()
    asyncio.run(search.run(Served(base_url, api_key, concurrency), trials, minutes))
    searched = time.monotonic()
    best, default = best_of(search.trials), best_of([trial for trial in search.trials if trial.default])
    if best is None or default is None:
        reasons = sorted({trial.reason for trial in search.trials if trial.reason})
        raise EvaluationError(f"the server refuses every default merge: {'; '.join(reasons[:3])}")
    specs = list(dict.fromkeys((best.spec, default.spec)))
    evaluation = evaluate(
        base_url, rest, specs, sources=names, metric=metric, limit=limit, likelihood=False,
        concurrency=concurrency, api_key=api_key,
    )  # fmt: skip
    gains = asyncio.run(_Search(rest, names, strategies, ranks, objective, Results(None, {}), progress)
                        .gains_of(Served(base_url, api_key, concurrency), specs))  # fmt: skip
    margin = worst_difference(*[
        {task: evaluation.scores(model or names[task], task) for task in rest}
        for model in (best.spec, default.spec, None)
    ])  # fmt: skip
    return Tuning(
        objective=objective,
        trials=tuple(search.trials),
        best=best,
        default=default,
        gains=gains,
        evaluation=evaluation,
        margin=margin,
        importance=search.importance(),
        seconds=(searched - began, time.monotonic() - searched),
        requests=search.requests + sum(map(len, evaluation.rows.values())),
    )


def divided(
    data: Mapping[str, str | os.PathLike[str] | Sequence[Example]],
    report: Mapping[str, str | os.PathLike[str] | Sequence[Example]] | None,
    count: int | None,
) -> tuple[Tasks, Tasks]:
    """The dev examples and the report examples of each task; raises EvaluationError.

    An example that is among both by its prompt would make the report worthless, and is an error.
    """
    given = read_tasks(data, count)
    if report is None:
        dev = {task: examples[::2] for task, examples in given.items()}
        rest = {task: examples[1::2] for task, examples in given.items()}
        few = [task for task, examples in rest.items() if not examples]
        if few:
            raise EvaluationError(f"{', '.join(few)} needs two examples or more, one of them for the report")
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


class _Search:
    """One search.

    Log-likelihoods of right answers, in nats per token, are kept by model and task, example by example.
    """

    def __init__(
        self,
        tasks: Tasks,
        sources: Mapping[str, str],
        strategies: Sequence[str],
        ranks: Sequence[int],
        objective: str | Mapping[str, float],
        results: Results,
        progress: Callable[[Trial, Trial | None], object],
    ) -> None:
        self._tasks, self._sources, self._objective = tasks, sources, objective
        self._strategies, self._ranks = strategies, ranks
        self._results, self._progress = results, progress
        self._tokens: dict[tuple[str, int], tuple[list[int], list[int]]] = {}
        self._base: dict[str, np.ndarray[Any, np.dtype[np.float64]]] = {}
        self._scale: dict[str, float] = {}
        self._best: dict[str, list[float]] = {}
        self.trials: list[Trial] = []
        self.requests = 0
        self._study: optuna.Study | None = None

    async def run(self, server: Served, trials: int, minutes: float | None) -> None:
        """Try merges until there are so many, or the time is over."""
        try:
            end = math.inf if minutes is None else time.monotonic() + 60.0 * minutes
            await self._refer(server)
            with self._results.open():
                study = self._study = self._begun()
                while len(self.trials) < trials and time.monotonic() < end:
                    await self._try(server, study)
        finally:
            await server.close()

    async def gains_of(self, server: Served, specs: Sequence[str]) -> dict[str, dict[str, float]]:
        """The gain of each merge by task, on all examples."""
        try:
            await self._refer(server)
            found = {}
            for spec in specs:
                values = {
                    task: await self._all(server, spec, task, self._order(task)) for task in self._tasks
                }
                found[spec] = self._gains(values)
            return found
        finally:
            await server.close()

    def importance(self) -> dict[str, float]:
        """The share of the variation of the value that each choice explains; empty with too few trials."""
        import optuna

        if self._study is None:
            return {}
        done = [
            t for t in self._study.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE
        ]
        if len(done) < 10 or len({t.value for t in done}) < 2:
            return {}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(self._study, evaluator=evaluator)
        return {name: float(share) for name, share in found.items()}

    async def _refer(self, server: Served) -> None:
        """Measure the base model and each source, between which gains are measured."""
        models = await server.models()
        missing = sorted(set(self._sources.values()) - models.keys())
        if missing:
            raise EvaluationError(
                f"{server.base_url} serves no {', '.join(missing)}; it lists {', '.join(models)}"
            )
        base = next((name for name, parent in models.items() if parent is None), None)
        if base is None:
            raise EvaluationError(f"{server.base_url} lists no base model")
        for task, examples in self._tasks.items():
            for i, example in enumerate(examples):
                self._tokens[task, i] = await server.tokens(base, example.prompt, example.answers[0])
            everything = range(len(examples))
            own = np.array(await self._all(server, self._sources[task], task, everything))
            self._base[task] = np.array(await self._all(server, base, task, everything))
            self._scale[task] = float((own - self._base[task]).mean())
            if self._scale[task] <= 0:
                raise EvaluationError(
                    f"{task}: {self._sources[task]} does not make right answers more likely than {base} "
                    "does, so there is nothing to keep; leave the task out, or name its adapter with --source"
                )

    async def _all(self, server: Served, model: str, task: str, which: Sequence[int]) -> list[float]:
        """Log-likelihoods of some examples, in nats per token, asked for at the same time."""
        work = [asyncio.ensure_future(self._rated(server, model, task, i)) for i in which]
        try:
            return list(await asyncio.gather(*work))
        finally:
            for each in work:
                each.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    async def _rated(self, server: Served, model: str, task: str, i: int) -> float:
        asked, answer = self._tokens[task, i]
        found = await server.likelihood(model, asked, answer)
        self.requests += 1
        return found.log_likelihood / found.tokens

    def _begun(self) -> optuna.Study:
        """A study with the trials of an earlier run, and the defaults that it lacks."""
        try:
            import optuna
        except ImportError as error:
            raise EvaluationError(
                f"a search needs optuna, which cannot be imported ({error}): "
                "pip install 'vllm-merged-lora[tune]'"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=SEED, multivariate=True, group=True, n_startup_trials=10)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for i in range(len(self._results)):
            row = self._results[str(i)]
            study.add_trial(_frozen(row))
            self._keep(Trial(**row["trial"] | {"value": _number(row["trial"]["value"])}), row["values"])
        tried = {trial.spec for trial in self.trials}
        for strategy, given in DEFAULTS:
            neutral = Neutral({"strategy": strategy, **given})
            spec = proposal(neutral, list(self._sources.values()), self._strategies, self._ranks)
            if strategy in self._strategies and str(spec) not in tried:
                study.enqueue_trial(neutral.params, user_attrs={"default": True})
        return study

    async def _try(self, server: Served, study: optuna.Study) -> None:
        """One trial: made by the server, scored block by block, given up if it cannot win any more."""
        import optuna

        asked = study.ask()
        spec = str(proposal(asked, list(self._sources.values()), self._strategies, self._ranks))
        default = bool(asked.user_attrs.get("default", False))
        values: dict[str, list[float]] = {task: [] for task in self._tasks}
        state: State = "done"
        began, reason = time.monotonic(), ""
        try:
            for block in range(BLOCKS):
                for task, examples in self._tasks.items():
                    which = range(len(examples))[block::BLOCKS]
                    values[task] += await self._all(server, spec, task, which)
                if not default and block < BLOCKS - 1 and self._hopeless(values):
                    state = "given up"
                    break
        except RefusedError as error:
            state, reason = "refused", str(error)
        gains = self._gains(values) if state != "refused" else {}
        value = self._value(gains) if gains else math.nan
        trial = Trial(len(self.trials), spec, default, state, gains, value, time.monotonic() - began, reason)
        states = optuna.trial.TrialState
        study.tell(
            asked,
            value if state != "refused" else None,
            state=states.COMPLETE if state != "refused" else states.FAIL,
        )
        frozen = study.get_trials(deepcopy=False)[-1]
        row = {
            "trial": asdict(trial) | {"value": None if math.isnan(value) else value},
            "values": values,
            "params": asked.params,
            "distributions": {
                name: optuna.distributions.distribution_to_json(each)
                for name, each in frozen.distributions.items()
            },
        }
        self._results.add(str(trial.number), row)
        self._keep(trial, values)
        self._progress(trial, best_of(self.trials))

    def _keep(self, trial: Trial, values: Mapping[str, Sequence[float]]) -> None:
        self.trials.append(trial)
        if trial is best_of(self.trials):
            self._best = {task: list(each) for task, each in values.items()}

    def _gains(self, values: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """How far each task comes from the base model to its source, on the examples rated so far."""
        found = {}
        for task, each in values.items():
            order = self._order(task)[: len(each)]
            found[task] = float((np.array(each) - self._base[task][order]).mean()) / self._scale[task]
        return found

    def _order(self, task: str) -> list[int]:
        """The examples of a task in the order in which the blocks rate them."""
        count = len(self._tasks[task])
        return [i for block in range(BLOCKS) for i in range(count)[block::BLOCKS]]

    def _value(self, gains: Mapping[str, float]) -> float:
        if self._objective == "worst":
            return min(gains.values())
        weights = dict.fromkeys(gains, 1.0) if isinstance(self._objective, str) else self._objective
        return sum(weights.get(task, 0.0) * gain for task, gain in gains.items()) / sum(weights.values())

    def _hopeless(self, values: Mapping[str, Sequence[float]]) -> bool:
        """Whether a trial is behind the best one on the same examples by more than chance gives.

        Its value, and the standard error of the difference on its worst task, are those of what was rated.
        """
        if not self._best:
            return False
        best = {task: self._best[task][: len(each)] for task, each in values.items()}
        gains = self._gains(values)
        task = min(gains, key=gains.__getitem__)
        difference = (np.array(values[task]) - np.array(best[task])) / self._scale[task]
        if len(difference) < 3:
            return False
        error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
        return self._value(gains) + 2.0 * error < self._value(self._gains(best))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _frozen(row: Mapping[str, Any]) -> optuna.trial.FrozenTrial:
    """A trial of an earlier run, for the optimiser to learn from."""
    import optuna

    value = row["trial"]["value"]
    states = optuna.trial.TrialState
    return optuna.trial.create_trial(
        state=states.FAIL if value is None else states.COMPLETE,
        value=value,
        params=row["params"],
        distributions={
            name: optuna.distributions.json_to_distribution(text)
            for name, text in row["distributions"].items()
        },
    )
