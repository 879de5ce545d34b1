"""Tries merges on a server, one after the other, and learns from each which to try next.

A trial is rated block by block on the same examples as all others, so that two are compared by the
differences of single examples, and is pruned as soon as these say that it cannot win.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from merged_lora.errors import EvaluationError, listed
from merged_lora.prompts import Tasks

from .objectives import Objective
from .proposals import defaults, proposal
from .rating import Rater
from .results import Results
from .scores import difference
from .served import RefusedError
from .tuned import State, Trial, best_of

if TYPE_CHECKING:
    import optuna

Scores = Mapping[str, Sequence[float]]
"""By task, example by example, in the order of :func:`order`."""

BLOCKS = 4
"""A trial is rated on so many parts of the examples, one after the other, and may be pruned after each."""
FEW = 6
"""Examples of a task below which nothing is pruned: resamples of fewer say too little."""
SEED = 0


def order(count: int) -> list[int]:
    """The examples of a task in the order in which the blocks rate them."""
    return [i for block in range(BLOCKS) for i in range(count)[block::BLOCKS]]


class Scale:
    """How scores become gains: 0 is the base model, 1 the source of the task.

    base: scores of the base model on all examples.
    own:  scores of each task's source on them.

    Raises EvaluationError for a task on which its source is not better than the base model.
    """

    def __init__(self, sources: Mapping[str, str], base: Scores, own: Scores) -> None:
        self.base, self.own = base, own
        self._base = {task: np.array(scores) for task, scores in base.items()}
        self._unit: dict[str, float] = {}
        for task, source in sources.items():
            self._unit[task] = float((np.array(own[task]) - self._base[task]).mean())
            if not self._unit[task] > 0:
                raise EvaluationError(
                    f"{task}: {source} is not better at it than the base model, so there is nothing to keep; "
                    "leave the task out, or name its adapter with --source"
                )

    def gains(self, scores: Scores) -> dict[str, float]:
        """The gain of each task, on the examples rated so far."""
        return {
            task: float((np.array(each) - self._base[task][: len(each)]).mean()) / self._unit[task]
            for task, each in scores.items()
        }


class Search:
    """One search.

    tasks:      the examples to choose on.
    sources:    the adapter of each task.
    strategies: that are tried.
    ranks:      that are tried, beside each strategy's own.
    objective:  what is made large.
    results:    the file of trials; those that it has count.
    progress:   called with every trial that ended, also in an earlier run, and with the best one so far.
    trials:     what was tried, in order.
    untried:    the defaults for which neither trials nor minutes were left.
    """

    def __init__(
        self,
        tasks: Tasks,
        sources: Mapping[str, str],
        strategies: Sequence[str],
        ranks: Sequence[int],
        objective: Objective,
        results: Results,
        progress: Callable[[Trial, Trial | None], object],
    ) -> None:
        self._tasks, self._sources, self._objective = tasks, sources, objective
        self._names = tuple(dict.fromkeys(sources.values()))
        self._strategies, self._ranks = strategies, ranks
        self._results, self._progress = results, progress
        self._best: Scores = {}
        self._rated: dict[str, Scores] = {}
        self._study: optuna.Study | None = None
        self.trials: list[Trial] = []
        self.untried: list[str] = []

    async def run(self, rater: Rater, scale: Scale, trials: int, minutes: float | None) -> None:
        """Try merges until there are so many, or the time is over, and one that is made in any case.

        scale: between the base model and each source, on the same examples.
        """
        end = math.inf if minutes is None else time.monotonic() + 60.0 * minutes
        self._scale = scale

        def over() -> bool:
            made = any(trial.state != "refused" for trial in self.trials)
            return made and (len(self.trials) >= trials or time.monotonic() >= end)

        with self._results.open():
            self._recall()
            known = {trial.spec for trial in self.trials if trial.default}
            for spec, params in defaults(self._names, self._strategies, self._ranks):
                if str(spec) in known:
                    continue
                if over():
                    self.untried.append(str(spec))
                else:
                    await self._try(rater, str(spec), params, default=True)
            useful = self._useful()
            study = self._study = _study()
            self._teach(study, useful)
            while not over():
                asked = study.ask()
                spec = proposal(asked, self._names, useful, self._ranks)
                trial = await self._try(rater, str(spec), dict(asked.params))
                study.tell(asked, self._lesson(trial))

    def importance(self) -> dict[str, float]:
        """The share of each choice in what made trials of the best one's strategy good or bad.

        S. Watanabe, A. Bansal and F. Hutter, "PED-ANOVA", IJCAI 2023; computed by Optuna.  Empty with fewer
        than ten such trials.
        """
        import optuna

        best = best_of(self.trials)
        if best is None or self._study is None:
            return {}
        same = [
            trial
            for trial in self._study.get_trials(deepcopy=False)
            if trial.value is not None and trial.params["strategy"] == best.strategy
        ]
        if len(same) < 10 or len({trial.value for trial in same}) < 2:
            return {}
        study = optuna.create_study(direction="maximize")
        study.add_trials(same)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        shares = {name.partition(" ")[2]: share for name, share in found.items() if name != "strategy"}
        return {name: float(share / sum(shares.values())) for name, share in shares.items()}

    def _useful(self) -> list[str]:
        """The strategies of which the server made a default; raises EvaluationError without any."""
        made = {trial.strategy for trial in self.trials if trial.state != "refused"}
        if not made:
            reasons = listed(dict.fromkeys(trial.reason for trial in self.trials), 2)
            raise EvaluationError(f"the server refuses every merge that the search begins with: {reasons}")
        return [name for name in self._strategies if name in made]

    def _teach(self, study: optuna.Study, strategies: Sequence[str]) -> None:
        """Let the optimiser learn from the trials so far."""
        import optuna

        for trial in self.trials:
            if trial.strategy not in strategies:
                continue
            given = optuna.trial.FixedTrial(dict(trial.params))
            proposal(given, self._names, strategies, self._ranks)
            study.add_trial(
                optuna.trial.create_trial(
                    params=given.params, distributions=given.distributions, value=self._lesson(trial)
                )
            )

    def _lesson(self, trial: Trial) -> float:
        """What the optimiser learns of a trial; one that was refused counts as the worst of the others."""
        if trial.state != "refused":
            return trial.value
        return min(other.value for other in self.trials if other.state != "refused")

    def _recall(self) -> None:
        """Take over the trials of an earlier run."""
        try:
            for i in range(len(self._results)):
                row = self._results[str(i)]
                self._keep(Trial.from_row(row["trial"]), row["scores"])
        except (KeyError, TypeError, AttributeError):
            raise EvaluationError("the study has trials of another version; name another file") from None

    async def _try(self, rater: Rater, spec: str, params: Mapping[str, Any], default: bool = False) -> Trial:
        """One trial: made by the server, rated block by block, pruned if it cannot win any more."""
        began, requests = time.monotonic(), rater.requests
        state, scores, reason = await self._outcome(rater, spec, prune=not default)
        gains = self._scale.gains(scores)
        trial = Trial(
            number=len(self.trials),
            spec=spec,
            params=dict(params),
            default=default,
            state=state,
            gains=gains,
            value=self._estimate(scores, gains) if scores else math.nan,
            seconds=time.monotonic() - began,
            requests=rater.requests - requests,
            reason=reason,
        )
        self._results.add(str(trial.number), {"trial": trial.as_row(), "scores": scores})
        self._keep(trial, scores)
        return trial

    async def _outcome(self, rater: Rater, spec: str, prune: bool) -> tuple[State, Scores, str]:
        """How a merge did, its scores, and why it was refused."""
        if spec in self._rated:  # numbers are rounded, so that a merge may come again
            return "complete", self._rated[spec], ""
        scores: dict[str, list[float]] = {task: [] for task in self._tasks}
        try:
            for block in range(BLOCKS):
                parts = {task: range(len(each))[block::BLOCKS] for task, each in self._tasks.items()}
                for task, values in (await rater.rate(spec, self._tasks, parts)).items():
                    scores[task] += values
                if prune and block < BLOCKS - 1 and self._hopeless(scores):
                    return "pruned", scores, ""
        except RefusedError as error:
            return "refused", {}, str(error)
        return "complete", scores, ""

    def _keep(self, trial: Trial, scores: Scores) -> None:
        self.trials.append(trial)
        if trial.state == "complete":
            self._rated[trial.spec] = scores
        best = best_of(self.trials)
        if trial is best:
            self._best = scores
        self._progress(trial, best)

    def _estimate(self, scores: Scores, gains: Mapping[str, float]) -> float:
        """The value of a merge; of one rated in part, the best one's less what it is behind there."""
        value = self._objective.value(gains)
        if not self._best or all(len(scores[task]) == len(each) for task, each in self._best.items()):
            return value
        best, part = self._scale.gains(self._best), self._scale.gains(self._like(scores))
        return self._objective.value(best) + value - self._objective.value(part)

    def _like(self, scores: Scores) -> Scores:
        """The best trial's scores on the examples that another was rated on."""
        return {task: self._best[task][: len(each)] for task, each in scores.items()}

    def _hopeless(self, scores: Scores) -> bool:
        """Whether a trial is behind the best one on the same examples by more than chance gives."""
        if not self._best or min(map(len, scores.values())) < FEW:
            return False
        own, base = (
            {task: each[: len(scores[task])] for task, each in whole.items()}
            for whole in (self._scale.own, self._scale.base)
        )
        behind = difference(scores, self._like(scores), own, self._objective.value, base)
        return behind is not None and behind.high < 0


async def reference(rater: Rater, base: str, tasks: Tasks, sources: Mapping[str, str]) -> Scale:
    """The scale between the base model and each source, which are rated on all examples."""
    every = {task: order(len(examples)) for task, examples in tasks.items()}
    own: dict[str, Sequence[float]] = {}
    for task, source in sources.items():
        own |= await rater.rate(source, tasks, {task: every[task]})
    return Scale(sources, await rater.rate(base, tasks, every), own)


def _study() -> optuna.Study:
    """A study that looks at the choices of each strategy together."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of `group`
        sampler = optuna.samplers.TPESampler(seed=SEED, multivariate=True, group=True, n_startup_trials=0)
    return optuna.create_study(direction="maximize", sampler=sampler)
