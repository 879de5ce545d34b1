"""Dots in their intervals: what merges keep of each source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from merged_lora.judging.evaluation import Evaluation, Judged
from merged_lora.names import shortened

from .files import blank

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""M. Okabe and K. Ito, "Color Universal Design", 2008, the darker first."""
MARKERS = "osD^vPX"


def retentions(evaluation: Evaluation) -> Figure:
    """What share of its source's score each merge keeps, by task, with its interval; raises MergeError.

    Grey is the base model, which has no adapter.  Needs matplotlib, of the extra ``plot``.
    """
    tasks, specs = list(evaluation.sources), evaluation.ranking
    figure = blank(6.5, 1.4 + len(tasks) * (0.3 + 0.16 * len(specs)) + 0.18 * len(specs))
    axis = figure.subplots()
    axis.axvline(100.0, color="0.4", linewidth=1.0, linestyle="--", zorder=0)
    step = 0.8 / (len(specs) + 1)
    for place, model in enumerate((*specs, evaluation.base)):
        kept = [evaluation.judged(model, task) for task in tasks]
        heights = [row - 0.4 + step * (place + 0.5) for row in range(len(tasks))]
        base = model == evaluation.base
        colour = "0.6" if base else COLOURS[place % len(COLOURS)]
        marker = "x" if base else MARKERS[place % len(MARKERS)]
        label = f"{model} (no adapter)" if base else shortened(model)
        _intervals(axis, kept, heights, color=colour, marker=marker, label=label)
    axis.set_yticks(range(len(tasks)), tasks)
    axis.set_ylim(len(tasks) - 0.5, -0.5)  # the first task on top
    axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
    axis.set_xlabel(
        f"kept of the source's score, by {evaluation.metric} (%), with 95 % intervals", fontsize=9
    )
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0, pad=8)
    figure.legend(loc="outside lower left", fontsize=8, frameon=False)
    return figure


def _intervals(axis: Axes, judged: Sequence[Judged], heights: Sequence[float], **style: Any) -> None:
    """Draw a dot in its interval at each height; nothing for a source without a score."""
    found = [(each.retention, at) for each, at in zip(judged, heights, strict=True) if each.retention]
    values = [100 * kept.value for kept, _ in found]
    below = [100 * (kept.value - kept.low) for kept, _ in found]
    above = [100 * (kept.high - kept.value) for kept, _ in found]
    axis.errorbar(values, [at for _, at in found], xerr=(below, above), fmt="none", ecolor=style["color"])
    axis.plot(values, [at for _, at in found], linestyle="", **style)
