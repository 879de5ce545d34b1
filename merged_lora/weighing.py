"""Weights found from the sources alone: what ``weights="auto"`` means.

Adapters differ in strength, and one that is twice as strong drowns the others; a sum of strong ones
overshoots. So, module by module, weaker deltas are raised and stronger ones lowered, and a sum is brought
to about the size of one of its sources.  docs/quality.md tells what else was tried, and how each did.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch

from .adapters import Adapter
from .factors import Factors
from .lowrank import inner_products

BALANCE_SUMMED, BALANCE_AVERAGED = 0.75, 1.0
"""0 leaves every delta its length, 1 gives all the same."""
SHRINK = 0.2
"""A sum of N deltas has the mean of their lengths, over ``N ** SHRINK``."""
KEPT = 64  # merges whose weights are remembered


def auto_weights(sources: Sequence[Adapter], summed: bool) -> Mapping[str, tuple[float, ...]]:
    """The weights of each module, one per source that has it.

    With lengths ``n_i`` of the deltas and their mean ``n``, ``w_i = (n / n_i) ** balance``.  summed: the rule
    adds deltas up instead of averaging them: then all are multiplied so that the sum has the length
    ``n / N ** SHRINK``; deltas that cancel are not blown up, they count as if at right angles.
    """
    return _remembered(_Sources(sources), summed)


class _Sources:
    """Adapters that count as the same where their contents are."""

    def __init__(self, sources: Sequence[Adapter]) -> None:
        self.adapters = sources
        self._digests = tuple(adapter.digest for adapter in sources)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Sources) and self._digests == other._digests

    def __hash__(self) -> int:
        return hash(self._digests)


@functools.lru_cache(KEPT)
def _remembered(sources: _Sources, summed: bool) -> Mapping[str, tuple[float, ...]]:
    names = sorted({name for adapter in sources.adapters for name in adapter.modules})
    return {
        name: _weights([a.modules[name] for a in sources.adapters if name in a.modules], summed)
        for name in names
    }


def _weights(factors: Sequence[Factors], summed: bool) -> tuple[float, ...]:
    a = torch.cat([f.a.double() for f in factors], dim=0)
    b = torch.cat([f.b.double() for f in factors], dim=1)
    scalings = torch.tensor([[f.scaling for f in factors]], dtype=torch.float64)
    gram = inner_products((a @ a.T)[None], (b.T @ b)[None], [f.rank for f in factors], scalings)[0]
    lengths = gram.diagonal().clamp(min=0.0).sqrt()
    present = lengths > 0
    count = int(present.sum())
    if not count:
        return (1.0,) * len(factors)
    mean = float(lengths[present].mean())
    balance = BALANCE_SUMMED if summed else BALANCE_AVERAGED
    weights = torch.where(present, (mean / torch.where(present, lengths, 1.0)) ** balance, 1.0)
    if summed:
        size = max(float(weights @ gram @ weights), float((weights * lengths).square().sum()))
        weights = weights * (mean / count**SHRINK / math.sqrt(size))
    return tuple(weights.tolist())
