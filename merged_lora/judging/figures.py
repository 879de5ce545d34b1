"""Figures of what was found, by matplotlib, which is imported when one is drawn.

Colours are those of maps that read alike to all eyes and in grey.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from merged_lora.errors import MergeError
from merged_lora.names import shortened

from .evaluation import Evaluation, Judged
from .inspection import Inspection, kind_of, layer_of
from .tuned import Tuning

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

View = tuple[str, str, Callable[[Mapping[str, float]], float], Callable[[Mapping[str, float]], float]]
"""The labels of two axes, and what of the gains of a trial is shown along each."""
FORMATS = (".png", ".svg", ".pdf")
MOST_TASKS = 4
"""Tasks that are drawn two by two."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""M. Okabe and K. Ito, "Color Universal Design", 2008, the darker first."""
MARKERS = "osD^vPX"


def heat_map(inspection: Inspection) -> Figure:
    """The cosines of each two sources, by layer and kind of module; raises MergeError.

    Needs matplotlib, of the extra ``plot``.
    """
    compared, kinds = inspection.compared, inspection.kinds
    names = compared.sources
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    layers = sorted({layer_of(name) for name in compared.modules}, key=lambda n: (n is None, n or 0))
    figure = _figure(1.5 + 0.3 * len(kinds) * len(pairs), 2.0 + 0.12 * len(layers))
    axes = figure.subplots(1, len(pairs), squeeze=False, sharey=True)[0]
    lengths = compared.inner.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt()
    cosines = compared.inner / (lengths[:, :, None] * lengths[:, None, :])  # [M, N, N]; NaN beside zero
    apart = cosines[:, ~torch.eye(len(names), dtype=torch.bool)]
    largest = max(0.1, float(apart.nan_to_num(0.0).abs().max()))
    for axis, (i, j) in zip(axes, pairs, strict=True):
        grid = [[math.nan] * len(kinds) for _ in layers]
        for name, cosine in zip(compared.modules, cosines[:, i, j].tolist(), strict=True):
            grid[layers.index(layer_of(name))][kinds.index(kind_of(name))] = cosine
        image = axis.imshow(grid, cmap="PuOr", vmin=-largest, vmax=largest, aspect="auto")
        axis.set_title(f"{names[i]}, {names[j]}", fontsize=8)
        axis.set_xticks(range(len(kinds)), kinds, rotation=90, fontsize=7)
    step = max(1, len(layers) // 16)
    shown = ["-" if layer is None else str(layer) for layer in layers]
    axes[0].set_yticks(range(0, len(layers), step), shown[::step], fontsize=7)
    axes[0].set_ylabel("layer", fontsize=8)
    figure.colorbar(image, ax=list(axes)).set_label("cosine of the deltas", fontsize=8)
    return figure


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
    figure = _figure(0.5 + 3.2 * len(views), 3.6)
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


def retentions(evaluation: Evaluation) -> Figure:
    """What share of its source's score each merge keeps, by task, with its interval; raises MergeError.

    Grey is the base model, which has no adapter.  Needs matplotlib, of the extra ``plot``.
    """
    tasks, specs = list(evaluation.sources), evaluation.ranking
    figure = _figure(6.5, 1.4 + len(tasks) * (0.3 + 0.16 * len(specs)) + 0.18 * len(specs))
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


def save(figure: Figure, path: Path) -> None:
    """Write a figure, completely or not at all; raises MergeError.

    path: the file, which is replaced; its ending is one of FORMATS.
    """
    check_path(path)
    scratch = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    try:
        figure.savefig(scratch, format=path.suffix[1:], dpi=150)
        scratch.replace(path)
    except OSError as error:
        raise MergeError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            scratch.unlink()  # which is not there any more if all went well


def check_path(path: Path) -> None:
    """Raise MergeError for a file that no figure can be written to."""
    if path.suffix not in FORMATS:
        raise MergeError(f"{path}: a plot is written as {', '.join(FORMATS)}; end the name with one of these")
    if not path.parent.is_dir():
        raise MergeError(f"cannot write {path}: {path.parent} is no folder")


def _figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, which no window shows."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MergeError(
            f"plots need matplotlib, which cannot be imported ({error}): pip install 'vllm-merged-lora[plot]'"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")
