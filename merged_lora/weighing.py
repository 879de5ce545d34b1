"""Weights found from the sources alone: what ``weights="auto"`` means.

Adapters differ in strength, and one that is twice as strong drowns the others; a sum of strong ones
overshoots. So, module by module, weaker deltas are raised and stronger ones lowered, and a sum is brought
to about the size of one of its sources.  docs/quality.md tells what else was tried, and how each did.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch

from .adapters import Adapter
from .factors import Factors
from .lowrank import gram_of

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
    key = (tuple(adapter.digest for adapter in sources), summed)
    with _LOCK:
        if key in _KNOWN:
            _KNOWN.move_to_end(key)
            return _KNOWN[key]
    names = sorted({name for adapter in sources for name in adapter.modules})
    weights = {
        name: _weights([a.modules[name] for a in sources if name in a.modules], summed) for name in names
    }
    with _LOCK:
        _KNOWN[key] = weights
        while len(_KNOWN) > KEPT:
            _KNOWN.popitem(last=False)
    return weights


_KNOWN: OrderedDict[tuple[tuple[str, ...], bool], Mapping[str, tuple[float, ...]]] = OrderedDict()
"""By digests and kind of rule: weights alone, so that no adapter is kept alive for them."""
_LOCK = threading.Lock()


def _weights(factors: Sequence[Factors], summed: bool) -> tuple[float, ...]:
    gram = gram_of(factors, [f.scaling for f in factors])[0]
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
