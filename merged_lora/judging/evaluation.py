"""What served models made of labelled examples: scores, intervals, and what merges keep of each source.

Knows nothing of servers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .scores import Interval, mean, retention
from .tables import Report, Section, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIKELIHOOD = "likelihood"
"""The metric of how likely right answers are: the geometric mean of the probability of their tokens."""


@dataclass(frozen=True)
class Row:
    """What a model made of one example.

    answer:   its own answer.
    scores:   by metric, from 0 to 1.
    """

    answer: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Judged:
    """A model on a task.

    model:     its name, or the text of a merge.
    task:      the name of the task.
    metric:    what the score is.
    score:     mean over the examples.
    retention: score divided by that of the task's source alone; None for that itself, and if it has no score.
    examples:  their number.
    """

    model: str
    task: str
    metric: str
    score: Interval
    retention: Interval | None
    examples: int


@dataclass(frozen=True, eq=False)
class Evaluation(Report):
    """Everything that was measured.

    base:    name of the base model.
    sources: for each task, the name of the adapter that was trained for it.
    specs:   merges, in the order in which they were asked for.
    refused: why the server refused a merge, by its text.
    rows:    of each model and task, example by example.
    metric:  which the table and the retention are of.
    notes:   what a reader should know of how it was measured.
    """

    base: str
    sources: Mapping[str, str]
    specs: tuple[str, ...]
    refused: Mapping[str, str]
    rows: Mapping[tuple[str, str], Sequence[Row]]
    metric: str
    notes: tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that every row has, in the order of the first."""
        every = [row.scores for rows in self.rows.values() for row in rows]
        return tuple(name for name in every[0] if all(name in scores for scores in every))

    def scores(self, model: str, task: str, metric: str | None = None) -> list[float]:
        """The score of each example of a task."""
        return [row.scores[metric or self.metric] for row in self.rows[model, task]]

    def judged(self, model: str, task: str, metric: str | None = None) -> Judged:
        """The score of a model on a task, and what it keeps of the task's source."""
        own = self.scores(model, task, metric)
        source = self.sources[task]
        alone = self.scores(source, task, metric)
        kept = None if model == source else retention(own, alone)
        return Judged(model, task, metric or self.metric, mean(own), kept, len(own))

    def of(self, spec: str, metric: str | None = None) -> list[Judged]:
        """A merge on every task, the one of which it keeps the smallest share first."""
        found = [self.judged(spec, task, metric) for task in self.sources]
        return sorted(found, key=lambda each: each.retention.value if each.retention else float("inf"))

    @property
    def ranking(self) -> list[str]:
        """The merges that were measured, the one whose worst task keeps most first."""
        return sorted((s for s in self.specs if s not in self.refused), key=self._worst, reverse=True)

    @property
    def worst(self) -> float | None:
        """The smallest share that any merge keeps of any source; None if there is none to keep."""
        shares = [each.retention.value for spec in self.ranking for each in self.of(spec) if each.retention]
        return min(shares, default=None)

    def tables(self) -> list[Table]:
        """Scores by model and task, and for each merge what it keeps, the worst first."""
        tasks = tuple(self.sources)
        models = [self.base, *dict.fromkeys(self.sources.values()), *self.ranking]
        counts = {task: len(self.rows[self.sources[task], task]) for task in tasks}
        rows = [
            (model, *(self._shown(model, task) for task in tasks))
            for model in models
        ]  # fmt: skip
        headings = ("model", *(f"{task} ({counts[task]})" for task in tasks))
        found = [Table(f"{self.metric}, mean and 95 % interval", headings, tuple(rows))]
        for spec in self.ranking:
            kept = tuple(
                (each.task, str(each.score), str(each.retention) if each.retention else "-")
                for each in self.of(spec)
            )
            found.append(Table(spec, ("task", self.metric, "kept of its source"), kept))
        if self.refused:
            found.append(Table("refused", ("merge", "because"), tuple(self.refused.items())))
        return found

    def plot(self) -> Figure:
        """What share of its source's score each merge keeps, by task, with its interval.

        Raises MergeError.  Needs matplotlib, of the extra ``plot``.
        """
        from .figures import retentions

        return retentions(self)

    def as_dict(self) -> dict[str, Any]:
        """All that was measured, for JSON."""
        judged = [
            asdict(self.judged(model, task, metric))
            for model, task in self.rows
            for metric in self.metrics
        ]  # fmt: skip
        return {
            "base": self.base,
            "sources": dict(self.sources),
            "metric": self.metric,
            "judged": judged,
            "ranking": self.ranking,
            "worst": self.worst,
            "refused": dict(self.refused),
            "notes": list(self.notes),
            "rows": [
                {"model": model, "task": task, "answers": [asdict(row) for row in rows]}
                for (model, task), rows in self.rows.items()
            ],
        }

    def sections(self) -> list[Section]:
        """The notes."""
        return [Section("notes", self.notes)]

    def _shown(self, model: str, task: str) -> str:
        return str(self.judged(model, task).score) if (model, task) in self.rows else "-"

    def _worst(self, spec: str) -> float:
        shares = [each.retention.value for each in self.of(spec) if each.retention]
        return min(shares, default=0.0)
