"""From a layout and addresses to launches: one for each combination of dtypes, in practice one in all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .combine import BLOCK, KEEP_LARGEST, KEEP_RANDOM, Tables, Variant, combine
from .layout import Layout
from .packed import Resident
from .tables import Integers, aligned, block_items, upload
from .trim import find_thresholds
from .words import INFINITY, MAGNITUDE, MIXED

KEPT_THRESHOLDS = 8  # per adapter, one for each density it was last merged with
EVERYTHING, NOTHING = (0, MAGNITUDE.value), (INFINITY.value, 0)
"""Pairs ``(thr, cut)`` that need no search; nothing finite lies above infinity."""


def source_addresses(layout: Layout, residents: Sequence[Resident]) -> Integers:
    """Address of every tensor in every source, ``[T, N]``; 0 where a source lacks it."""
    table = np.zeros(layout.weights.shape, np.int64)
    for i, (place, resident) in enumerate(zip(layout.places, residents, strict=True)):
        table[place.tensors, i] = resident.addresses[place.rows, place.sides]
    return table


def find_pairs(
    layout: Layout, residents: Sequence[Resident], addresses: Integers, constants: torch.Tensor
) -> Integers:
    """Address of the pair ``(thr, cut)`` of every tensor in every source, ``[T, N]``.

    Finds what is not known yet, in one launch for all sources, and keeps it with the source.
    addresses: of the tensors, ``[T, N]``.  constants: int32 ``[2, 2]`` on the device, EVERYTHING and NOTHING.
    """
    everything, nothing = constants.data_ptr(), constants.data_ptr() + 8
    table = np.full(layout.weights.shape, everything, np.int64)
    if layout.keep != KEEP_LARGEST.value:
        return table
    tasks, kinds, found = [], [], []
    for i, (place, resident) in enumerate(zip(layout.places, residents, strict=True)):
        counts = layout.counts[place.tensors, i]
        sizes = layout.shapes[place.tensors].prod(1)
        key = place.rows.tobytes() + counts.tobytes()
        pairs = resident.thresholds.get(key)
        target = np.arange(counts.size) * 8
        wanted = (counts > 0) & (counts < sizes)
        if pairs is None:
            pairs = torch.empty(counts.size, 2, dtype=torch.int32, device=constants.device)
            address = addresses[place.tensors, i]
            tasks.append(np.stack([address, sizes, counts, target + pairs.data_ptr()], axis=1)[wanted])
            kinds.append(layout.kinds[place.tensors, i][wanted])
        found.append((resident.thresholds, key, pairs))
        unsearched = np.where(counts == 0, nothing, everything)
        table[place.tensors, i] = np.where(wanted, target + pairs.data_ptr(), unsearched)
    if tasks:
        find_thresholds(np.concatenate(tasks), np.concatenate(kinds), constants.device)
    for thresholds, key, pairs in found:  # only now: a search that fails must leave nothing to be believed
        thresholds[key] = pairs
        thresholds.move_to_end(key)
        while len(thresholds) > max(KEPT_THRESHOLDS, len(residents)):
            thresholds.popitem(last=False)
    return table


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of the merge.  where: which of the targets it makes, ``[m]``."""

    where: Integers
    tables: Tables
    variant: Variant

    def run(self) -> None:
        """Launch it on the current stream."""
        combine(self.tables, self.variant, self.tables.items.shape[0])

    def compile(self) -> None:
        """Compile what :meth:`run` would launch, where it is not yet."""
        combine(self.tables, self.variant, 0)


def prepare_launches(
    layout: Layout,
    chosen: Integers,
    addresses: Integers,
    pairs: Integers,
    targets: Integers,
    kinds: Integers,
    device: torch.device,
    check: bool = False,
) -> list[Launch]:
    """What merges tensors of a layout into targets; the tables are uploaded here.

    chosen: which tensors ``[n]``.  addresses, pairs: of the whole layout ``[T, N]``.  targets: ``[n, 8]``,
    see ``tables.target_rows``, and their kinds ``[n]``.  check: store nothing, raise flags instead.
    """
    same = (layout.kinds == layout.kinds[:, :1]).all(1)
    source = np.where(same, layout.kinds[:, 0], MIXED.value)[chosen]
    keeps = layout.keys if layout.keep == KEEP_RANDOM.value else pairs
    variants = np.stack([source, layout.rounds[chosen], kinds, aligned(targets)], axis=1)
    launches = []
    for variant in np.unique(variants, axis=0):
        where = np.flatnonzero((variants == variant).all(1))
        at = chosen[where]
        arrays: list[NDArray[Any]] = [
            block_items(targets[where, 3] * targets[where, 4], BLOCK),
            targets[where],
            addresses[at],
            keeps[at],
            layout.weights[at],
            layout.shares[at].astype(np.int32),
            layout.rescales[at],
            layout.kinds[at].astype(np.int32),
            np.zeros(where.size, np.int32),
        ]
        compiled = Variant(
            kind=int(variant[0]),
            round=int(variant[1]),
            target=int(variant[2]),
            keep=layout.keep,
            rule=layout.rule,
            weighted=layout.weighted,
            aligned=bool(variant[3]),
            check=check,
        )
        launches.append(Launch(where, Tables(*upload(arrays, device)), compiled))
    return launches


def raised_flags(launches: Sequence[Launch]) -> torch.Tensor:
    """1 for each target whose result is not finite, by checking launches: int32 ``[n]``, on the device."""
    back = torch.from_numpy(np.argsort(np.concatenate([one.where for one in launches])))
    flags = torch.cat([one.tables.flags for one in launches])
    return flags[back.to(flags.device)]
