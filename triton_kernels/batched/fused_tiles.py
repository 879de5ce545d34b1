"""The passes of ``kernels/sketch.py`` put together: exact thresholds, then products with the merged deltas.

For rules that keep entries by magnitude or at random; ``tiles.py`` is for all others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from merged_lora.plan import SHARES, AgreeingMean, All, Keep, Largest, Middle, Random, Rule, Sum
from merged_lora.triton_kernels.kernels import sketch
from merged_lora.triton_kernels.kernels.combine import blend_code, keep_code
from merged_lora.triton_kernels.kernels.sketch import BINS, DEPTH, KEEP_BETWEEN, WIDEST
from merged_lora.triton_kernels.kernels.words import INFINITY, MAGNITUDE

FUSED = (All, Largest, Middle, Random), (Sum, AgreeingMean)
"""Keep rules and blends that the kernels do."""
SAMPLE = 1 << 14  # entries of each source and module that predict its threshold
SAMPLE_BYTES = 24 * SAMPLE  # while they are sorted
GATHER_BYTES = 32 << 20  # of the sampled rows and columns of factors, gathered at a time
BIN_BITS = 11  # BINS = 2^11: each count resolves that many bits of a threshold
FULL = 20  # bits of a bin if all magnitudes are counted: 2^31 = BINS * 2^20
NARROWEST = 16  # columns of a product


class TritonTiles:
    """Merged deltas of several modules, as :class:`merged_lora.streaming.Tiles`.

    a: for each source ``[modules, rank_i, in]``, any float dtype.
    b: for each source ``[modules, out, rank_i]``, any float dtype.
    scalings: of the products B A, float32 ``[modules, sources]``.
    rules: one per module, of FUSED; they differ at most in weights and keys.
    """

    def __init__(
        self,
        a: Sequence[torch.Tensor],
        b: Sequence[torch.Tensor],
        scalings: torch.Tensor,
        rules: Sequence[Rule],
    ) -> None:
        device, rule = a[0].device, rules[0]
        self._deltas = stacked_deltas(a, b, scalings)
        shape, size = self._deltas.scalings.shape, b[0].shape[1] * a[0].shape[2]
        skipping = any(isinstance(keep, Middle) for keep in rule.keeps)
        low, high = torch.zeros(shape, device=device), torch.full(shape, torch.inf, device=device)
        if any(keep.counts for keep in rule.keeps):
            low = find_magnitudes(self._deltas, [k.counts[0] if k.counts else size for k in rule.keeps])
        if skipping:
            high = find_magnitudes(self._deltas, [k.skip if isinstance(k, Middle) else 0 for k in rule.keeps])
        self._merge = sketch.Merge(
            weights=torch.tensor([r.weights for r in rules], dtype=torch.float32).to(device),
            low=low,
            high=high,
            keys=torch.tensor([[_signed(_key(keep)) for keep in r.keeps] for r in rules]).to(device),
            shares=torch.tensor([_share(keep) for keep in rule.keeps], dtype=torch.int32).to(device),
            rescales=torch.tensor([keep.rescale for keep in rule.keeps], dtype=torch.float32).to(device),
            keep=KEEP_BETWEEN.value if skipping else keep_code(rule.keeps),
            blend=blend_code(rule.blend),
            weighted=isinstance(rule.blend, AgreeingMean) and rule.blend.weighted,
        )

    def times(self, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`merged_lora.streaming.Tiles`."""
        parts = [sketch.times(self._deltas, self._merge, part) for part in _parts(right)]
        product = torch.cat([product for product, _ in parts], dim=2)
        return product[:, :, : right.shape[2]], parts[0][1].double().sum(1)

    def transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        """See :class:`merged_lora.streaming.Tiles`."""
        parts = [sketch.transposed_times(self._deltas, self._merge, part) for part in _parts(left)]
        return torch.cat(parts, dim=2)[:, :, : left.shape[2]]


