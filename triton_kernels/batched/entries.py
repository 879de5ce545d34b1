"""Entries combined by any rule, in torch on any device: for cases too small or too rare for a kernel.

For coordinates in shared bases, which are small, and for rules that look at whole rows or across sources
before they keep an entry.  Every operation rounds to float32 in the order of ``reference.entries`` and gives
its bits.  Knows nothing of where values come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from merged_lora.plan import (
    SHARES,
    AgreeingMean,
    All,
    EnergyMean,
    Graded,
    Important,
    Keep,
    Largest,
    LargestInModel,
    Middle,
    Random,
    Rule,
    Sum,
    Varied,
)
from merged_lora.triton_kernels.kernels.words import GROUP, INFINITY, MAGNITUDE

LOW_HALF = 0xFFFFFFFF  # of a 64-bit number


@dataclass(frozen=True, eq=False)
class Threshold:
    """Keeps the magnitudes above ``value``, and those equal to it before index ``cut``.

    value: bits of float32 magnitudes, int64 ``[modules]``.
    cut: flat indices in the whole tensor, int64 ``[modules]``.
    """

    value: torch.Tensor
    cut: torch.Tensor

    def keeps(self, scores: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Whether each score is kept, bool ``[modules, entries]``.

        scores: float32 ``[modules, entries]``.
        index: flat index of each entry in the whole tensor ``[entries]``.
        """
        mags, value, cut = magnitudes(scores), self.value[:, None], self.cut[:, None]
        return (mags > value) | ((mags == value) & (index < cut))


Thresholds = Sequence[tuple[Threshold, ...]]
"""For each source the thresholds that its keep rule needs, in the order of ``Keep.counts``."""


def combine(
    values: Sequence[torch.Tensor], rules: Sequence[Rule], thresholds: Thresholds | None = None
) -> torch.Tensor:
    """The merged entries of several modules, float32 ``[modules, rows, columns]``.

    values: for each source float32 ``[modules, rows, columns]``.
    rules: one per module; they differ at most in weights and keys.
    thresholds: those of the whole model; found by the rules' counts if None.
    """
    found = find_in(values, rules[0].keeps) if thresholds is None else thresholds
    kept = keep_entries(values, rules, 0, found)
    return blend(kept, rules, coefficients(kept, rules[0])).view(values[0].shape)


def magnitudes(x: torch.Tensor) -> torch.Tensor:
    """The bits of float32 values without their signs, int32 ``[modules, entries]``; they order like |x|."""
    return x.reshape(x.shape[0], -1).view(torch.int32) & int(MAGNITUDE.value)


def largest(mags: torch.Tensor, counts: Sequence[int]) -> tuple[Threshold, ...]:
    """The thresholds of each module that keep ``counts`` entries, among equals those that come first.

    mags: int32 ``[modules, entries]``.
    """
    ordered = mags.sort(dim=1, descending=True).values
    return tuple(_threshold(mags, ordered, count) for count in counts)


def _threshold(mags: torch.Tensor, ordered: torch.Tensor, count: int) -> Threshold:
    """The threshold that keeps ``count`` entries.

    mags:    int32 ``[modules, entries]``.
    ordered: the same in descending order.
    """
    if count == 0:
        zeros = torch.zeros(mags.shape[0], dtype=torch.int64, device=mags.device)
        return Threshold(zeros + INFINITY.value, zeros)
    value = ordered[:, count - 1 : count]  # [modules, 1]
    wanted = count - (mags > value).sum(1, keepdim=True)  # of the ties
    ties = (mags == value).cumsum(1)
    return Threshold(value[:, 0].long(), (ties < wanted).sum(1) + 1)


