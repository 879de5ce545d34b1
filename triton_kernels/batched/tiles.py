"""Deltas merged entry by entry on a device, some rows of some modules at a time; never a whole delta.

Each pass forms the tiles anew by the same products, in full float32, so that an entry has the same bits in
every pass.  Thresholds are exact: two histograms, of the upper and then of the lower half of the bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from merged_lora.batched import multiplied
from merged_lora.plan import EnergyMean, Keep, Rule, Varied

from . import entries
from .entries import INFINITY, Threshold, Thresholds

TILE_BYTES = 8 << 20  # of a tile of every source, or GROUP rows; intermediates take some ten times as much
GROUP = 8  # rows: each tile begins at a whole Philox call
BINS = 1 << 16


class TorchTiles:
    """Merged deltas of several modules, as :class:`merged_lora.streaming.Tiles`.

    a: per source ``[modules, rank_i, in]``, b: per source ``[modules, out, rank_i]``, of any float dtype.
    scalings: float32 ``[modules, sources]``.  given: their rules, alike but for weights and keys.
    """

    def __init__(
        self,
        a: Sequence[torch.Tensor],
        b: Sequence[torch.Tensor],
        scalings: torch.Tensor,
        given: Sequence[Rule],
    ) -> None:
        self._a = [x.float() for x in a]
        self._b = [x.float() * s[:, None, None] for x, s in zip(b, scalings.unbind(1), strict=True)]
        self._rules = given
        self._modules, self._rows, self._columns = a[0].shape[0], b[0].shape[1], a[0].shape[2]
        row = 4 * self._modules * len(a) * self._columns
        self._step = max(1, TILE_BYTES // row // GROUP) * GROUP
        self._thresholds: Thresholds = entries.by_source(given[0].keeps, self._find_thresholds)
        self._coefficients = self._energies() if isinstance(given[0].blend, EnergyMean) else None

    def times(self, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`merged_lora.streaming.Tiles`."""
        product = right.new_empty(self._modules, self._rows, right.shape[2])
        norms = right.new_zeros(self._modules, dtype=torch.float64)
        for start, tile in self._merged():
            product[:, start : start + tile.shape[1]].baddbmm_(tile, right, beta=0)
            norms += tile.double().square().sum((1, 2))
        return product, norms

    def transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        """See :class:`merged_lora.streaming.Tiles`."""
        product = left.new_zeros(self._modules, self._columns, left.shape[2])
        for start, tile in self._merged():
            product.baddbmm_(tile.mT, left[:, start : start + tile.shape[1]])
        return product

    def _tiles(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Rows ``[modules, rows, columns]`` of every source, with the index of the first."""
        for start in range(0, self._rows, self._step):
            rows = slice(start, start + self._step)
            yield start, [multiplied(b[:, rows], a) for b, a in zip(self._b, self._a, strict=True)]

    def _kept(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """The kept entries of those, ``[modules, entries]``."""
        for start, values in self._tiles():
            begin = start * self._columns
            yield start, entries.keep_entries(values, self._rules, begin, self._thresholds)

    def _merged(self) -> Iterator[tuple[int, torch.Tensor]]:
        for start, values in self._kept():
            merged = entries.blend(values, self._rules, self._coefficients)
            yield start, merged.view(self._modules, -1, self._columns)

    def _find_thresholds(self, index: int, keep: Keep) -> tuple[Threshold, ...]:
        """The thresholds of one source."""

        def scores() -> Iterator[torch.Tensor]:
            if isinstance(keep, Varied):
                for _, values in self._tiles():
                    yield entries.scores_of(keep, index, values)
                return
            for start in range(0, self._rows, self._step):  # no need to form the tiles of the others
                tile = multiplied(self._b[index][:, start : start + self._step], self._a[index])
                yield entries.scores_of(keep, 0, [tile])

        return tuple(self._find(scores, count) for count in keep.counts)

    def _find(self, values: Callable[[], Iterator[torch.Tensor]], count: int) -> Threshold:
        """The threshold that keeps exactly ``count`` of all scores that the iterator yields."""
        size = self._rows * self._columns
        every = torch.zeros(self._modules, dtype=torch.int64, device=self._a[0].device)
        if count == 0:
            return Threshold(every + INFINITY, every)
        bins, wanted = last_bin(_counted(values(), upper_bits), every + count)
        low, wanted = last_bin(_counted(values(), lower_bits(bins)), wanted)
        thr = bins << 16 | low
        cut, met, end = every + size, every.clone(), 0
        for x in values():
            ties = (entries.magnitudes(x) == thr[:, None]).cumsum(1) + met[:, None]
            reached = (met < wanted) & (ties[:, -1] >= wanted)
            cut = torch.where(reached, end + (ties < wanted[:, None]).sum(1) + 1, cut)
            met, end = ties[:, -1], end + ties.shape[1]
        return Threshold(thr, cut)

    def _energies(self) -> torch.Tensor:
        """Each source's share of all squares of what is kept, float32 ``[modules, sources]``."""
        sums = sum(
            torch.stack([x.double().square().sum(1) for x in values], dim=1) for _, values in self._kept()
        )
        assert isinstance(sums, torch.Tensor)
        return entries.energy_shares(sums)


def upper_bits(mags: torch.Tensor) -> torch.Tensor:
    """The bin of each magnitude by its upper 15 bits."""
    return mags >> 16


def lower_bits(upper: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The bin by the lower 16 bits of those magnitudes whose upper bits are ``upper [modules]``."""
    return lambda mags: torch.where(mags >> 16 == upper[:, None], mags & 0xFFFF, BINS)


def count_bins(mags: torch.Tensor, place: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """How many magnitudes ``[modules, entries]`` lie in each bin, int64 ``[modules, BINS]``.

    What is placed at BINS is left out.
    """
    places = place(mags).long()
    modules = places.shape[0]
    offsets = torch.arange(modules, device=mags.device)[:, None] * (BINS + 1)
    counted = torch.bincount((places + offsets).view(-1), minlength=modules * (BINS + 1))
    return counted.view(modules, BINS + 1)[:, :BINS]


def _counted(tiles: Iterator[torch.Tensor], place: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The same of the entries of all tiles."""
    return functools.reduce(torch.add, (count_bins(entries.magnitudes(x), place) for x in tiles))


def last_bin(counts: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest bin from which on at least ``wanted`` entries lie, and how many of that bin are kept."""
    from_top = counts.flip(1).cumsum(1)
    place = (from_top < wanted[:, None]).sum(1)
    above = torch.where(place > 0, from_top.gather(1, (place - 1).clamp(min=0)[:, None])[:, 0], 0)
    return counts.shape[1] - 1 - place, wanted - above
