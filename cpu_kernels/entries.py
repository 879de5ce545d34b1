"""Which entries a keep rule keeps, in float32 values of every source: whole tensors, or a tile of each.

A new rule is a case in :func:`keep_entries` and, if its scores are not the values themselves, in
:func:`scores_of`. A rule compares magnitudes of scores with thresholds. Random draws need neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from merged_lora.plan import All, Graded, Important, Keep, Largest, Middle, Random, Varied

from . import kernels
from .thresholds import KEEP_EVERYTHING, Query, Threshold

AT_A_TIME = 1 << 16  # entries whose importance is computed

Thresholds = Sequence[tuple[Threshold, ...]]
"""For every source the thresholds that its keep rule needs, in the order of ``Keep.counts``."""


def queries_of(keeps: Sequence[Keep]) -> list[Query]:
    """The thresholds to be found for the rules of all sources: index of a source, and a count."""
    scored = keeps[:1] if isinstance(keeps[0], Varied) else keeps  # varied: all share those of the first
    return [(i, count) for i, keep in enumerate(scored) for count in keep.counts]


def by_source(keeps: Sequence[Keep], found: Sequence[Threshold]) -> list[tuple[Threshold, ...]]:
    """The thresholds of each source, from those of all queries in their order."""
    if isinstance(keeps[0], Varied):
        return [tuple(found)] * len(keeps)
    left = iter(found)
    return [tuple(next(left) for _ in keep.counts) for keep in keeps]


def scores_of(keep: Keep, index: int, values: Sequence[torch.Tensor], buffer: torch.Tensor) -> torch.Tensor:
    """The float32 scores of one source's entries, ``[rows, columns]``.

    values: of every source, float32 ``[rows, columns]``, contiguous.
    buffer: float32, at least as many entries; holds the scores if they are not the values themselves.
    """
    x = values[index]
    score = buffer.view(-1)[: x.numel()].view(x.shape)
    match keep:
        case Varied():
            kernels.deviations(addresses(values), x.numel(), score.data_ptr())
        case Important():
            step = max(1, AT_A_TIME // x.shape[1])  # a few rows, because they are copied in float64
            for rows, target in zip(torch.split(x, step), torch.split(score, step), strict=True):
                p = rows.double().softmax(1).add_(1e-8)
                q = 1.0 / x.shape[1] + 1e-8
                divergence = (p * (p / q).log_()).sum(1, keepdim=True)
                torch.mul(rows.abs(), divergence.clamp_(min=0.0).float(), out=target)
        case _:
            return x
    return score


def find_in(
    values: Sequence[torch.Tensor], keeps: Sequence[Keep], buffer: torch.Tensor
) -> list[tuple[Threshold, ...]]:
    """The thresholds of whole tensors, by source."""
    bins = np.zeros(2 * kernels.BINS, np.uint32)
    found = []
    for i, count in queries_of(keeps):
        score = scores_of(keeps[i], i, values, buffer)
        pair = kernels.find_threshold(score.data_ptr(), score.numel(), kernels.FP32, count, bins)
        found.append(Threshold(*pair))
    return by_source(keeps, found)


def keep_entries(
    values: Sequence[torch.Tensor],
    begin: int,
    keeps: Sequence[Keep],
    thresholds: Thresholds,
    buffer: torch.Tensor,
) -> None:
    """Set to zero, in place, the entries that are not kept, and rescale those that are drawn.

    values: of every source, float32 ``[rows, columns]``, contiguous.
    begin:  flat index of the first entry in the whole tensor, a multiple of 8; 0 for whole tensors.
    keeps:  the rule of every source.
    buffer: scratch, float32, as many entries as one source has here.
    """
    rows, columns = values[0].shape
    size = rows * columns
    if isinstance(keeps[0], Varied):  # before any source changes, because all of them are in the scores
        scores_of(keeps[0], 0, values, buffer)
    for x, keep, found in zip(values, keeps, thresholds, strict=True):
        address = x.data_ptr()
        match keep:
            case All():
                pass
            case Random(share, key):
                kernels.keep_drawn(address, size, begin, share, np.uint64(key))
            case Graded(share, key, spread):
                kernels.keep_graded(address, rows, columns, begin, share, spread, np.uint64(key))
            case Largest():
                (low,) = found
                kernels.keep_where(address, size, address, low.value, low.cut - begin)
            case Middle():
                low, high = found
                kernels.keep_between(address, size, low.value, low.cut - begin, high.value, high.cut - begin)
            case Important():
                score = scores_of(keep, 0, [x], buffer)
                upper, median, lower = np.array([t.value for t in found], np.int32).view(np.float32)
                with np.errstate(over="ignore", invalid="ignore"):
                    limit = median + np.float32(1.5) * (upper - lower)
                bits = 0 if np.isnan(limit) else int(limit.view(np.int32))  # NaN stays, for all to see
                kernels.keep_where(address, size, score.data_ptr(), bits, KEEP_EVERYTHING.cut)
            case Varied():
                (low,) = found
                kernels.keep_where(address, size, buffer.data_ptr(), low.value, low.cut - begin)
            case _:
                raise TypeError(f"the CPU backend has no rule for {keep}")


def energies_of(values: Sequence[torch.Tensor]) -> list[float]:
    """Each source's share of the sum of all squares, in integers so that no order matters."""
    size = values[0].numel()
    exponent = math.frexp(max(float(x.abs().max()) for x in values))[1]
    bits = 62 - max(size - 1, 1).bit_length()
    return shares_of([kernels.sum_squares(x.data_ptr(), size, exponent, bits) for x in values])


def shares_of(squares: Sequence[float]) -> list[float]:
    """Each one's share of the sum, equal shares if that is zero."""
    total = sum(squares)
    return [one / total if total else 1.0 / len(squares) for one in squares]


def addresses(tensors: Sequence[torch.Tensor]) -> NDArray[np.int64]:
    """The address of each tensor's first entry."""
    return np.array([tensor.data_ptr() for tensor in tensors], np.int64)
