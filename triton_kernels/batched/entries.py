"""Entries combined by any rule, in torch operations on any device: where no kernel is worth its while.

For coordinates in shared bases, which are small, and for rules that look at whole rows or across sources
before they keep an entry (DELLA, breadcrumbs, SCE).  Every operation rounds to float32 in the order of
``reference.entries`` and gives its bits.  Knows nothing of where values come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from merged_lora.plan import SHARES, Rule

MAGNITUDE = 0x7FFFFFFF
INFINITY = 0x7F800000
HALF = 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class Bound:
    """The largest entries: kept where the magnitude's bits exceed ``thr``, or equal it before index ``cut``.

    thr, cut: int64 ``[modules]``.
    """

    thr: torch.Tensor
    cut: torch.Tensor

    def keeps(self, magnitudes: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Which of ``magnitudes [modules, entries]`` are kept; index: of the entries in the whole tensor."""
        thr, cut = self.thr[:, None], self.cut[:, None]
        return (magnitudes > thr) | ((magnitudes == thr) & (index < cut))


def combine(
    values: Sequence[torch.Tensor],
    rules: Sequence[Rule],
    known: Sequence[tuple[Bound, Bound] | None] | None = None,
) -> torch.Tensor:
    """The merged entries of several modules, float32 ``[modules, rows, columns]``.

    values: per source float32 ``[modules, rows, columns]``.  rules: one per module; they may differ in
    weights and keys alone.  known: what :func:`bounds` would find by the rules' counts, to be used instead.
    """
    shape = values[0].shape
    kept = keep(values, rules, 0, bounds(values, rules[0]) if known is None else known)
    if rules[0].select is not None:
        score = deviations(kept)
        chosen = largest(magnitudes(score), rules[0].select)
        kept = select(kept, score, chosen, 0)
    return blend(kept, rules, coefficients(kept, rules[0])).view(shape)


def magnitudes(x: torch.Tensor) -> torch.Tensor:
    """The bits of float32 values without their signs, int32 ``[modules, entries]``; they order alike."""
    return x.reshape(x.shape[0], -1).view(torch.int32) & MAGNITUDE


def largest(mags: torch.Tensor, count: int) -> Bound:
    """What keeps exactly ``count`` entries of each module, among equal magnitudes those that come first."""
    size = mags.shape[1]
    every = torch.zeros(mags.shape[0], dtype=torch.int64, device=mags.device)
    if count >= size:
        return Bound(every, every + size)
    if count == 0:
        return Bound(every + INFINITY, every)
    thr = mags.sort(dim=1, descending=True).values[:, count - 1 : count]
    wanted = count - (mags > thr).sum(1, keepdim=True)
    met = (mags == thr).cumsum(1)
    cut = (met < wanted).sum(1) + 1
    return Bound(thr[:, 0].long(), cut)


def bounds(values: Sequence[torch.Tensor], rule: Rule) -> list[tuple[Bound, Bound] | None]:
    """Per source what keeps the largest with the skipped, and what keeps the skipped; None for all."""
    found: list[tuple[Bound, Bound] | None] = []
    for x, one in zip(values, rule.keeps, strict=True):
        if one.count is None:
            found.append(None)
            continue
        mags = magnitudes(x)
        found.append((largest(mags, one.skip + one.count), largest(mags, one.skip)))
    return found


def keep(
    values: Sequence[torch.Tensor],
    rules: Sequence[Rule],
    begin: int,
    known: Sequence[tuple[Bound, Bound] | None],
) -> list[torch.Tensor]:
    """Each source's entries, 0 where they are not kept, ``[modules, entries]``; random ones are rescaled.

    begin: flat index of the first entry in the whole tensor, a multiple of 8.
    """
    kept = []
    for i, (x, pair, one) in enumerate(zip(values, known, rules[0].keeps, strict=True)):
        flat = x.reshape(x.shape[0], -1)
        if pair is not None:
            index = torch.arange(begin, begin + flat.shape[1], device=x.device)
            mags = magnitudes(x)
            inside = pair[0].keeps(mags, index) & ~pair[1].keeps(mags, index)
            flat = torch.where(inside, flat, 0.0)
        elif one.share is not None:
            keys = [rule.keeps[i].key or 0 for rule in rules]
            drawn = draws(keys, begin, flat.shape[1], x.device)
            share = shares(x, one.share, one.spread).reshape(flat.shape)
            rescale = (SHARES / share.double()).float()
            flat = torch.where(drawn < share, flat * rescale, 0.0)
        kept.append(flat)
    return kept


