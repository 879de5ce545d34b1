"""From a layout and addresses to launches: one per combination of dtypes, in practice one in all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from merged_lora.triton_kernels.kernels.blocks import block_items
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
from merged_lora.triton_kernels.transfer import Integers, Take, upload

from .layout import Layout
from .tables import aligned

KEPT_THRESHOLDS = 8  # per adapter, one for each density that it was last merged with
KEEP_EVERYTHING, KEEP_NONE = (0, MAGNITUDE.value), (INFINITY.value, 0)
"""Thresholds ``(thr, cut)`` that need no search; no finite magnitude exceeds infinity."""
THRESHOLD_BYTES = 8  # two int32


def source_addresses(layout: Layout, residents: Sequence[Resident]) -> Integers:
    """The address of every tensor in every source, ``[T, N]``; 0 if a source lacks it."""
    table = np.zeros(layout.weights.shape, np.int64)
    for i, (tensors, resident) in enumerate(zip(layout.sources, residents, strict=True)):
        table[tensors.indices, i] = resident.addresses[tensors.rows, tensors.sides]
    return table


def source_thresholds(
    layout: Layout, residents: Sequence[Resident], device: torch.device
) -> list[torch.Tensor | None]:
    """For each source the thresholds ``(thr, cut)`` of its tensors, int32 ``[n, 2]``; None if none is needed.

    Those that the source does not hold yet are found for all sources in one launch, and stored with them.
    """
    if layout.keep != KEEP_LARGEST.value:
        return [None for _ in residents]
    tables: list[torch.Tensor | None] = []
    tasks, kinds = [], []
    # Sources of equal content are one resident.  A second table in place of the first would free it, while
    # its address is in the tables of the launch.
    found: dict[tuple[Resident, bytes], torch.Tensor] = {}
    for i, (tensors, resident) in enumerate(zip(layout.sources, residents, strict=True)):
        table = resident.thresholds.get(tensors.key, found.get((resident, tensors.key)))
        if table is None:
            table = torch.empty(tensors.indices.size, 2, dtype=torch.int32, device=device)
            found[resident, tensors.key] = table
            targets = np.arange(tensors.counts.size) * THRESHOLD_BYTES + table.data_ptr()
            addresses = resident.addresses[tensors.rows, tensors.sides]
            rows = np.stack([addresses, tensors.sizes, tensors.counts, targets], axis=1)
            tasks.append(rows[tensors.searched])
            kinds.append(layout.kinds[tensors.indices, i][tensors.searched])
        tables.append(table)
    if tasks:
        find_thresholds(np.concatenate(tasks), np.concatenate(kinds), device)
    # Stored only after the search has been launched, so that a failed one leaves no table of garbage behind.
    for tensors, resident, table in zip(layout.sources, residents, tables, strict=True):
        assert table is not None
        resident.thresholds.add(tensors.key, table, max(KEPT_THRESHOLDS, len(residents)))
    return tables


def threshold_addresses(
    layout: Layout, thresholds: Sequence[torch.Tensor | None], constants: torch.Tensor
) -> Integers:
    """The address of the threshold of every tensor in every source, ``[T, N]``.

    thresholds: of :func:`source_thresholds`.
    constants: KEEP_EVERYTHING and KEEP_NONE, int32 ``[2, 2]`` on the device.
    """
    keep_every, keep_none = constants.data_ptr(), constants.data_ptr() + THRESHOLD_BYTES
    addresses = np.full(layout.weights.shape, keep_every, np.int64)
    for i, (tensors, table) in enumerate(zip(layout.sources, thresholds, strict=True)):
        if table is not None:
            searched = np.arange(tensors.counts.size) * THRESHOLD_BYTES + table.data_ptr()
            unsearched = np.where(tensors.counts == 0, keep_none, keep_every)
            addresses[tensors.indices, i] = np.where(tensors.searched, searched, unsearched)
    return addresses


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of the merge.

    where: indices of the targets that it computes, ``[m]``.
    tables: its arguments, on the device.
    variant: its compile-time constants.
    """

    where: Integers
    tables: Tables
    variant: Variant

    def run(self) -> None:
        """Launch it on the current stream."""
        combine(self.tables, self.variant, self.tables.items.shape[0])

    def compile(self) -> None:
        """Compile the kernel that :meth:`run` would launch, if it is not compiled yet."""
        combine(self.tables, self.variant, 0)


@dataclass(frozen=True, eq=False)
class Draft:
    """A :class:`Launch` whose tables are still in host memory, in the order of ``combine.Tables``."""

    where: Integers
    arrays: tuple[NDArray[Any], ...]
    variant: Variant


def draft_launches(
    layout: Layout,
    chosen: Integers,
    addresses: Integers,
    thresholds: Integers,
    targets: Integers,
    kinds: Integers,
    check: bool = False,
) -> list[Draft]:
    """The launches that merge tensors of a layout into targets.

    chosen: indices of the tensors in the layout ``[n]``.
    addresses: of the sources' tensors, for the whole layout ``[T, N]``.
    thresholds: addresses of thresholds, for the whole layout ``[T, N]``; not read if entries are kept at
        random.
    targets: ``[n, TABLE_COLUMNS]``, of ``tables.target_rows``.
    kinds: dtypes of the targets ``[n]``, as in ``words.KINDS``.
    check: whether to store no result and set flags instead.
    """
    # Targets are grouped by the compile-time constants in which they differ: dtypes and alignment.
    uniform = (layout.kinds == layout.kinds[:, :1]).all(1)
    source = np.where(uniform, layout.kinds[:, 0], MIXED.value)[chosen]
    keeps = layout.keys if layout.keep == KEEP_RANDOM.value else thresholds
    columns = source, layout.rounds[chosen], kinds, aligned(targets).astype(np.int64)
    code = np.ravel_multi_index(columns, (4, 4, 4, 2))  # four kinds, MIXED included
    drafts = []
    for variant_code in np.unique(code):
        where = np.flatnonzero(code == variant_code)
        rows = chosen[where]
        arrays = (
            block_items(targets[where, 3] * targets[where, 4], BLOCK),
            targets[where],
            addresses[rows],
            keeps[rows],
            layout.weights[rows],
            layout.shares[rows].astype(np.int32),
            layout.rescales[rows],
            layout.kinds[rows].astype(np.int32),
            np.zeros(where.size, np.int32),
        )
        kind, rounds, target, is_aligned = (int(column[where[0]]) for column in columns)
        variant = Variant(
            kind=kind,
            round=rounds,
            target=target,
            keep=layout.keep,
            blend=layout.blend,
            weighted=layout.weighted,
            aligned=bool(is_aligned),
            check=check,
        )
        drafts.append(Draft(where, arrays, variant))
    return drafts


def upload_launches(drafts: Sequence[Draft], device: torch.device, take: Take | None = None) -> list[Launch]:
    """The launches, with their tables on the device by one copy.

    take: provides the device memory; it is allocated if None.
    """
    if not drafts:
        return []
    on_device = iter(upload([array for draft in drafts for array in draft.arrays], device, take))
    return [
        Launch(draft.where, Tables(*(next(on_device) for _ in draft.arrays)), draft.variant)
        for draft in drafts
    ]


def raised_flags(launches: Sequence[Launch]) -> torch.Tensor:
    """The flags of checking launches, int32 ``[n]`` on the device: 1 for each target that is not finite."""
    # Launches group the targets by dtype; this restores the targets' own order.
    order = torch.from_numpy(np.argsort(np.concatenate([launch.where for launch in launches])))
    flags = torch.cat([launch.tables.flags for launch in launches])
    return flags[order.to(flags.device)]
