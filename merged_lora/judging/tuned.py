"""What a search for a merge found: its trials, and how the best one does on examples it was not chosen on.

Knows nothing of servers or of the optimiser.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .evaluation import Evaluation
from .scores import Interval
from .tables import Report, Section, Table

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

    objective:  how gains became one value: ``worst``, ``mean``, or weights by task.
    trials:     in their order.
    best:       the trial with the largest value; may be a default.
    default:    the best of the defaults.
    gains:      of both on the report examples, by their specs and by task.
    evaluation: both on the report examples, with answers.
    margin:     by how much the worst-task retention of ``best`` is above that of ``default`` there, by the
                report's metric; None if no source has a score by that.
    gain_margin: the same of worst gains.
    importance: share of the variation of the value that each choice explains.
    seconds:    of the search and of the report.
    requests:   that the server answered.
    """

    objective: str | Mapping[str, float]
    trials: tuple[Trial, ...]
    best: Trial
    default: Trial
    gains: Mapping[str, Mapping[str, float]]
    evaluation: Evaluation
    margin: Interval | None
    gain_margin: Interval | None
    importance: Mapping[str, float]
    seconds: tuple[float, float]
    requests: int

    @property
    def beats(self) -> bool:
        """Whether the margin is above zero beyond what chance gives."""
        return self.margin is not None and self.margin.low > 0.0

    @property
    def luck(self) -> float:
        """By how much the worst gain of the best trial is larger on the dev than on the report examples."""
        return min(self.best.gains.values()) - min(self.gains[self.best.spec].values())

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
        """The best merge as an alias of this name, for ``--merged-lora-modules``."""
        return f"{name}={self.best.spec}"

    def body(self) -> str:
        """The best merge as the body of ``POST /v1/merged_lora/{alias}``."""
        return json.dumps({"spec": self.best.spec})

    def verdict(self) -> list[str]:
        """What came of it, in sentences."""
        return [*self._compared(), self._lucky(), self._cost()]

    def _compared(self) -> list[str]:
        """The best merge beside the best default, on the report examples."""
        if self.best is self.default:
            return [f"Nothing that was tried is better than the default {self.default.spec}."]
        best, default, metric = self.best.spec, self.default.spec, self.evaluation.metric
        report = "On examples that took no part in the search"
        if self.margin is None:
            first = f"{report}, no source has a right answer by {metric}, so retention says nothing."
        elif self.beats:
            first = (
                f"{report}, the worst-task retention of {best} is {self.margin} above that of the best "
                f"default, {default}."
            )
        else:
            first = (
                f"{report}, {best} is not better than the best default, {default}, beyond what chance gives: "
                f"their worst-task retentions differ by {self.margin}."
            )
        if self.gain_margin is None:
            return [first]
        return [first, f"Its worst gain is there {self.gain_margin} above that of the default."]

    def _lucky(self) -> str:
        chosen, other = min(self.best.gains.values()), min(self.gains[self.best.spec].values())
        return (
            f"It was lucky by {self.luck:+.1%}: its worst gain is {chosen:.1%} on the examples that it was "
            f"chosen on, and {other:.1%} on the others."
        )

    def _cost(self) -> str:
        pruned, refused = (sum(t.state == state for t in self.trials) for state in ("pruned", "refused"))
        seconds = sorted(trial.seconds for trial in self.trials)
        return (
            f"{len(self.trials)} trials ({pruned} pruned, {refused} refused), in the median of "
            f"{seconds[len(seconds) // 2]:.1f} s: {self.seconds[0]:.0f} s for the search, "
            f"{self.seconds[1]:.0f} s for the report, and {self.requests} requests."
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
        found = [Table("best trials on the dev examples", ("trial", "merge", "", "value", *tasks), rows)]
        if self.importance:
            shares = sorted(self.importance.items(), key=lambda each: -each[1])
            found.append(
                Table(
                    "what the value depends on",
                    ("choice", "share"),
                    tuple((n, f"{s:.0%}") for n, s in shares),
                )
            )
        return [*found, *self.evaluation.tables()]

    def as_dict(self) -> dict[str, Any]:
        """All that was found, for JSON."""
        return {
            "objective": self.objective if isinstance(self.objective, str) else dict(self.objective),
            "best": self.best.as_row(),
            "default": self.default.as_row(),
            "margin": asdict(self.margin) if self.margin else None,
            "gain_margin": asdict(self.gain_margin) if self.gain_margin else None,
            "beats": self.beats,
            "luck": self.luck,
            "verdict": self.verdict(),
            "front": [trial.number for trial in self.front],
            "importance": dict(self.importance),
            "trials": [trial.as_row() for trial in self.trials],
            "report": self.evaluation.as_dict(),
            "seconds": list(self.seconds),
            "requests": self.requests,
        }

    def sections(self) -> list[Section]:
        """The verdict, and how the best merge is served."""
        return [
            Section("verdict", self.verdict()),
            Section("how to serve it", self.serving(), prose=False),
        ]

    def serving(self) -> list[str]:
        """The best merge as a flag of ``vllm serve``, and as a request to a running server."""
        return [
            f"--merged-lora-modules {shlex.quote(self.module_argument('tuned'))}",
            f"POST /v1/merged_lora/tuned {self.body()}",
        ]


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The complete trial with the largest value, the earlier one if two have the same; None without any."""
    done = [trial for trial in trials if trial.state == "complete"]
    return max(done, key=lambda trial: (trial.value, -trial.number), default=None)
