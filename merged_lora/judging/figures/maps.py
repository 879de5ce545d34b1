"""Heat maps of an inspection: how alike sources are, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from merged_lora.judging.inspection import Inspection, kind_of, layer_of

from .files import blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PAIRS, COLUMNS = 15, 5
"""How many maps of one kind are drawn, those of the largest values, and how many beside each other."""


def heat_map(inspection: Inspection) -> Figure:
    """The cosines of each two sources, and the disturbances if known, by layer and kind of module.

    Modules of one layer and kind are taken together, such as experts.  Needs matplotlib, of the extra
    ``plot``.  Raises MergeError.
    """
    grids = _Grids(inspection)
    names = inspection.compared.sources
    cosines = grids.cosines()
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    blocks = [_Block("cosine", cosines, pairs, [f"{names[i]}, {names[j]}" for i, j in pairs], "PuOr")]
    disturbed = grids.disturbances()
    known = [pair for pair in _ordered(len(names)) if not disturbed[..., pair[0], pair[1]].isnan().all()]
    if known:
        titles = [f"{names[j]} on {names[i]}" for i, j in known]
        blocks.append(_Block("disturbance", disturbed, known, titles, "Purples"))
    heights = [block.rows * grids.height for block in blocks]
    width = 1.6 + max(1.3, 0.22 * len(grids.kinds)) * max(block.columns for block in blocks)
    figure = blank(max(width, 4.5), 0.4 + sum(heights))
    parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, block in zip(parts, blocks, strict=True):
        block.draw(part, grids)
    return figure


def _ordered(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(count) if i != j]


class _Grids:
    """What is drawn, by layer and kind of module: tensors ``[layers, kinds, N, N]``, NaN for nothing."""

    def __init__(self, inspection: Inspection) -> None:
        self.compared, self.kinds = inspection.compared, inspection.kinds
        numbers = {layer_of(name) for name in self.compared.modules}
        self.layers = sorted(numbers, key=lambda n: (n is None, n or 0))
        self.height = 0.9 + min(4.5, max(1.4, 0.11 * len(self.layers)))  # inches, with the names of the kinds
        rows, kinds = ({x: k for k, x in enumerate(xs)} for xs in (self.layers, self.kinds))
        self._cells = [rows[layer_of(x)] * len(kinds) + kinds[kind_of(x)] for x in self.compared.modules]

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over the modules of each cell, ``[layers, kinds, ...]``."""
        count = len(self.layers) * len(self.kinds)
        found = values.new_zeros(count, *values.shape[1:]).index_add_(0, torch.tensor(self._cells), values)
        return found.view(len(self.layers), len(self.kinds), *values.shape[1:])

    def cosines(self) -> torch.Tensor:
        inner = self._summed(self.compared.inner)
        lengths = inner.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()
        return inner / (lengths[..., :, None] * lengths[..., None, :])

    def disturbances(self) -> torch.Tensor:
        squares = self._summed(self.compared.outputs)
        own = squares.diagonal(dim1=-2, dim2=-1)
        return (squares / own[..., :, None]).sqrt()


class _Block:
    """Maps of one kind, with a scale for all of them."""

    def __init__(
        self,
        what: str,
        values: torch.Tensor,
        pairs: Sequence[tuple[int, int]],
        titles: Sequence[str],
        colours: str,
    ) -> None:
        finite = values.nan_to_num(0.0, 0.0, 0.0).abs()
        largest = sorted(range(len(pairs)), key=lambda k: -float(finite[..., *pairs[k]].max()))[:PAIRS]
        shown = sorted(largest)
        self.maps = [(titles[k], values[..., *pairs[k]]) for k in shown]
        self.largest = max(0.1, *(float(finite[..., *pairs[k]].max()) for k in shown))
        self.signed, self.colours = bool((values < 0).any()), colours
        some = f", the {len(shown)} of {len(pairs)} pairs with the largest" if len(shown) < len(pairs) else ""
        self.heading = {
            "cosine": f"cosine of the deltas{some}",
            "disturbance": f"what one source adds to the outputs of another, relative to its own{some}",
        }[what]
        self.rows = math.ceil(len(shown) / COLUMNS)
        self.columns = math.ceil(len(shown) / self.rows)

    def draw(self, figure: Any, grids: _Grids) -> None:
        figure.suptitle(self.heading, fontsize=9)
        axes = figure.subplots(self.rows, self.columns, squeeze=False, sharey=True, sharex=True)
        least = -self.largest if self.signed else 0.0
        step = max(1, math.ceil(len(grids.layers) / 16))
        layers = ["none" if layer is None else str(layer) for layer in grids.layers]
        ticks = [k for k, layer in enumerate(grids.layers) if k % step == 0 or layer is None]
        for axis in axes.flat[len(self.maps) :]:
            axis.axis("off")
        for axis, (title, values) in zip(axes.flat, self.maps, strict=False):
            axis.set_facecolor("0.85")  # of cells without a value
            image = axis.imshow(
                values.tolist(),
                cmap=self.colours,
                vmin=least,
                vmax=self.largest,
                aspect="auto",
                interpolation="none",
            )
            axis.set_title(_short(title), fontsize=8)
            axis.set_xticks(range(len(grids.kinds)), grids.kinds, rotation=90, fontsize=7)
            axis.set_yticks(ticks, [layers[k] for k in ticks], fontsize=7)
        for k, axis in enumerate(axes.flat[: len(self.maps)]):
            below = k + self.columns >= len(self.maps)  # the last map of its column
            axis.tick_params(labelbottom=below)
        for row in axes:
            row[0].set_ylabel("layer", fontsize=8)
        figure.colorbar(image, ax=axes.ravel().tolist(), aspect=25 * self.rows).ax.tick_params(labelsize=7)


def _short(title: str) -> str:
    return title if len(title) <= 28 else f"{title[:27]}…"
