"""Weights found from the sources alone: what ``weights="auto"`` means.

Adapters differ in strength, and one that is twice as strong drowns the others; a sum of strong ones
overshoots. So, module by module, weaker deltas are scaled up and stronger ones down, and a sum is brought
to about the size of one of its sources.  docs/quality.md lists what else was tried, with results.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence

import torch

from .adapters import Adapter
from .factors import Factors
from .lowrank import gram_of
from .lru import Lru

BALANCE_SUMMED, BALANCE_AVERAGED = 0.75, 1.0
"""0 leaves the lengths of the deltas as they are, 1 makes them equal."""
SHRINK = 0.2
"""A sum of N deltas gets the mean of their lengths, divided by ``N ** SHRINK``."""
MAX_CACHED = 64
"""Number of merges whose weights are cached."""


def auto_weights(
    sources: Sequence[Adapter],
    names: Sequence[str],
    summed: bool,
    progress: Callable[[int], None] = lambda _: None,
) -> Mapping[str, tuple[float, ...]]:
    """The weights of each module, one per source that has it.

    With lengths ``n_i`` of the deltas and their mean ``n``, ``w_i = (n / n_i) ** balance``.

    sources:  the adapters.
    names:    of the modules.
    summed:   the rule adds deltas up instead of averaging them.  Then all weights are multiplied by one
              factor, so that the sum has the length ``n / N ** SHRINK``; deltas that cancel are not blown up,
              but count as if they were at right angles.
    progress: called with 0 after each module, of which none is merged yet; it may raise to stop this.
    """
    key = (tuple(adapter.key for adapter in sources), tuple(names), summed)
    with _LOCK:
        found = _CACHE.use(key)
    if found is not None:
        return found
    weights = {}
    for name in names:
        weights[name] = _weights([a.modules[name] for a in sources if name in a.modules], summed)
        progress(0)
    with _LOCK:
        _CACHE.add(key, weights, MAX_CACHED)
    return weights


_CACHE: Lru[tuple[tuple[str, ...], tuple[str, ...], bool], Mapping[str, tuple[float, ...]]] = Lru()
"""Weights by digests, modules and kind of rule; no adapter is kept alive for them."""
_LOCK = threading.Lock()


def _weights(factors: Sequence[Factors], summed: bool) -> tuple[float, ...]:
    gram = gram_of(factors, [f.scaling for f in factors])[0]  # [n, n]
    lengths = gram.diagonal().clamp(min=0.0).sqrt()
    present = lengths > 0
    count = int(present.sum())
    if not count:
        return (1.0,) * len(factors)
    mean = float(lengths[present].mean())
    balance = BALANCE_SUMMED if summed else BALANCE_AVERAGED
    weights = torch.where(present, (mean / torch.where(present, lengths, 1.0)) ** balance, 1.0)
    if summed:
        # The length of the sum, but no less than if the deltas were orthogonal.
        size = max(float(weights @ gram @ weights), float((weights * lengths).square().sum()))
        weights = weights * (mean / count**SHRINK / math.sqrt(size))
    return tuple(weights.tolist())
