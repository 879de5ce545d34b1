"""What a search for a merge found: its trials, and how the best one does on examples it was not chosen on.

Knows nothing of servers or of the optimiser.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from merged_lora.errors import listed

from .evaluation import Evaluation
from .objectives import Objective
from .scores import Interval
from .tables import Report, Section, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

State = Literal["complete", "pruned", "refused"]


@dataclass(frozen=True)
class Trial:
    """A merge that was tried.

    number:  of the trial.
    spec:    the merge.
    params:  the choices that it follows from.
    default: whether it is one of those that a user is advised to take without a search.
    state:   ``pruned`` if its first examples showed that it would not be the best.
    gains:   by task, how far it comes from the base model (0) to the task's source (1) on the dev examples;
             of a pruned trial, on those that it was rated on.
    value:   the objective, which of a pruned trial is estimated; NaN if it was refused.
    seconds: that it took, with making the merge.
    requests: that the server answered for it.
    reason:  why it was refused.
    """

    number: int
    spec: str
    params: Mapping[str, Any]
    default: bool
    state: State
    gains: Mapping[str, float]
    value: float
    seconds: float
    requests: int
    reason: str = ""

    @property
    def strategy(self) -> str:
        """The name of the strategy."""
        return str(self.params["strategy"])

    def as_row(self) -> dict[str, Any]:
        """The trial for JSON, which has no NaN."""
        return asdict(self) | {"value": self.value if math.isfinite(self.value) else None}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Trial:
        """The trial that a row is of."""
        return cls(**{**row, "value": math.nan if row["value"] is None else row["value"]})


@dataclass(frozen=True, eq=False)
class Tuning(Report):
    """A search and its report.

    objective:  how gains became one value.
    score:      what gains are of: ``likelihood``, or a metric.
    trials:     in their order.
    untried:    the defaults for which neither trials nor minutes were left.
    best:       the trial with the largest value; may be a default.
    default:    the default with the largest value.
    gains:      of both on the report examples, by their specs and by task.
    evaluation: both on the report examples, with answers.
    margin:     by how much ``best`` keeps more than ``default`` there, by the objective of retentions by the
                report's metric; None if the source of a task that counts has no score by that.
    gain_margin: the same of gains.
    importance: share of each choice in what made the trials of the best one's strategy good or bad.
    seconds:    that this run took.
    requests:   that the server answered in this run.
    """

    objective: Objective
    score: str
    trials: tuple[Trial, ...]
    untried: tuple[str, ...]
    best: Trial
    default: Trial
    gains: Mapping[str, Mapping[str, float]]
    evaluation: Evaluation
    margin: Interval | None
    gain_margin: Interval | None
    importance: Mapping[str, float]
    seconds: float
    requests: int

    @property
    def beats(self) -> bool:
        """Whether the margin is above zero beyond what chance gives."""
        return self.margin is not None and self.margin.low > 0.0

    @property
    def chosen(self) -> Trial:
        """The one to serve: ``best`` if it kept more on the report examples, else ``default``.

        By the margin, and if that is none or zero by the gains.
        """
        ahead = [each.value for each in (self.margin, self.gain_margin) if each is not None and each.value]
        return self.best if ahead and ahead[0] > 0.0 else self.default

    @property
    def luck(self) -> float:
        """By how much the value of the best trial is larger on the dev than on the report examples."""
        return self.best.value - self.objective.value(self.gains[self.best.spec])

    @property
    def front(self) -> tuple[Trial, ...]:
        """The trials than which no other is better on one task and as good on all others."""
        done = [trial for trial in self.trials if trial.state == "complete"]
        return tuple(
            trial
            for trial in done
            if not any(
                all(other.gains[task] >= gain for task, gain in trial.gains.items())
                and any(other.gains[task] > gain for task, gain in trial.gains.items())
                for other in done
            )
        )

    def module_argument(self, name: str) -> str:
        """The chosen merge as an alias of this name, for ``--merged-lora-modules``."""
        return f"{name}={self.chosen.spec}"

    def body(self) -> str:
        """The chosen merge as the body of ``POST /v1/merged_lora/{alias}``."""
        return json.dumps({"spec": self.chosen.spec})

    def verdict(self) -> list[str]:
        """What came of it, in sentences."""
        return [*self._compared(), self._lucky(), self._cost()]

    def _compared(self) -> list[str]:
        """The best merge beside the best default, on the report examples."""
        best, default, what = self.best.spec, self.default.spec, self.objective.name
        untried = f" Not tried: {listed(self.untried)}." if self.untried else ""
        if self.best.default:
            return [f"Nothing that was tried is better than the default {default}.{untried}"]
        report = "On examples that took no part in the search"
        if self.margin is None:
            tasks, metric = listed(self._unscored()), self.evaluation.metric
            first = f"{report}, retention says nothing: no right answer by {metric} of the source of {tasks}."
        else:
            sure = self.beats or self.margin.high < 0.0
            found = "better" if self.beats else "worse" if sure else "not better"
            first = (
                f"{report}, {best} is {found} than the best default, {default}"
                f"{'' if sure else ', beyond what chance gives'}: their {what} retentions differ by "
                f"{self.margin.points}."
            )
        sentences = [first + untried]
        if self.gain_margin is not None:
            sentences.append(f"By {self.score}, their {what} gains differ by {self.gain_margin.points}.")
        if self.chosen.default:
            return [*sentences, "The default is the one to serve."]
        return [*sentences, f"What was found kept more{'' if self.beats else ' all the same'}: serve that."]

    def _unscored(self) -> list[str]:
        """The tasks that count and whose source has no score on the report examples."""
        scores, sources = self.evaluation.scores, self.evaluation.sources
        return [t for t in sources if self.objective.counts(t) and not any(scores(sources[t], t))]

    def _lucky(self) -> str:
        lucky = f"lucky by {100 * self.luck:.1f} points" if self.luck > 5e-4 else "not lucky"
        return (
            f"The best of {len(self.trials)} was {lucky}: its {self.objective.name} gain is "
            f"{self.best.value:.1%} on the examples of the search, and {self.best.value - self.luck:.1%} on "
            "those of the report."
        )

    def _cost(self) -> str:
        pruned, refused = (sum(t.state == state for t in self.trials) for state in ("pruned", "refused"))
        seconds = sorted(trial.seconds for trial in self.trials)
        requests = sum(trial.requests for trial in self.trials)
        return (
            f"{len(self.trials)} trials ({pruned} pruned, {refused} refused) took {sum(seconds):.0f} s and "
            f"{requests} requests, {seconds[len(seconds) // 2]:.1f} s in the median. This run took "
            f"{self.seconds:.0f} s and {self.requests} requests, with base model, sources and report."
        )

    def tables(self) -> list[Table]:
        """The best trials and the report."""
        tasks = tuple(self.best.gains)
        ordered = sorted((t for t in self.trials if t.state == "complete"), key=lambda t: -t.value)
        rows = tuple(
            (
                str(trial.number),
                trial.spec,
                "default" if trial.default else "",
                f"{trial.value:.1%}",
                *(f"{trial.gains[task]:.1%}" for task in tasks),
            )
            for trial in ordered[:10]
        )
        found = [
            Table("best trials, by gains on the dev examples", ("trial", "merge", "", "value", *tasks), rows)
        ]
        found.append(self._strategies())
        if self.importance:
            shares = sorted(self.importance.items(), key=lambda each: -each[1])
            found.append(
                Table(
                    f"what the value of {self.best.strategy} depends on",
                    ("choice", "share"),
                    tuple((n, f"{s:.0%}") for n, s in shares),
                )
            )
        return [*found, *self.evaluation.tables()]

    def _strategies(self) -> Table:
        """The best trial of each strategy."""
        by_name: dict[str, list[Trial]] = {}
        for trial in self.trials:
            by_name.setdefault(trial.strategy, []).append(trial)
        best = {name: best_of(trials) for name, trials in by_name.items()}
        ordered = sorted(best, key=lambda name: -(each.value if (each := best[name]) else -math.inf))
        rows = [
            (name, str(len(by_name[name])), f"{each.value:.1%}" if (each := best[name]) else "-")
            for name in ordered
        ]
        return Table("strategies", ("strategy", "trials", "best value"), tuple(rows))

    def plot(self) -> Figure:
        """The gains of all complete trials, task against task.

        Raises MergeError.  Needs matplotlib, of the extra ``plot``.
        """
        from .figures import trials_by_task

        return trials_by_task(self)

    def as_dict(self) -> dict[str, Any]:
        """All that was found, for JSON."""
        return {
            "objective": self.objective.given,
            "score": self.score,
            "best": self.best.as_row(),
            "default": self.default.as_row(),
            "margin": asdict(self.margin) if self.margin else None,
            "gain_margin": asdict(self.gain_margin) if self.gain_margin else None,
            "beats": self.beats,
            "chosen": self.chosen.spec,
            "untried": list(self.untried),
            "luck": self.luck,
            "verdict": self.verdict(),
            "front": [trial.number for trial in self.front],
            "importance": dict(self.importance),
            "trials": [trial.as_row() for trial in self.trials],
            "report": self.evaluation.as_dict(),
            "seconds": self.seconds,
            "requests": self.requests,
        }

    def sections(self) -> list[Section]:
        """The verdict, and how the chosen merge is served."""
        what = "the default" if self.chosen.default else "what was found"
        return [
            Section("verdict", self.verdict()),
            Section(f"how to serve {what}", self.serving(), prose=False),
        ]

    def serving(self) -> list[str]:
        """The chosen merge as a flag of ``vllm serve``, and as a request to a running server."""
        return [
            f"--merged-lora-modules {shlex.quote(self.module_argument('tuned'))}",
            f"POST /v1/merged_lora/tuned {self.body()}",
        ]


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The complete trial with the largest value, the earlier one if two have the same; None without any."""
    done = [trial for trial in trials if trial.state == "complete"]
    return max(done, key=lambda trial: (trial.value, -trial.number), default=None)
