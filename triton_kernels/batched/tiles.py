"""Deltas merged entry by entry in torch on any device, a few rows at a time, never a whole delta.

Each pass forms the tiles again by the same products, in full float32, so that an entry has the same bits in
every pass.  Thresholds are exact: they are found by two histograms, of the upper and then of the lower half
of the magnitudes' bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from merged_lora.batched import multiplied
from merged_lora.plan import EnergyMean, Keep, Rule, Varied
from merged_lora.triton_kernels.kernels.words import GROUP, INFINITY

from . import entries
from .entries import Threshold, Thresholds

ROW_STEP = int(GROUP.value)  # at least, and a multiple, so that a tile begins with a whole call of Philox
TILE_BYTES = 8 << 20  # of the tiles of all sources, or ROW_STEP rows
"""Temporaries take about ten times as much."""
BINS = 1 << 16


class TorchTiles:
    """Merged deltas of several modules, as :class:`merged_lora.streaming.Tiles`.

    a: for each source ``[modules, rank_i, in]``, any float dtype.
    b: for each source ``[modules, out, rank_i]``, any float dtype.
    scalings: of the products B A, float32 ``[modules, sources]``.
    rules: one per module; they differ at most in weights and keys.
    """

    def __init__(
        self,
        a: Sequence[torch.Tensor],
        b: Sequence[torch.Tensor],
        scalings: torch.Tensor,
        rules: Sequence[Rule],
    ) -> None:
        self._a = [x.float() for x in a]
        self._b = [x.float() * s[:, None, None] for x, s in zip(b, scalings.unbind(1), strict=True)]
        self._rules = rules
        self._modules, self._rows, self._columns = a[0].shape[0], b[0].shape[1], a[0].shape[2]
        row = 4 * self._modules * len(a) * self._columns
        self._step = max(1, TILE_BYTES // row // ROW_STEP) * ROW_STEP
        self._thresholds: Thresholds = entries.by_source(rules[0].keeps, self._find_thresholds)
        self._coefficients = self._energies() if isinstance(rules[0].blend, EnergyMean) else None

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
        """The index of a tile's first row, and the tile of every source ``[modules, rows, columns]``."""
        for start in range(0, self._rows, self._step):
            rows = slice(start, start + self._step)
            yield start, [multiplied(b[:, rows], a) for b, a in zip(self._b, self._a, strict=True)]

    def _kept(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """The same with kept entries ``[modules, entries]``."""
        for start, values in self._tiles():
            begin = start * self._columns
            yield start, entries.keep_entries(values, self._rules, begin, self._thresholds)

    def _merged(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The index of a tile's first row, and the merged tile ``[modules, rows, columns]``."""
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
            for start in range(0, self._rows, self._step):  # other sources are not needed
                tile = multiplied(self._b[index][:, start : start + self._step], self._a[index])
                yield entries.scores_of(keep, 0, [tile])

        return self._find(scores, keep.counts) if keep.counts else ()

    def _find(
        self, scores: Callable[[], Iterator[torch.Tensor]], counts: Sequence[int]
    ) -> tuple[Threshold, ...]:
        """The thresholds that keep exactly ``counts`` of the scores, in three passes over their tiles."""
        size = self._rows * self._columns
        zeros = torch.zeros(self._modules, dtype=torch.int64, device=self._a[0].device)
        (upper,) = _counted(scores(), [upper_bits])
        bins, wanted = zip(*(last_bin(upper, zeros + count) for count in counts), strict=True)
        lower = _counted(scores(), [lower_bits(x) for x in bins])
        low, wanted = zip(*map(last_bin, lower, wanted), strict=True)
        values = [x << 16 | y for x, y in zip(bins, low, strict=True)]
        # Then the index of the last tie that is wanted, with the ties of all tiles before.
        cuts, before, end = [zeros + size for _ in counts], [zeros for _ in counts], 0
        for x in scores():
            mags = entries.magnitudes(x)
            for i, (value, most) in enumerate(zip(values, wanted, strict=True)):
                ties = (mags == value[:, None]).cumsum(1) + before[i][:, None]
                reached = (before[i] < most) & (ties[:, -1] >= most)
                cuts[i] = torch.where(reached, end + (ties < most[:, None]).sum(1) + 1, cuts[i])
                before[i] = ties[:, -1]
            end += mags.shape[1]
        return tuple(
            Threshold(value, cut) if count else Threshold(zeros + INFINITY.value, zeros)
            for count, value, cut in zip(counts, values, cuts, strict=True)
        )

    def _energies(self) -> torch.Tensor:
        """Each source's share of the squares of all kept entries, float32 ``[modules, sources]``."""
        sums = sum(
            torch.stack([x.double().square().sum(1) for x in values], dim=1) for _, values in self._kept()
        )
        assert isinstance(sums, torch.Tensor)
        return entries.energy_shares(sums)


def upper_bits(mags: torch.Tensor) -> torch.Tensor:
    """The bin of each magnitude by its upper 15 bits."""
    return mags >> 16


def lower_bits(upper: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from magnitudes to bins, by their lower 16 bits; BINS if the upper bits are not ``upper``.

    upper: ``[modules]``.
    """
    return lambda mags: torch.where(mags >> 16 == upper[:, None], mags & 0xFFFF, BINS)


def count_bins(mags: torch.Tensor, to_bin: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The number of magnitudes in each bin, int64 ``[modules, BINS]``.

    mags: ``[modules, entries]``.
    to_bin: from magnitudes to bins; magnitudes in bin BINS are not counted.
    """
    bins = to_bin(mags).long()
    modules = bins.shape[0]
    offsets = torch.arange(modules, device=mags.device)[:, None] * (BINS + 1)
    counted = torch.bincount((bins + offsets).view(-1), minlength=modules * (BINS + 1))
    return counted.view(modules, BINS + 1)[:, :BINS]


def _counted(
    tiles: Iterator[torch.Tensor], to_bins: Sequence[Callable[[torch.Tensor], torch.Tensor]]
) -> list[torch.Tensor]:
    """The number of magnitudes of all tiles in each bin, int64 ``[modules, BINS]`` for each binning."""
    counts = ([count_bins(mags, to_bin) for to_bin in to_bins] for mags in map(entries.magnitudes, tiles))
    return functools.reduce(lambda x, y: list(map(torch.add, x, y)), counts)


def last_bin(counts: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bin of the last of the ``wanted`` largest magnitudes, and how many of them are in that bin.

    counts: ``[modules, BINS]``.
    wanted: ``[modules]``.
    """
    from_top = counts.flip(1).cumsum(1)
    skipped = (from_top < wanted[:, None]).sum(1)  # bins above it
    above = torch.where(skipped > 0, from_top.gather(1, (skipped - 1).clamp(min=0)[:, None])[:, 0], 0)
    return counts.shape[1] - 1 - skipped, wanted - above