def scores_of(keep: Keep, index: int, values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Float32 scores of one source's entries ``[modules, entries]``, whose magnitudes decide what is kept.

    values: of all sources ``[modules, rows, columns]``.
    """
    match keep:
        case Varied():
            return deviations(values).flatten(1)
        case Important():
            return importance(values[index]).flatten(1)
    return values[index].flatten(1)


def importance(x: torch.Tensor) -> torch.Tensor:
    """The importance of entries ``[modules, rows, columns]``, as in ``reference.entries.importance``."""
    # Not by torch.softmax, which vLLM replaces under VLLM_BATCH_INVARIANT=1 by a kernel without float64.
    powers = (x - x.amax(2, keepdim=True)).double().exp()
    p = powers / powers.sum(2, keepdim=True) + 1e-8
    q = 1.0 / x.shape[2] + 1e-8
    divergence = (p * (p / q).log()).sum(2, keepdim=True)
    return x.abs() * divergence.clamp(min=0.0).float()


def find_in(values: Sequence[torch.Tensor], keeps: Sequence[Keep]) -> Thresholds:
    """The thresholds of each source.

    values: whole tensors, for each source ``[modules, rows, columns]``.
    """

    def find(index: int, keep: Keep) -> tuple[Threshold, ...]:
        if not keep.counts:
            return ()
        return largest(magnitudes(scores_of(keep, index, values)), keep.counts)

    return by_source(keeps, find)


def by_source(keeps: Sequence[Keep], find: Callable[[int, Keep], tuple[Threshold, ...]]) -> Thresholds:
    """The thresholds of each source; with ``Varied``, all sources share those of the first."""
    if isinstance(keeps[0], Varied):
        return [find(0, keeps[0])] * len(keeps)
    return [find(i, keep) for i, keep in enumerate(keeps)]


def keep_entries(
    values: Sequence[torch.Tensor], rules: Sequence[Rule], begin: int, thresholds: Thresholds
) -> list[torch.Tensor]:
    """The entries of each source ``[modules, entries]``; 0 if they are not kept, rescaled if drawn at random.

    values: for each source float32 ``[modules, rows, columns]``, all rows or some.
    rules: one per module; they differ at most in weights and keys.
    begin: flat index of the first entry in the whole tensor, a multiple of 8.
    thresholds: of each source.
    """
    keeps = rules[0].keeps
    index = torch.arange(begin, begin + values[0][0].numel(), device=values[0].device)
    varied = scores_of(keeps[0], 0, values) if isinstance(keeps[0], Varied) else None
    kept = []
    for i, (x, keep, found) in enumerate(zip(values, keeps, thresholds, strict=True)):
        flat = x.reshape(x.shape[0], -1)
        match keep:
            case All():
                pass
            case Random() | Graded():
                keys = [_key(rule.keeps[i]) for rule in rules]
                drawn = draws(keys, begin, flat.shape[1], x.device)
                spread = keep.spread if isinstance(keep, Graded) else 0
                share = shares(x, keep.share, spread).reshape(flat.shape)
                rescale = (SHARES / share.double()).float()
                flat = torch.where(drawn < share, flat * rescale, 0.0)
            case Important():
                upper, median, lower = (t.value.int().view(torch.float32) for t in found)
                limit = median + 1.5 * (upper - lower)
                score = scores_of(keep, i, values)
                flat = torch.where(score < limit[:, None], 0.0, flat)  # NaN stays, for all to see
            case Middle():
                low, high = found
                flat = torch.where(low.keeps(flat, index) & ~high.keeps(flat, index), flat, 0.0)
            case Largest() | LargestInModel() | Varied():
                (low,) = found
                flat = torch.where(low.keeps(flat if varied is None else varied, index), flat, 0.0)
            case _:
                raise TypeError(f"the Triton backend has no rule for {keep}")
        kept.append(flat)
    return kept


def _key(keep: Keep) -> int:
    assert isinstance(keep, Random | Graded)
    return keep.key


def shares(x: torch.Tensor, share: int, spread: int) -> torch.Tensor:
    """The share of draws of each entry ``[modules, rows, columns]``, which rises with its rank in its row.

    share, spread: as in :class:`merged_lora.plan.Graded`; all shares are equal if spread is 0.
    """
    columns = x.shape[2]
    if not spread or columns == 1:
        return torch.full(x.shape, share, device=x.device)
    order = x.abs().sort(dim=2, descending=True, stable=True).indices
    ranks = torch.arange(columns - 1, -1, -1, device=x.device).expand(x.shape)
    rank = torch.empty_like(order).scatter_(2, order, ranks)
    rise = (2 * spread * rank + (columns - 1) // 2) // (columns - 1)
    return (share - spread + rise).clamp(1, SHARES)


def deviations(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of squared deviations of the sources from their mean, entry by entry."""
    mean = torch.zeros_like(values[0])
    for x in values:
        mean = mean + x
    mean = mean / float(len(values))
    total = torch.zeros_like(mean)
    for x in values:
        total = total + (x - mean) * (x - mean)
    return total


def squares(values: Sequence[torch.Tensor], exponent: torch.Tensor, bits: int) -> torch.Tensor:
    """The sum of squares of each source, int64 ``[modules, sources]``.

    The unit is ``2 ** (2 * exponent - bits)``.  Each square is rounded down to an integer, so that the sum
    does not depend on its order.

    values: for each source ``[modules, entries]``.
    exponent: ``[modules]``.
    """
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), -exponent)[:, None]
    sums = []
    for x in values:
        unit = x.double() * scale
        sums.append((unit * unit * 2.0**bits).long().sum(1))
    return torch.stack(sums, dim=1)


