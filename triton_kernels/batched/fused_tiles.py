"""The passes of ``kernels/sketch.py`` put together: exact thresholds, then products with the merged deltas.

For rules that keep entries by magnitude or at random; see ``tiles.py`` for all others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from merged_lora.plan import AgreeingMean, All, Keep, Largest, Middle, Random, Rule, Sum
from merged_lora.triton_kernels.factors.layout import blend_word, keep_word
from merged_lora.triton_kernels.kernels import sketch
from merged_lora.triton_kernels.kernels.sketch import BINS, DEPTH, KEEP_BETWEEN, WIDEST

from .entries import INFINITY

SAMPLE = 1 << 14  # entries of each source and module that tell where a threshold will be
SAMPLE_BYTES = 24 * SAMPLE  # of them, sorted
GATHER_BYTES = 32 << 20  # of their factors at a time
FULL = 20  # bits of a bin where all magnitudes are counted: 2^31 = BINS * 2^20
NARROWEST = 16  # columns of a product


FUSED = (All, Largest, Middle, Random), (Sum, AgreeingMean)
"""Keep rules and blends that the kernels know."""


class TritonTiles:
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
        device, rule = a[0].device, given[0]
        rank = -(-max(x.shape[1] for x in a) // DEPTH) * DEPTH
        keys = [[_signed(_key(keep)) for keep in one.keeps] for one in given]
        number = len(a)
        nothing = torch.zeros(len(given), number, device=device)
        self._size = b[0].shape[1] * a[0].shape[2]
        counted = any(keep.counts for keep in rule.keeps)
        skipping = any(isinstance(keep, Middle) for keep in rule.keeps)
        self._sources = sketch.Sources(
            a=_filled(a, 1, rank),
            b=_filled(b, 2, rank),
            scalings=scalings.contiguous(),
            weights=torch.tensor([one.weights for one in given], dtype=torch.float32).to(device),
            low=nothing,
            high=nothing + float("inf"),
            keys=torch.tensor(keys).to(device),
            shares=torch.tensor([_share(k) for k in rule.keeps], dtype=torch.int32).to(device),
            rescales=torch.tensor([k.rescale for k in rule.keeps], dtype=torch.float32).to(device),
            precision=sketch.precision({x.dtype for x in (*a, *b)}),
            keep=KEEP_BETWEEN.value if skipping else keep_word(rule.keeps),
            rule=blend_word(rule.blend),
            weighted=isinstance(rule.blend, AgreeingMean) and rule.blend.weighted,
        )
        if counted:
            self._sources.low.copy_(self._find([k.counts[0] if k.counts else self._size for k in rule.keeps]))
        if skipping:
            self._sources.high.copy_(self._find([k.skip if isinstance(k, Middle) else 0 for k in rule.keeps]))

    @property
    def low(self) -> torch.Tensor:
        """The least magnitudes that are kept, float32 ``[modules, sources]``."""
        return self._sources.low

    def times(self, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`merged_lora.streaming.Tiles`."""
        pairs = [sketch.times(self._sources, part) for part in _parts(right)]
        product = torch.cat([product for product, _ in pairs], dim=2)
        return product[:, :, : right.shape[2]], pairs[0][1].double().sum(1)

    def transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        """See :class:`merged_lora.streaming.Tiles`."""
        parts = [sketch.transposed_times(self._sources, part) for part in _parts(left)]
        return torch.cat(parts, dim=2)[:, :, : left.shape[2]]

    def _find(self, counts: Sequence[int]) -> torch.Tensor:
        """The magnitudes, float32 ``[modules, sources]``, from which on that many of each source lie.

        A sample tells where to look; where it misleads, all magnitudes are counted.
        """
        device = self._sources.a.device
        wanted = torch.tensor(counts, device=device).expand(self._sources.scalings.shape)
        base, shift = self._bracket(wanted)
        open_ = (wanted > 0) & (wanted < self._size)
        found = torch.where(wanted > 0, 0, INFINITY).int()
        while bool(open_.any()):
            counted = sketch.count(self._sources, base, shift).long()
            from_top = counted[..., :BINS].flip(-1).cumsum(-1) + counted[..., BINS:]
            place = (from_top < wanted[..., None]).sum(-1)
            missed = (place == BINS) | (counted[..., BINS] >= wanted)
            bin_ = (BINS - 1 - place).clamp(min=0)
            start = base + (bin_.int() << shift)
            finished = open_ & ~missed & (shift == 0)
            found = torch.where(finished, start, found)
            open_ = open_ & ~finished
            base = torch.where(missed, 0, start)
            shift = torch.where(missed, FULL, (shift - 11).clamp(min=0)).int()
        return found.view(torch.float32)

    def _bracket(self, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where to look first, and in bins of how many bits: int32 ``[modules, sources]``."""
        number, modules, _, columns = self._sources.extent
        generator = torch.Generator().manual_seed(0)
        sampled = min(SAMPLE, self._size)
        at = torch.randint(self._size, (sampled,), generator=generator).to(wanted.device)
        rank = self._sources.b.shape[3]
        parts = []
        for some in torch.split(at, max(1, GATHER_BYTES // (12 * modules * rank))):
            row, column = some // columns, some % columns
            products = [
                (self._sources.b[i][:, row] * self._sources.a[i][:, :, column].mT).sum(2)
                for i in range(number)
            ]
            parts.append(torch.stack(products, dim=1) * self._sources.scalings[:, :, None])
        bits = torch.cat(parts, dim=2).view(torch.int32) & 0x7FFFFFFF
        ordered = bits.sort(dim=2, descending=True).values
        share = wanted / self._size
        middle, spread = share * sampled, 4.0 * (share * (1.0 - share) * sampled).sqrt() + 1.0
        ends = [(middle + sign * spread).long().clamp(0, sampled - 1) for sign in (1.0, -1.0)]
        low, high = (ordered.gather(2, end[..., None])[..., 0] for end in ends)
        bits_needed = torch.log2((high - low + 1).float() / BINS).ceil().clamp(0, FULL)
        return low.int(), bits_needed.int()


def _share(keep: Keep) -> int:
    return keep.share if isinstance(keep, Random) else 0


def _key(keep: Keep) -> int:
    return keep.key if isinstance(keep, Random) else 0


def _signed(key: int) -> int:
    """64 bits in two's complement."""
    return key - (1 << 64) if key >> 63 else key


def _filled(factors: Sequence[torch.Tensor], dim: int, rank: int) -> torch.Tensor:
    """The factors of all sources in float32, ``[sources, modules, ...]``, with zeros up to a rank."""
    shape = list(factors[0].shape)
    shape[dim] = rank
    result = torch.zeros(len(factors), *shape, device=factors[0].device)
    for x, target in zip(factors, result, strict=True):
        target.narrow(dim, 0, x.shape[dim]).copy_(x)
    return result


def _parts(x: torch.Tensor) -> list[torch.Tensor]:
    """The columns in parts as wide as the kernels take them, the last with zeros up to such a width."""
    return [_widened(part) for part in torch.split(x, WIDEST, dim=2)]


def _widened(x: torch.Tensor) -> torch.Tensor:
    width = max(NARROWEST, triton.next_power_of_2(x.shape[2]))
    return torch.nn.functional.pad(x, (0, width - x.shape[2])).contiguous()
