"""Deltas merged entry by entry, a tile of rows at a time: exact thresholds over the whole, then products.

Each pass forms the tiles anew, by the same products of the same shapes, so that an entry has the same bits in
every pass and exactly as many are kept as are asked for.  Every core walks over tiles of its own, which stay
in its cache, and waits for no other before the end of a pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

import numpy as np
import torch

from merged_lora.plan import EntryModule, Keep

from . import kernels
from .combine import UNKNOWN, Combiner, addresses, energy_shares, source_tables
from .thresholds import Pair, Visit, find_pairs

TILE_BYTES = 4 << 20  # of a tile of every source, of their merge and of a score
GROUP = 8  # rows of a tile come in eights, so that each begins at a whole Philox call


class Room:
    """What one core works in.  tile: ``[sources, rows, columns]``; merged, score: ``[rows, columns]``."""

    def __init__(self, sources: int, rows: int, columns: int) -> None:
        self.tile = torch.empty(sources, rows, columns)
        self.merged = torch.empty(rows, columns)
        self.score = torch.empty(rows, columns)


Look = Callable[[int, Room, int, int], None]
"""Called with the number of a core, its room with a tile of all sources, and the tile's first row and number
of rows."""


class DeltaTiles:
    """The merged delta of one module, as :class:`merged_lora.streaming.Tiles`.

    low, high: per source ``(thr, cut)`` of the largest entries with those to be skipped, and of those to be
    skipped; empty where no entry is kept by its magnitude.
    """

    def __init__(self, module: EntryModule, combiner: Combiner) -> None:
        self._rule, self._combiner = module.rule, combiner
        self._rows, self._columns = module.entries
        self._a = [f.a.float().contiguous() for f in module.sources]
        self._b = [f.b.float() * s for f, s in zip(module.sources, module.scalings, strict=True)]
        each = 4 * (len(self._a) + 2) * self._columns
        self._step = min(-(-self._rows // GROUP), max(1, TILE_BYTES // each // GROUP)) * GROUP
        cores = min(combiner.cores, -(-self._rows // self._step))
        self._rooms = [Room(len(self._a), self._step, self._columns) for _ in range(cores)]
        self.low, self.high = self._thresholds()
        self._selected = self._selection()
        self._coefficients = [1.0] * len(self._a)
        if self._rule.vote is not None and self._rule.vote.energy:
            self._coefficients = self._energies()
        # What is kept at random or between two thresholds is kept before the sources are combined.
        keeps = self._rule.keeps if self._rule.simple else (Keep(),) * len(self._a)
        self._combined = dataclasses.replace(self._rule, keeps=keeps, select=None)

    def times(self, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`merged_lora.streaming.Tiles`."""
        product = torch.empty(1, self._rows, right.shape[2])
        squares = torch.zeros(self._rows, dtype=torch.float64)

        def look(_: int, room: Room, start: int, rows: int) -> None:
            merged = self._merge(room, start, rows)
            torch.mm(merged, right[0], out=product[0, start : start + rows])
            norms = torch.linalg.vector_norm(merged, dim=1, dtype=torch.float64)
            squares[start : start + rows] = norms.square_()

        self.walk(look)
        return product, squares.sum()[None]

    def transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        """See :class:`merged_lora.streaming.Tiles`."""
        products = torch.zeros(len(self._rooms), self._columns, left.shape[2])

        def look(core: int, room: Room, start: int, rows: int) -> None:
            products[core].addmm_(self._merge(room, start, rows).T, left[0, start : start + rows])

        self.walk(look)
        return products.sum(0, keepdim=True)

    def walk(self, look: Look, begins: Collection[int] | None = None) -> None:
        """Form every tile, or those that begin at these flat indices, and have a function look at it."""

        def run(core: int) -> None:
            room = self._rooms[core]
            for start in range(core * self._step, self._rows, len(self._rooms) * self._step):
                if begins is not None and start * self._columns not in begins:
                    continue
                rows = min(self._step, self._rows - start)
                for x, b, a in zip(room.tile, self._b, self._a, strict=True):
                    torch.mm(b[start : start + rows], a, out=x[:rows])
                look(core, room, start, rows)

        self._combiner.each(run, range(len(self._rooms)))

    def _merge(self, room: Room, start: int, rows: int) -> torch.Tensor:
        """Rows of the merged delta, from those of every source."""
        self._keep(room, start, rows)
        values, target = room.tile[:, :rows], room.merged[:rows]
        begin, count = start * self._columns, len(self._a)
        known = UNKNOWN
        if self._rule.simple and self.low:
            known = np.array([(thr, cut - begin) for thr, cut in self.low], np.int64)
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
            known,
        )
        return target

    def _keep(self, room: Room, start: int, rows: int) -> None:
        """Zero what a rule that is not simple does not keep."""
        if self._rule.simple:
            return
        size, begin = rows * self._columns, start * self._columns
        for i, (x, keep) in enumerate(zip(room.tile, self._rule.keeps, strict=True)):
            address = x.data_ptr()
            if keep.share is not None:
                key = np.uint64(keep.key or 0)
                kernels.keep_graded(address, rows, self._columns, begin, keep.share, keep.spread, key)
            elif self.low:
                (low, low_cut), (high, high_cut) = self.low[i], self.high[i]
                kernels.keep_between(address, size, low, low_cut - begin, high, high_cut - begin)
        if self._selected is not None:
            score, (thr, cut) = self._scored(room, rows), self._selected
            for x in room.tile:
                kernels.keep_where(x.data_ptr(), size, score, thr, cut - begin)

    def _scored(self, room: Room, rows: int) -> int:
        """The address of how much the sources deviate from each other, entry by entry."""
        score = room.score.data_ptr()
        kernels.deviations(addresses(list(room.tile)), rows * self._columns, score)
        return score

    def _thresholds(self) -> tuple[list[Pair], list[Pair]]:
        """Of each source, what keeps the largest with the skipped ones, and what keeps the skipped ones."""
        keeps = self._rule.keeps
        if all(keep.count is None for keep in keeps):
            return [], []
        size = self._rows * self._columns
        counts = [size if keep.count is None else keep.skip + keep.count for keep in keeps]
        queries = [*enumerate(counts), *enumerate(keep.skip for keep in keeps)]

        def scan(visit: Visit, begins: Collection[int] | None) -> None:
            def look(core: int, room: Room, start: int, rows: int) -> None:
                for source, x in enumerate(room.tile):
                    visit(core, source, x.data_ptr(), rows * self._columns, start * self._columns)

            self.walk(look, begins)

        pairs = find_pairs(scan, len(self._rooms), queries, [size] * len(keeps))
        return pairs[: len(keeps)], pairs[len(keeps) :]

    def _selection(self) -> Pair | None:
        """What keeps the entries in which the sources deviate most."""
        if self._rule.select is None:
            return None

        def scan(visit: Visit, begins: Collection[int] | None) -> None:
            def look(core: int, room: Room, start: int, rows: int) -> None:
                score = self._scored(room, rows)
                visit(core, 0, score, rows * self._columns, start * self._columns)

            self.walk(look, begins)

        size = self._rows * self._columns
        return find_pairs(scan, len(self._rooms), [(0, self._rule.select)], [size])[0]

    def _energies(self) -> list[float]:
        """Each source's share of all squares of what is kept."""
        squares = torch.zeros(len(self._a), self._rows, dtype=torch.float64)

        def look(_: int, room: Room, start: int, rows: int) -> None:
            self._keep(room, start, rows)
            norms = torch.linalg.vector_norm(room.tile[:, :rows], dim=2, dtype=torch.float64)
            squares[:, start : start + rows] = norms.square_()

        self.walk(look)
        return energy_shares(squares.sum(1).tolist())
