"""Deltas merged entry by entry, a tile of rows at a time: exact thresholds over the whole, then products.

For modules whose deltas do not fit into memory.  Each pass forms the tiles anew, by the same products of the
same shapes, so that an entry has the same bits in every pass and exactly as many are kept as are asked for.
Every core walks over tiles of its own, which stay in its cache.  As much of the merged delta as fits is kept
from the first pass over it on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection

import numpy as np
import torch

from merged_lora.backends import Progress, no_progress
from merged_lora.plan import All, EnergyMean, EntryModule

from . import kernels
from .combine import FUSED, NO_THRESHOLDS, source_tables
from .entries import Thresholds, addresses, by_source, keep_entries, queries_of, scores_of, shares_of
from .pool import Pool, check_exit
from .thresholds import KEEP_EVERYTHING, Visit, find_thresholds

TILE_BYTES = 4 << 20  # of a tile of every source, of their merge and of a score
TILES_AT_A_TIME = 8  # of every core between two calls of progress
MERGED_BYTES = 128 << 20  # of the merged delta that is kept
GROUP = 8  # rows of a tile come in eights, so that each begins at a whole Philox call


class TileBuffers:
    """The memory that one core works in.

    tile:   ``[sources, rows, columns]``, rows of every source.
    merged: ``[rows, columns]``.
    score:  ``[rows, columns]``, scratch.
    """

    def __init__(self, sources: int, rows: int, columns: int) -> None:
        self.tile = torch.empty(sources, rows, columns)
        self.merged = torch.empty(rows, columns)
        self.score = torch.empty(rows, columns)


TileVisitor = Callable[[int, TileBuffers, int, int], None]
"""Called with the number of a core, its buffers with a tile of every source, and the tile's first row and
number of rows."""


class NumbaTiles:
    """The merged delta of one module, as :class:`merged_lora.streaming.Tiles`.

    thresholds: of every source, as its keep rule needs them.
    """

    def __init__(self, module: EntryModule, pool: Pool, progress: Progress = no_progress) -> None:
        self._rule, self._pool, self._progress = module.rule, pool, progress
        self._rows, self._columns = module.entries
        self._a = [f.a.float().contiguous() for f in module.sources]
        self._b = [f.b.float() * s for f, s in zip(module.sources, module.scalings, strict=True)]
        each = 4 * (len(self._a) + 2) * self._columns
        self._step = min(-(-self._rows // GROUP), max(1, TILE_BYTES // each // GROUP)) * GROUP
        cores = min(pool.cores, -(-self._rows // self._step))
        self._buffers = [TileBuffers(len(self._a), self._step, self._columns) for _ in range(cores)]
        self.thresholds = self._find_thresholds()
        self._fused = self._rule.consists_of(*FUSED)
        self._coefficients = [1.0] * len(self._a)
        if isinstance(self._rule.blend, EnergyMean):
            self._coefficients = self._energies()
        # Keep rules that the compiled loop lacks are applied before the sources are combined.
        keeps = self._rule.keeps if self._fused else (All(),) * len(self._a)
        self._combined = dataclasses.replace(self._rule, keeps=keeps)
        self._kept = torch.empty(min(self._rows, MERGED_BYTES // (4 * self._columns)), self._columns)
        self._known: set[int] = set()  # first rows of the tiles that are in ``_kept``

    def times(self, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`merged_lora.streaming.Tiles`."""
        product = torch.empty(1, self._rows, right.shape[2])
        norms: dict[int, float] = {}

        def visit(_: int, merged: torch.Tensor, start: int) -> None:
            torch.mm(merged, right[0], out=product[0, start : start + merged.shape[0]])
            norms[start] = kernels.squared_norm(merged.data_ptr(), merged.numel())

        self._walk_merged(visit)
        return product, torch.tensor([math.fsum(norms.values())], dtype=torch.float64)

    def transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        """See :class:`merged_lora.streaming.Tiles`."""
        products = torch.zeros(len(self._buffers), self._columns, left.shape[2])

        def visit(core: int, merged: torch.Tensor, start: int) -> None:
            products[core].addmm_(merged.T, left[0, start : start + merged.shape[0]])

        self._walk_merged(visit)
        return products.sum(0, keepdim=True)

    def walk(self, visit: TileVisitor, begins: Collection[int] | None = None) -> None:
        """Form every tile, or those that begin at these flat indices, and call a function for it."""

        def form(core: int, start: int, rows: int) -> None:
            self._form(self._buffers[core], start, rows)
            visit(core, self._buffers[core], start, rows)

        self._walk(form, begins)

    def _walk_merged(self, visit: Callable[[int, torch.Tensor, int], None]) -> None:
        """Call a function for every tile of the merged delta: a core, the tile, its first row."""

        def merge(core: int, start: int, rows: int) -> None:
            buffers, kept = self._buffers[core], start + rows <= self._kept.shape[0]
            merged = self._kept[start : start + rows] if kept else buffers.merged[:rows]
            if start not in self._known:
                self._form(buffers, start, rows)
                self._merge(buffers, start, merged)
                if kept:
                    self._known.add(start)
            visit(core, merged, start)

        self._walk(merge)

    def _walk(self, visit: Callable[[int, int, int], None], begins: Collection[int] | None = None) -> None:
        """Call a function for every tile: a core, the tile's first row, its number of rows.

        Each core has tiles of its own, so that sums over them do not depend on which is faster.
        """
        cores = len(self._buffers)
        starts = [
            [
                start
                for start in range(core * self._step, self._rows, cores * self._step)
                if begins is None or start * self._columns in begins
            ]
            for core in range(cores)
        ]

        def run(part: tuple[int, list[int]]) -> None:
            core, own = part
            for start in own:
                check_exit()
                visit(core, start, min(self._step, self._rows - start))

        for at in range(0, max(map(len, starts)), TILES_AT_A_TIME):
            parts = [(core, own[at : at + TILES_AT_A_TIME]) for core, own in enumerate(starts)]
            self._pool.each(run, [part for part in parts if part[1]])
            self._progress(0)

    def _form(self, buffers: TileBuffers, start: int, rows: int) -> None:
        """The tile of every source."""
        for x, b, a in zip(buffers.tile, self._b, self._a, strict=True):
            torch.mm(b[start : start + rows], a, out=x[:rows])

    def _merge(self, buffers: TileBuffers, start: int, target: torch.Tensor) -> None:
        """Merge the tiles of all sources into rows of the merged delta."""
        rows = target.shape[0]
        values = buffers.tile[:, :rows]
        begin, count = start * self._columns, len(self._a)
        thresholds = NO_THRESHOLDS
        if not self._fused:
            self._keep(buffers, start, rows)
        elif any(self.thresholds):
            pairs = [found[0] if found else KEEP_EVERYTHING for found in self.thresholds]
            thresholds = np.array([(value, cut - begin) for value, cut in pairs], np.int64)
        kernels.combine_tensors(
            np.zeros(1, np.int64),
            np.array([target.data_ptr()], np.int64),
            np.array([kernels.FP32]),
            np.array([target.numel()]),
            np.array([begin]),
            np.array([0]),
            np.array([count]),
            addresses(list(values)),
            np.full(count, kernels.FP32),
            *source_tables([self._combined], self._coefficients),
            thresholds,
        )

    def _keep(self, buffers: TileBuffers, start: int, rows: int) -> None:
        """Set to zero what is not kept in the tile of every source."""
        values, begin = list(buffers.tile[:, :rows]), start * self._columns
        keep_entries(values, begin, self._rule.keeps, self.thresholds, buffers.score)

    def _find_thresholds(self) -> Thresholds:
        """The thresholds that the keep rule of every source needs, by one search for all."""
        keeps = self._rule.keeps
        queries = queries_of(keeps)
        if not queries:
            return [()] * len(keeps)

        def scan(visit: Visit, begins: Collection[int] | None) -> None:
            def visit_scores(core: int, buffers: TileBuffers, start: int, rows: int) -> None:
                values = list(buffers.tile[:, :rows])
                for source in dict(queries):
                    score = scores_of(keeps[source], source, values, buffers.score)
                    visit(core, source, score.data_ptr(), score.numel(), start * self._columns)

            self.walk(visit_scores, begins)

        sizes = [self._rows * self._columns] * len(keeps)
        return by_source(keeps, find_thresholds(scan, len(self._buffers), queries, sizes))

    def _energies(self) -> list[float]:
        """Each source's share of all squares of what is kept."""
        norms: dict[int, list[float]] = {}

        def visit(_: int, buffers: TileBuffers, start: int, rows: int) -> None:
            self._keep(buffers, start, rows)
            norms[start] = [kernels.squared_norm(x.data_ptr(), x.numel()) for x in buffers.tile[:, :rows]]

        self.walk(visit)
        return shares_of([math.fsum(each) for each in zip(*norms.values(), strict=True)])