def stacked_deltas(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], scalings: torch.Tensor
) -> sketch.Deltas:
    """The deltas of all sources as the kernels read them.

    a, b, scalings: as in :class:`TritonTiles`.
    """
    rank = -(-max(x.shape[1] for x in a) // DEPTH) * DEPTH
    precision = sketch.precision({x.dtype for x in (*a, *b)})
    return sketch.Deltas(_filled(a, 1, rank), _filled(b, 2, rank), scalings.contiguous(), precision)


def find_magnitudes(deltas: sketch.Deltas, counts: Sequence[int]) -> torch.Tensor:
    """The least magnitudes, float32 ``[modules, sources]``, among that many largest entries of each delta.

    counts: one per source; infinity is returned for 0, and 0 for all entries.

    A sample predicts where to search.  If it misleads, all magnitudes are counted.
    """
    size = deltas.b.shape[2] * deltas.a.shape[3]
    wanted = torch.tensor(counts, device=deltas.a.device).expand(deltas.scalings.shape)
    base, shift = _bracket(deltas, wanted)
    searching = (wanted > 0) & (wanted < size)
    found = torch.where(wanted > 0, 0, INFINITY.value).int()
    while bool(searching.any()):
        counted = sketch.count(deltas, base, shift).long()  # [modules, sources, BINS + 1]
        from_top = counted[..., :BINS].flip(-1).cumsum(-1) + counted[..., BINS:]
        bin_from_top = (from_top < wanted[..., None]).sum(-1)
        # The threshold is missed if it lies below or above all bins.
        missed = (bin_from_top == BINS) | (counted[..., BINS] >= wanted)
        start = base + ((BINS - 1 - bin_from_top).clamp(min=0).int() << shift)
        finished = searching & ~missed & (shift == 0)
        found = torch.where(finished, start, found)
        searching = searching & ~finished
        base = torch.where(missed, 0, start)
        shift = torch.where(missed, FULL, (shift - BIN_BITS).clamp(min=0)).int()
    return found.view(torch.float32)


def _bracket(deltas: sketch.Deltas, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The magnitudes at which the first bins begin, and the bits of a bin, int32 ``[modules, sources]``.

    The bins cover four standard deviations around the wanted rank in a sample.
    """
    number, modules, rows, columns = deltas.extent
    size = rows * columns
    generator = torch.Generator().manual_seed(0)
    sampled = min(SAMPLE, size)
    sample = torch.randint(size, (sampled,), generator=generator).to(wanted.device)
    rank = deltas.b.shape[3]
    parts = []
    for entries in torch.split(sample, max(1, GATHER_BYTES // (12 * modules * rank))):
        row, column = entries // columns, entries % columns
        products = [(deltas.b[i][:, row] * deltas.a[i][:, :, column].mT).sum(2) for i in range(number)]
        parts.append(torch.stack(products, dim=1) * deltas.scalings[:, :, None])
    bits = torch.cat(parts, dim=2).view(torch.int32) & MAGNITUDE.value  # [modules, sources, sampled]
    ordered = bits.sort(dim=2, descending=True).values
    share = wanted / size
    middle, spread = share * sampled, 4.0 * (share * (1.0 - share) * sampled).sqrt() + 1.0
    ends = [(middle + sign * spread).long().clamp(0, sampled - 1) for sign in (1.0, -1.0)]
    low, high = (ordered.gather(2, end[..., None])[..., 0] for end in ends)
    bits_needed = torch.log2((high - low + 1).float() / BINS).ceil().clamp(0, FULL)
    return low.int(), bits_needed.int()


def _share(keep: Keep) -> int:
    return keep.share if isinstance(keep, Random) else SHARES  # all of a source beside those that are drawn


def _key(keep: Keep) -> int:
    return keep.key if isinstance(keep, Random) else 0


def _signed(key: int) -> int:
    """An unsigned number of 64 bits in two's complement."""
    return key - (1 << 64) if key >> 63 else key


def _filled(factors: Sequence[torch.Tensor], dim: int, rank: int) -> torch.Tensor:
    """The factors of all sources, float32 ``[sources, modules, ..]``, padded with zeros to a rank.

    dim: the dimension of the rank in each factor ``[modules, ..]``.
    """
    shape = list(factors[0].shape)
    shape[dim] = rank
    result = torch.zeros(len(factors), *shape, device=factors[0].device)
    for x, target in zip(factors, result, strict=True):
        target.narrow(dim, 0, x.shape[dim]).copy_(x)
    return result


def _parts(x: torch.Tensor) -> list[torch.Tensor]:
    """Column blocks ``[modules, rows, width]`` of kernel width; the last one is zero-padded."""
    return [_widened(part) for part in torch.split(x, WIDEST, dim=2)]


def _widened(x: torch.Tensor) -> torch.Tensor:
    width = max(NARROWEST, triton.next_power_of_2(x.shape[2]))
    return torch.nn.functional.pad(x, (0, width - x.shape[2])).contiguous()
