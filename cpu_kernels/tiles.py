"""Deltas merged entry by entry, a tile of rows at a time: exact thresholds over the whole, then products.

Each pass forms the tiles anew, by the same products of the same shapes, so that an entry has the same bits in
every pass and exactly as many are kept as are asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from merged_lora.plan import EntryModule, Keep

from . import kernels
from .combine import EVERYTHING, UNKNOWN, Combiner, addresses, energy_shares, source_tables

TILE_BYTES = 16 << 20  # of a tile of every source and of their merge
GROUP = 8  # rows of a tile and of its parts come in eights, so that each begins at a whole Philox call

Pair = tuple[int, int]
Visit = Callable[[int, int, int, int, int], None]
"""Called with the number of a thread, that of a source, and address, size and flat index of a part of it."""
Scan = Callable[[Visit], None]
Look = Callable[[int, slice, torch.Tensor, int], None]
"""Called with the number of a thread, and the rows, values and first flat index of its part of a tile."""


def find_pairs(
    scan: Scan, threads: int, queries: Sequence[tuple[int, int]], sizes: Sequence[int]
) -> list[Pair]:
    """``(thr, cut)`` that keep exactly ``count`` of a source's magnitudes, for queries ``(source, count)``.

    Exact in two passes over float32 values, and a third where entries of equal magnitude straddle the count.
    scan: visits all parts of all sources, those of one in the order of their indices.  sizes: of the sources.
    """
    found: dict[int, Pair] = {}
    for at, (source, count) in enumerate(queries):
        if count >= sizes[source]:
            found[at] = EVERYTHING
        elif count == 0:
            found[at] = (kernels.INFINITY, 0)
    open_queries = [at for at in range(len(queries)) if at not in found]
    if not open_queries:
        return [found[at] for at in range(len(queries))]

    upper = np.zeros((threads, len(sizes), 4, kernels.BINS), np.int64)

    def count_upper(thread: int, source: int, address: int, size: int, _: int) -> None:
        kernels.count_upper(address, size, upper[thread, source])

    scan(count_upper)
    totals = upper.sum((0, 2))
    bins = {at: kernels.find_bin(totals[queries[at][0]], queries[at][1]) for at in open_queries}

    lower = np.zeros((threads, len(queries), 2 * kernels.BINS), np.int64)

    def count_lower(thread: int, source: int, address: int, size: int, _: int) -> None:
        for at in open_queries:
            if queries[at][0] == source:
                kernels.count_lower(address, size, bins[at][0], lower[thread, at])

    scan(count_lower)
    ties: dict[int, tuple[int, int]] = {}
    for at in open_queries:
        counts = lower[:, at].sum(0)
        low, wanted = kernels.find_bin(counts, bins[at][1])
        thr = bins[at][0] << 16 | low
        if wanted == counts[low]:
            found[at] = (thr, EVERYTHING[1])
        else:
            ties[at] = (thr, wanted)
    if ties:
        found |= _cut_ties(scan, queries, ties)
    return [found[at] for at in range(len(queries))]


def _cut_ties(
    scan: Scan, queries: Sequence[tuple[int, int]], ties: dict[int, tuple[int, int]]
) -> dict[int, Pair]:
    """Where the last of the ties that are kept lies: parts are counted, then the right one looked into."""
    met: dict[int, dict[int, int]] = {at: {} for at in ties}

    def count(_: int, source: int, address: int, size: int, begin: int) -> None:
        for at, (thr, _wanted) in ties.items():
            if queries[at][0] == source:
                met[at][begin] = kernels.find_tie(address, size, thr, size + 1)[1]

    scan(count)
    where: dict[int, tuple[int, int]] = {}
    for at, (_thr, wanted) in ties.items():
        left = wanted
        for begin in sorted(met[at]):
            if met[at][begin] >= left:
                where[at] = (begin, left)
                break
            left -= met[at][begin]
    found: dict[int, Pair] = {}

    def locate(_: int, source: int, address: int, size: int, begin: int) -> None:
        for at, (thr, _wanted) in ties.items():
            if queries[at][0] == source and where[at][0] == begin:
                found[at] = (thr, begin + kernels.find_tie(address, size, thr, where[at][1])[0])

    scan(locate)
    return found


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
        self._tiles = torch.empty(len(self._a), self._step, self._columns)
        self._merged = torch.empty(self._step, self._columns)
        self._score = torch.empty(self._step, self._columns) if module.rule.select is not None else None
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
        squares = 0.0
        for start, tile in self._merged_tiles():
            torch.mm(tile, right[0], out=product[0, start : start + tile.shape[0]])
            squares += float(torch.linalg.vector_norm(tile, dim=1, dtype=torch.float64).square().sum())
        return product, torch.tensor([squares], dtype=torch.float64)

    def transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        """See :class:`merged_lora.streaming.Tiles`."""
        product = torch.zeros(1, self._columns, left.shape[2])
        for start, tile in self._merged_tiles():
            product[0].addmm_(tile.T, left[0, start : start + tile.shape[0]])
        return product

    def _parts(self, rows: int) -> list[slice]:
        """The rows of a tile in parts, one for each core."""
        step = -(-rows // (self._combiner.cores * GROUP)) * GROUP
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def source_tiles(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Rows ``[sources, rows, columns]`` of every source's delta, with the index of the first."""
        for start in range(0, self._rows, self._step):
            rows = min(self._step, self._rows - start)
            for x, b, a in zip(self._tiles, self._b, self._a, strict=True):
                torch.mm(b[start : start + rows], a, out=x[:rows])
            yield start, self._tiles[:, :rows]

    def _seen(self, look: Look) -> Iterator[tuple[int, torch.Tensor]]:
        """The tiles of all sources, each after a function has looked at all its parts, on every core."""
        for start, tile in self.source_tiles():

            def each(numbered: tuple[int, slice], tile: torch.Tensor = tile, start: int = start) -> None:
                thread, part = numbered
                look(thread, part, tile[:, part], (start + part.start) * self._columns)

            self._combiner.each(each, list(enumerate(self._parts(tile.shape[1]))))
            yield start, tile

    def _merged_tiles(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Rows of the merged delta, with the index of the first."""

        def merge(_: int, part: slice, values: torch.Tensor, begin: int) -> None:
            self._merge_part(values, self._merged[part], begin)

        for start, tile in self._seen(merge):
            yield start, self._merged[: tile.shape[1]]

    def _merge_part(self, values: torch.Tensor, target: torch.Tensor, begin: int) -> None:
        """Combine rows of every source into rows of the result; begin: flat index of their first entry."""
        self._keep(values, begin)
        size, count = values[0].numel(), len(values)
        known = UNKNOWN
        if self._rule.simple and self.low:
            known = np.array([(thr, cut - begin) for thr, cut in self.low], np.int64)
        kernels.combine_tensors(
            np.zeros(1, np.int64),
            np.array([target.data_ptr()], np.int64),
            np.array([kernels.FP32]),
            np.array([size]),
            np.array([begin]),
            np.array([0]),
            np.array([count]),
            addresses(list(values)),
            np.full(count, kernels.FP32),
            *source_tables([self._combined], self._coefficients),
            known,
        )

    def _keep(self, values: torch.Tensor, begin: int) -> None:
        """Zero what a rule that is not simple does not keep."""
        if self._rule.simple:
            return
        rows, columns = values.shape[1:]
        size = rows * columns
        for i, (x, keep) in enumerate(zip(values, self._rule.keeps, strict=True)):
            address = x.data_ptr()
            if keep.share is not None:
                kernels.keep_graded(
                    address, rows, columns, begin, keep.share, keep.spread, np.uint64(keep.key or 0)
                )
            elif self.low:
                (low, low_cut), (high, high_cut) = self.low[i], self.high[i]
                kernels.keep_between(address, size, low, low_cut - begin, high, high_cut - begin)
        if self._score is not None and self._selected is not None:
            first = begin // self._columns % self._step
            score = self._score[first : first + rows]
            kernels.deviations(addresses(list(values)), size, score.data_ptr())
            thr, cut = self._selected
            for x in values:
                kernels.keep_where(x.data_ptr(), size, score.data_ptr(), thr, cut - begin)

    def _scan(self, visit: Visit) -> None:
        def each(thread: int, _: slice, values: torch.Tensor, begin: int) -> None:
            for source, x in enumerate(values):
                visit(thread, source, x.data_ptr(), x.numel(), begin)

        for _ in self._seen(each):
            pass

    def _thresholds(self) -> tuple[list[Pair], list[Pair]]:
        """Of each source, what keeps the largest with the skipped ones, and what keeps the skipped ones."""
        keeps = self._rule.keeps
        if all(keep.count is None for keep in keeps):
            return [], []
        size = self._rows * self._columns
        counts = [size if keep.count is None else keep.skip + keep.count for keep in keeps]
        queries = [*enumerate(counts), *enumerate(keep.skip for keep in keeps)]
        pairs = find_pairs(self._scan, self._combiner.cores, queries, [size] * len(keeps))
        return pairs[: len(keeps)], pairs[len(keeps) :]

    def _selection(self) -> Pair | None:
        if self._rule.select is None or self._score is None:
            return None
        score = self._score

        def scan(visit: Visit) -> None:
            def each(thread: int, part: slice, values: torch.Tensor, begin: int) -> None:
                out, size = score[part].data_ptr(), values[0].numel()
                kernels.deviations(addresses(list(values)), size, out)
                visit(thread, 0, out, size, begin)

            for _ in self._seen(each):
                pass

        size = self._rows * self._columns
        return find_pairs(scan, self._combiner.cores, [(0, self._rule.select)], [size])[0]

    def _energies(self) -> list[float]:
        """Each source's share of all squares of what is kept."""
        squares = np.zeros(len(self._a))
        for _, tile in self._seen(lambda _thread, _part, values, begin: self._keep(values, begin)):
            squares += [float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 for x in tile]
        return energy_shares(squares.tolist())