def coefficients(values: Sequence[torch.Tensor], rule: Rule) -> torch.Tensor | None:
    """Each source's share of all squares, float32 ``[modules, sources]``; None unless the blend needs it."""
    if not isinstance(rule.blend, EnergyMean):
        return None
    most = torch.stack([x.abs().amax(1) for x in values], dim=1).amax(1)  # [modules]
    exponent = torch.frexp(most.double()).exponent
    # As many bits as 64-bit sums of that many squares have room for.
    bits = 62 - max(values[0].shape[1] - 1, 1).bit_length()
    return energy_shares(squares(values, exponent, bits).double())


def energy_shares(sums: torch.Tensor) -> torch.Tensor:
    """Each source's share of the sum over sources ``[modules, sources]``; equal shares if the sum is zero."""
    total = sums.sum(1, keepdim=True)
    return torch.where(total > 0, sums / total, 1.0 / sums.shape[1]).float()


def blend(
    values: Sequence[torch.Tensor], rules: Sequence[Rule], coefficients: torch.Tensor | None
) -> torch.Tensor:
    """The weighted sum of kept values, or the mean of those that agree, float32 ``[modules, entries]``.

    values: for each source ``[modules, entries]``.
    rules: one per module; they differ at most in weights and keys.
    coefficients: of :func:`coefficients`.
    """
    table = torch.tensor([rule.weights for rule in rules], dtype=torch.float32).to(values[0].device)
    weights = [w[:, None] for w in table.unbind(1)]  # [modules, 1] each
    total = torch.zeros_like(values[0])
    how = rules[0].blend
    if isinstance(how, Sum):
        for x, w in zip(values, weights, strict=True):
            total = total + x * w
        return total
    frequency, weighted = (how.frequency, how.weighted) if isinstance(how, AgreeingMean) else (False, False)
    positive, negative = torch.zeros_like(total), torch.zeros_like(total)
    positives, negatives = torch.zeros_like(total), torch.zeros_like(total)
    for i, (x, w) in enumerate(zip(values, weights, strict=True)):
        y = x * w
        z = y if weighted else x
        c = torch.ones_like(w) if coefficients is None else coefficients[:, i : i + 1]
        if coefficients is not None:
            y = y * c
        total = total + (z.sign() if frequency else z)
        positive = torch.where(z > 0, positive + y, positive)
        negative = torch.where(z < 0, negative + y, negative)
        positives = torch.where(z > 0, positives + c, positives)
        negatives = torch.where(z < 0, negatives + c, negatives)
    agreeing = torch.where(total >= 0, positive, negative)
    count = torch.where(total >= 0, positives, negatives)
    return agreeing / torch.where(count > 0, count, 1.0)


def draws(keys: Sequence[int], begin: int, count: int, device: torch.device) -> torch.Tensor:
    """16-bit draws of ``count`` entries, int64 ``[modules, count]``, as in ``reference.philox``.

    keys: 64 bits, one per module.
    begin: flat index of the first entry, a multiple of 8.
    """
    table = torch.tensor([[key & LOW_HALF, key >> 32] for key in keys]).to(device)
    k0, k1 = table[:, :1], table[:, 1:]
    eight = int(GROUP.value)  # entries of one call of Philox
    counters = torch.arange(begin // eight, -(-(begin + count) // eight), device=device)
    c0 = counters[None, :] & LOW_HALF
    c1 = c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & LOW_HALF, (k1 + 0xBB67AE85) & LOW_HALF
    words = torch.stack([c.expand_as(c0) for c in (c0, c1, c2, c3)], dim=2)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=3)
    return halves.reshape(len(keys), -1)[:, :count]


def _product(factor: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper and lower 32 bits of products of 32-bit numbers that are stored as int64."""
    # In two halves, because int64 has no room for the highest bit of an unsigned 64-bit product.
    low = factor * (x & 0xFFFF)
    middle = factor * (x >> 16) + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF
