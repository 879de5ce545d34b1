"""One rank for all modules of an adapter, by rows and columns of zeros, and back. Knows nothing of files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from torch.nn.functional import pad

from merged_lora.errors import AdapterError
from merged_lora.factors import Factors


def padded(modules: Mapping[str, Factors]) -> dict[str, Factors]:
    """The same deltas with the largest rank in every module: zero rows in A and zero columns in B are added.

    modules: factors by module name.
    """
    rank = max(f.rank for f in modules.values())
    return {name: _padded(f, rank) for name, f in modules.items()}


def _padded(f: Factors, rank: int) -> Factors:
    more = rank - f.rank
    return replace(f, a=pad(f.a, (0, 0, 0, more)), b=pad(f.b, (0, more))) if more else f


def ranks_before(modules: Mapping[str, Factors]) -> str:
    """JSON of the rank of each module that :func:`padded` changes; :func:`unpadded` reads it."""
    rank = max(f.rank for f in modules.values())
    return json.dumps({name: f.rank for name, f in modules.items() if f.rank < rank}, separators=(",", ":"))


def unpadded(modules: Mapping[str, Factors], ranks: str) -> dict[str, Factors]:
    """The modules without the zeros that :func:`padded` added.

    modules: factors by module name.
    ranks:   what :func:`ranks_before` wrote. Entries beyond a rank that are not all zero stay.

    Raises AdapterError if ``ranks`` is not an object of whole numbers.
    """
    try:
        found = json.loads(ranks)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(type(rank) is int and rank > 0 for rank in found.values()):
        raise AdapterError("the ranks before padding are not an object of positive whole numbers")
    return {name: _unpadded(f, found.get(name, f.rank)) for name, f in modules.items()}


def _unpadded(f: Factors, rank: int) -> Factors:
    if rank >= f.rank or f.a[rank:].any() or f.b[:, rank:].any():
        return f
    return replace(f, a=f.a[:rank], b=f.b[:, :rank].contiguous())
