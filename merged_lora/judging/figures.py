"""Figures of what was found, by matplotlib, which is imported when one is drawn.

Colours are those of maps that read alike to all eyes and in grey.
"""

from __future__ import annotations

import math
import secrets
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from merged_lora.errors import MergeError

from .inspection import Inspection, kind_of, layer_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")


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