def shares(x: torch.Tensor, share: int, spread: int) -> torch.Tensor:
    """The share of 65536 of each entry ``[modules, rows, columns]``, rising with its rank in its row."""
    columns = x.shape[2]
    if not spread or columns == 1:
        return torch.full(x.shape, share, device=x.device)
    order = x.abs().sort(dim=2, descending=True, stable=True).indices
    ranks = torch.arange(columns - 1, -1, -1, device=x.device).expand(x.shape)
    rank = torch.empty_like(order).scatter_(2, order, ranks)
    rise = (2 * spread * rank + (columns - 1) // 2) // (columns - 1)
    return (share - spread + rise).clamp(1, SHARES)


def deviations(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of squared deviations between the sources, entry by entry."""
    mean = torch.zeros_like(values[0])
    for x in values:
        mean = mean + x
    mean = mean / float(len(values))
    total = torch.zeros_like(mean)
    for x in values:
        total = total + (x - mean) * (x - mean)
    return total


def select(
    values: Sequence[torch.Tensor], score: torch.Tensor, chosen: Bound, begin: int
) -> list[torch.Tensor]:
    """The values ``[modules, entries]``, 0 where their score is not among the largest."""
    index = torch.arange(begin, begin + score.shape[1], device=score.device)
    mask = chosen.keeps(magnitudes(score), index)
    return [torch.where(mask, x, 0.0) for x in values]


def squares(values: Sequence[torch.Tensor], exponent: torch.Tensor, bits: int) -> torch.Tensor:
    """Per source the sum of squares in units of ``2 ** (2 * exponent - bits)``, int64 ``[modules, sources]``.

    exponent: ``[modules]``.  Each square is rounded down to a whole number, so that no order matters.
    """
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), -exponent)[:, None]
    sums = []
    for x in values:
        unit = x.double() * scale
        sums.append((unit * unit * 2.0**bits).long().sum(1))
    return torch.stack(sums, dim=1)


def coefficients(values: Sequence[torch.Tensor], rule: Rule) -> torch.Tensor | None:
    """Each source's share of all squares, float32 ``[modules, sources]``; None where no rule asks for it."""
    if rule.vote is None or not rule.vote.energy:
        return None
    most = torch.stack([x.abs().amax(1) for x in values], dim=1).amax(1)
    exponent = torch.frexp(most.double()).exponent
    bits = 62 - max(values[0].shape[1] - 1, 1).bit_length()
    return energy_shares(squares(values, exponent, bits).double())


def energy_shares(sums: torch.Tensor) -> torch.Tensor:
    """Each one's share of the sum over sources ``[modules, sources]``, equal shares where that is zero."""
    total = sums.sum(1, keepdim=True)
    return torch.where(total > 0, sums / total, 1.0 / sums.shape[1]).float()


def blend(values: Sequence[torch.Tensor], rules: Sequence[Rule], given: torch.Tensor | None) -> torch.Tensor:
    """The weighted sum of kept values ``[modules, entries]``, or the mean of those that agree."""
    table = torch.tensor([rule.weights for rule in rules], dtype=torch.float32).to(values[0].device)
    weights = [w[:, None] for w in table.unbind(1)]
    total = torch.zeros_like(values[0])
    vote = rules[0].vote
    if vote is None:
        for x, w in zip(values, weights, strict=True):
            total = total + x * w
        return total
    positive, negative = torch.zeros_like(total), torch.zeros_like(total)
    positives, negatives = torch.zeros_like(total), torch.zeros_like(total)
    for i, (x, w) in enumerate(zip(values, weights, strict=True)):
        y = x * w
        z = y if vote.weighted else x
        c = torch.ones_like(w) if given is None else given[:, i : i + 1]
        if given is not None:
            y = y * c
        total = total + (z.sign() if vote.frequency else z)
        positive = torch.where(z > 0, positive + y, positive)
        negative = torch.where(z < 0, negative + y, negative)
        positives = torch.where(z > 0, positives + c, positives)
        negatives = torch.where(z < 0, negatives + c, negatives)
    agreeing = torch.where(total >= 0, positive, negative)
    count = torch.where(total >= 0, positives, negatives)
    return agreeing / torch.where(count > 0, count, 1.0)


def draws(keys: Sequence[int], begin: int, count: int, device: torch.device) -> torch.Tensor:
    """16-bit draws of the entries from ``begin`` on, int64 ``[modules, count]``: see ``reference.philox``."""
    table = torch.tensor([[key & HALF, key >> 32] for key in keys]).to(device)
    k0, k1 = table[:, :1], table[:, 1:]
    c0 = torch.arange(begin // 8, (begin + count + 7) // 8, device=device)[None, :] & HALF
    c1 = c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & HALF, (k1 + 0xBB67AE85) & HALF
    words = torch.stack([c.expand_as(c0) for c in (c0, c1, c2, c3)], dim=2)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=3)
    return halves.reshape(len(keys), -1)[:, :count]


def _product(factor: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper and lower 32 bits of the product of 32-bit numbers, held in int64."""
    # In halves, as int64 has no room for the sign bit of a 64-bit product.
    low = factor * (x & 0xFFFF)
    middle = factor * (x >> 16) + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF
