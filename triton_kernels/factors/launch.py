"""From a layout and addresses to launches: one for each combination of dtypes, in practice one in all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from merged_lora.triton_kernels.kernels.combine import (
    BLOCK,
    KEEP_LARGEST,
    KEEP_RANDOM,
    Tables,
    Variant,
    combine,
)
from merged_lora.triton_kernels.kernels.trim import find_thresholds
from merged_lora.triton_kernels.kernels.words import INFINITY, MAGNITUDE, MIXED
from merged_lora.triton_kernels.packed import Resident
from merged_lora.triton_kernels.tables import Integers, Take, aligned, block_items, upload

from .layout import Layout

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
    layout: Layout, residents: Sequence[Resident], device: torch.device
) -> list[torch.Tensor | None]:
    """Of every source the pairs ``(thr, cut)`` of its tensors, int32 ``[n, 2]``; None where none is needed.

    Finds what is not known yet, in one launch for all sources, and keeps it with the source.
    """
    if layout.keep != KEEP_LARGEST.value:
        return [None for _ in residents]
    found: list[torch.Tensor | None] = []
    tasks, kinds = [], []
    for i, (place, resident) in enumerate(zip(layout.places, residents, strict=True)):
        pairs = resident.thresholds.get(place.key)
        if pairs is None:
            pairs = torch.empty(place.tensors.size, 2, dtype=torch.int32, device=device)
            targets = np.arange(place.counts.size) * 8 + pairs.data_ptr()
            addresses = resident.addresses[place.rows, place.sides]
            rows = np.stack([addresses, place.sizes, place.counts, targets], axis=1)
            tasks.append(rows[place.searched])
            kinds.append(layout.kinds[place.tensors, i][place.searched])
        found.append(pairs)
    if tasks:
        find_thresholds(np.concatenate(tasks), np.concatenate(kinds), device)
    # Only now: a search that fails must leave nothing to be believed.
    for place, resident, pairs in zip(layout.places, residents, found, strict=True):
        assert pairs is not None
        thresholds = resident.thresholds
        thresholds[place.key] = pairs
        thresholds.move_to_end(place.key)
        while len(thresholds) > max(KEPT_THRESHOLDS, len(residents)):
            thresholds.popitem(last=False)
    return found


def pair_addresses(layout: Layout, pairs: Sequence[torch.Tensor | None], constants: torch.Tensor) -> Integers:
    """Address of the pair ``(thr, cut)`` of every tensor in every source, ``[T, N]``.

    pairs: of :func:`find_pairs`.  constants: int32 ``[2, 2]`` on the device, EVERYTHING and NOTHING.
    """
    everything, nothing = constants.data_ptr(), constants.data_ptr() + 8
    table = np.full(layout.weights.shape, everything, np.int64)
    for i, (place, found) in enumerate(zip(layout.places, pairs, strict=True)):
        if found is not None:
            searched = np.arange(place.counts.size) * 8 + found.data_ptr()
            unsearched = np.where(place.counts == 0, nothing, everything)
            table[place.tensors, i] = np.where(place.searched, searched, unsearched)
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


@dataclass(frozen=True, eq=False)
class Draft:
    """A launch whose tables are still in host memory, in the order of ``combine.Tables``."""

    where: Integers
    arrays: tuple[NDArray[Any], ...]
    variant: Variant


def draft_launches(
    layout: Layout,
    chosen: Integers,
    addresses: Integers,
    pairs: Integers,
    targets: Integers,
    kinds: Integers,
    check: bool = False,
) -> list[Draft]:
    """What merges tensors of a layout into targets.

    chosen: which tensors ``[n]``.  addresses, pairs: of the whole layout ``[T, N]``.  targets: ``[n, 9]``,
    see ``tables.target_rows``, and their kinds ``[n]``.  check: store nothing, raise flags instead.
    """
    same = (layout.kinds == layout.kinds[:, :1]).all(1)
    source = np.where(same, layout.kinds[:, 0], MIXED.value)[chosen]
    keeps = layout.keys if layout.keep == KEEP_RANDOM.value else pairs
    columns = source, layout.rounds[chosen], kinds, aligned(targets).astype(np.int64)
    code = np.ravel_multi_index(columns, (4, 4, 4, 2))
    drafts = []
    for one in np.unique(code):
        where = np.flatnonzero(code == one)
        at = chosen[where]
        arrays = (
            block_items(targets[where, 3] * targets[where, 4], BLOCK),
            targets[where],
            addresses[at],
            keeps[at],
            layout.weights[at],
            layout.shares[at].astype(np.int32),
            layout.rescales[at],
            layout.kinds[at].astype(np.int32),
            np.zeros(where.size, np.int32),
        )
        kind, rounds, target, whole = (int(column[where[0]]) for column in columns)
        compiled = Variant(
            kind=kind,
            round=rounds,
            target=target,
            keep=layout.keep,
            rule=layout.rule,
            weighted=layout.weighted,
            aligned=bool(whole),
            check=check,
        )
        drafts.append(Draft(where, arrays, compiled))
    return drafts


def upload_launches(drafts: Sequence[Draft], device: torch.device, take: Take | None = None) -> list[Launch]:
    """The launches, their tables on the device by one copy.  take: gives the memory there."""
    if not drafts:
        return []
    on_device = iter(upload([array for draft in drafts for array in draft.arrays], device, take))
    return [
        Launch(draft.where, Tables(*(next(on_device) for _ in draft.arrays)), draft.variant)
        for draft in drafts
    ]


def raised_flags(launches: Sequence[Launch]) -> torch.Tensor:
    """1 for each target whose result is not finite, by checking launches: int32 ``[n]``, on the device."""
    back = torch.from_numpy(np.argsort(np.concatenate([one.where for one in launches])))
    flags = torch.cat([one.tables.flags for one in launches])
    return flags[back.to(flags.device)]
