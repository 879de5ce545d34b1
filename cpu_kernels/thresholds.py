"""Exact thresholds over float32 scores that are visited part by part.

Two visits of all parts. If entries of equal magnitude straddle a count, a third of all parts and a fourth of
the parts in which the last kept ones lie.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from . import kernels


class Threshold(NamedTuple):
    """Keeps the magnitudes above ``value``, and of those equal to it the entries before index ``cut``.

    value: bits of a float32 magnitude.
    cut:   flat index, counted from a source's first entry.
    """

    value: int
    cut: int


KEEP_EVERYTHING = Threshold(0, 1 << 62)
KEEP_NOTHING = Threshold(kernels.INFINITY, 0)

Query = tuple[int, int]
"""Index of a source, and how many of its largest scores to keep."""
Visit = Callable[[int, int, int, int, int], None]
"""Called with the number of a thread, the index of a source, and address, size and flat index of a part."""
Scan = Callable[[Visit, Collection[int] | None], None]
"""Calls a visit for the parts that begin at these flat indices, or for all, of all sources."""


class _Ties(NamedTuple):
    """Entries of one magnitude, of which only the first few are kept."""

    value: int
    wanted: int


class _Part(NamedTuple):
    """The part in which the last tie that is kept lies, and how many ties of that part are kept."""

    begin: int
    wanted: int


def find_thresholds(
    scan: Scan, threads: int, queries: Sequence[Query], sizes: Sequence[int]
) -> list[Threshold]:
    """The threshold that keeps exactly as many entries as each query asks for.

    scan:    goes through the scores.
    threads: number of threads that ``scan`` calls visits in.
    sizes:   number of scores of each source.
    """
    found: dict[int, Threshold] = {}
    for at, (source, count) in enumerate(queries):
        if count > sizes[source]:
            found[at] = KEEP_EVERYTHING
        elif count == 0:
            found[at] = KEEP_NOTHING
    searched = [at for at in range(len(queries)) if at not in found]
    if not searched:
        return [found[at] for at in range(len(queries))]

    upper = np.zeros((threads, len(sizes), 4, kernels.BINS), np.int64)

    def count_upper(thread: int, source: int, address: int, size: int, _: int) -> None:
        kernels.count_upper(address, size, upper[thread, source])

    scan(count_upper, None)
    totals = upper.sum((0, 2))
    bins = {at: kernels.find_bin(totals[queries[at][0]], queries[at][1]) for at in searched}

    lower = np.zeros((threads, len(queries), 2 * kernels.BINS), np.int64)

    def count_lower(thread: int, source: int, address: int, size: int, _: int) -> None:
        for at in searched:
            if queries[at][0] == source:
                kernels.count_lower(address, size, bins[at][0], lower[thread, at])

    scan(count_lower, None)
    ties: dict[int, _Ties] = {}
    for at in searched:
        counts = lower[:, at].sum(0)
        low, wanted = kernels.find_bin(counts, bins[at][1])
        value = bins[at][0] << 16 | low
        if wanted == counts[low]:
            found[at] = Threshold(value, KEEP_EVERYTHING.cut)
        else:
            ties[at] = _Ties(value, wanted)
    if ties:
        found |= _cut_ties(scan, queries, ties)
    return [found[at] for at in range(len(queries))]


def _cut_ties(scan: Scan, queries: Sequence[Query], ties: Mapping[int, _Ties]) -> dict[int, Threshold]:
    """Thresholds cut after the last tie that is kept: ties are counted in every part, then located in one."""
    counted: dict[int, dict[int, int]] = {at: {} for at in ties}

    def count(_: int, source: int, address: int, size: int, begin: int) -> None:
        for at, tie in ties.items():
            if queries[at][0] == source:
                counted[at][begin] = kernels.find_tie(address, size, tie.value, size + 1)[1]

    scan(count, None)
    parts: dict[int, _Part] = {}
    for at, tie in ties.items():
        left = tie.wanted
        for begin in sorted(counted[at]):
            if counted[at][begin] >= left:
                parts[at] = _Part(begin, left)
                break
            left -= counted[at][begin]
    found: dict[int, Threshold] = {}

    def locate(_: int, source: int, address: int, size: int, begin: int) -> None:
        for at, tie in ties.items():
            if queries[at][0] == source and parts[at].begin == begin:
                last, _met = kernels.find_tie(address, size, tie.value, parts[at].wanted)
                found[at] = Threshold(tie.value, begin + last)

    scan(locate, {part.begin for part in parts.values()})
    return found
