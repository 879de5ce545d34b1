"""Clouds of trials: what a search found, task against task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from operator import itemgetter
from typing import TYPE_CHECKING

from merged_lora.judging.tuned import Tuning

from .files import blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

View = tuple[str, str, Callable[[Mapping[str, float]], float], Callable[[Mapping[str, float]], float]]
"""The labels of two axes, and what of the gains of a trial is shown along each."""
MOST_TASKS = 4
"""Tasks that are drawn two by two."""


def trials_by_task(tuning: Tuning) -> Figure:
    """The gains of all complete trials of a search, task against task, with the front; raises MergeError.

    With more than four tasks, the worst gain of each trial against its mean.  Needs matplotlib, of the extra
    ``plot``.
    """
    done = [trial for trial in tuning.trials if trial.state == "complete"]
    tasks = list(tuning.best.gains)
    if len(tasks) > MOST_TASKS or len(tasks) == 1:
        views: list[View] = [("mean gain", "worst gain", _mean_gain, _worst_gain)]
    else:
        views = [
            (f"gain on {first}", f"gain on {second}", itemgetter(first), itemgetter(second))
            for first, second in combinations(tasks, 2)
        ]
    figure = blank(0.5 + 3.2 * len(views), 3.6)
    for axis, (across, up, x, y) in zip(figure.subplots(1, len(views), squeeze=False)[0], views, strict=True):
        for label, trials, style in (
            ("tried", done, {"marker": "o", "s": 14, "color": "0.75"}),
            ("on the front", tuning.front, {"marker": "o", "s": 22, "color": "#0072b2"}),
            ("best default", [tuning.default], {"marker": "D", "s": 44, "color": "#e69f00"}),
            ("best", [tuning.best], {"marker": "*", "s": 130, "color": "#d55e00"}),
        ):
            gains = [trial.gains for trial in trials]
            axis.scatter([x(each) for each in gains], [y(each) for each in gains], label=label, **style)
        axis.set_xlabel(across, fontsize=8)
        axis.set_ylabel(up, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(color="0.92", linewidth=0.6)
        axis.set_axisbelow(True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _mean_gain(gains: Mapping[str, float]) -> float:
    return sum(gains.values()) / len(gains)


def _worst_gain(gains: Mapping[str, float]) -> float:
    return min(gains.values())
