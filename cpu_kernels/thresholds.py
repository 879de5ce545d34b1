"""Exact thresholds over float32 entries that are visited part by part.

Two visits, and where entries of equal magnitude straddle a count a third, and one of a single part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from . import kernels
from .combine import EVERYTHING

Pair = tuple[int, int]
"""``(thr, cut)``, see ``kernels``; the cut counts from a source's first entry."""
Query = tuple[int, int]
"""A source, and how many of its largest entries are to be kept."""
Visit = Callable[[int, int, int, int, int], None]
"""Called with the number of a thread, that of a source, and address, size and flat index of a part of it."""
Scan = Callable[[Visit, Collection[int] | None], None]
"""Calls it for the parts that begin at these flat indices, or for all, of all sources."""


def find_pairs(scan: Scan, threads: int, queries: Sequence[Query], sizes: Sequence[int]) -> list[Pair]:
    """What keeps exactly as many entries as each query asks for.  sizes: of the sources."""
    found: dict[int, Pair] = {}
    for at, (source, count) in enumerate(queries):
        if count >= sizes[source]:
            found[at] = EVERYTHING
        elif count == 0:
            found[at] = (kernels.INFINITY, 0)
    left = [at for at in range(len(queries)) if at not in found]
    if not left:
        return [found[at] for at in range(len(queries))]

    upper = np.zeros((threads, len(sizes), 4, kernels.BINS), np.int64)

    def count_upper(thread: int, source: int, address: int, size: int, _: int) -> None:
        kernels.count_upper(address, size, upper[thread, source])

    scan(count_upper, None)
    totals = upper.sum((0, 2))
    bins = {at: kernels.find_bin(totals[queries[at][0]], queries[at][1]) for at in left}

    lower = np.zeros((threads, len(queries), 2 * kernels.BINS), np.int64)

    def count_lower(thread: int, source: int, address: int, size: int, _: int) -> None:
        for at in left:
            if queries[at][0] == source:
                kernels.count_lower(address, size, bins[at][0], lower[thread, at])

    scan(count_lower, None)
    ties: dict[int, Query] = {}
    for at in left:
        counts = lower[:, at].sum(0)
        low, wanted = kernels.find_bin(counts, bins[at][1])
        thr = bins[at][0] << 16 | low
        if wanted == counts[low]:
            found[at] = (thr, EVERYTHING[1])
        else:
            ties[at] = (thr, wanted)
    if ties:
        found |= _cut_ties(scan, queries, ties)
    return [found[at] for at in range(len(queries))]


def _cut_ties(scan: Scan, queries: Sequence[Query], ties: Mapping[int, Query]) -> dict[int, Pair]:
    """Where the last of the ties that are kept lies: parts are counted, then the right one looked into."""
    met: dict[int, dict[int, int]] = {at: {} for at in ties}

    def count(_: int, source: int, address: int, size: int, begin: int) -> None:
        for at, (thr, _wanted) in ties.items():
            if queries[at][0] == source:
                met[at][begin] = kernels.find_tie(address, size, thr, size + 1)[1]

    scan(count, None)
    where: dict[int, Query] = {}
    for at, (_thr, wanted) in ties.items():
        left = wanted
        for begin in sorted(met[at]):
            if met[at][begin] >= left:
                where[at] = (begin, left)
                break
            left -= met[at][begin]
    found: dict[int, Pair] = {}

    def locate(_: int, source: int, address: int, size: int, begin: int) -> None:
        for at, (thr, _wanted) in ties.items():
            if queries[at][0] == source and where[at][0] == begin:
                found[at] = (thr, begin + kernels.find_tie(address, size, thr, where[at][1])[0])

    scan(locate, {begin for begin, _ in where.values()})
    return found
