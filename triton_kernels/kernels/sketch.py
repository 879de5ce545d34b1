"""Deltas merged entry by entry, none of it held in memory: tiles of products, fused with what uses them.

Per entry, over the sources ``i`` in their order (TIES, arXiv 2306.01708; DARE, arXiv 2311.03099):

    x_i = s_i (B_i A_i)        low:    mag >= low_i,  and mag < high_i where outliers are skipped, else 0
                               random: draw(index) < share_i, and x_i = rescale_i x_i, else 0
    T   = sum of w_i x_i, or the mean of the w_i x_i whose sign is elected

and of T only ``T V``, ``T^T Q`` and its squared norm leave the kernel (Halko, Martinsson and Tropp 2011).
Every pass forms a tile by the same product of the same shape, so its entries have the same bits in all of
them.  Factors of 16 bits are exact in tf32, so that their products are those of float32; others take three
tf32 products each.  Unlike elsewhere, entries that equal a threshold are all kept: the order of the sums
inside a product belongs to the hardware, and with it which entries tie.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .combine import KEEP_LARGEST, KEEP_RANDOM, SUM, add_entries
from .philox import draws
from .words import MAGNITUDE, WARPS

KEEP_BETWEEN: tl.constexpr = tl.constexpr(4)
ROWS, COLUMNS = 32, 64  # of a tile
DEPTH = 16  # of a product at a time; ranks are filled up with zeros to a multiple
WIDEST = 128  # columns that a kernel multiplies a tile with; the sums of more would not fit into registers
BINS = 2048
VARYING = ["modules"]  # another kernel for one module than for many would be compiled within a step


@triton.jit
def _product(
    a_ptr,  # [rank, columns] of one source and module
    b_ptr,  # [rows, rank]
    row,
    column,
    rows,
    columns,
    RANK: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of ``B A``."""
    inner = tl.arange(0, DEPTH)
    acc = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    # A loop too, not unrolled: the compiler would load the factors of all steps before the first product.
    for start in range(0, RANK, DEPTH):
        k = start + inner
        b = tl.load(b_ptr + row[:, None] * RANK + k[None, :], mask=(row < rows)[:, None], other=0.0)
        a = tl.load(
            a_ptr + k[:, None] * columns + column[None, :], mask=(column < columns)[None, :], other=0.0
        )
        acc = tl.dot(b, a, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=VARYING)
def _count_kernel(
    a_ptr,  # float32 [sources, modules, rank, columns]
    b_ptr,  # float32 [sources, modules, rows, rank]
    scalings_ptr,  # float32 [modules, sources]
    base_ptr,  # int32 [modules, sources]: magnitude at which the bins begin
    shift_ptr,  # int32 [modules, sources]: a bin holds 2^shift magnitudes
    counts_ptr,  # int32 [modules, sources, BINS + 1]; the last counts what lies above all bins
    modules,
    sources,
    rows,
    columns,
    RANK: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    across = tl.cdiv(columns, COLUMNS)
    tile = tl.program_id(0)
    module = tl.program_id(1).to(tl.int64)
    source = tl.program_id(2).to(tl.int64)
    row = (tile // across) * ROWS + tl.arange(0, ROWS)
    column = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    at = source * modules + module
    a = a_ptr + at * RANK * columns
    b = b_ptr + at * rows * RANK
    x = _product(a, b, row, column, rows, columns, RANK, DEPTH, PRECISION)
    entry = module * sources + source
    x = x * tl.load(scalings_ptr + entry)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    mag = x.to(tl.int32, bitcast=True) & MAGNITUDE
    base = tl.load(base_ptr + entry)
    place = (mag - base) >> tl.load(shift_ptr + entry)
    counts = counts_ptr + entry * (BINS + 1)
    tl.atomic_add(counts + place, 1, mask=inside & (mag >= base) & (place < BINS), sem="relaxed")
    above = tl.sum(tl.where(inside & (mag >= base) & (place >= BINS), 1, 0))
    tl.atomic_add(counts + BINS, above, sem="relaxed")


@triton.jit
def _merged_tile(
    a_ptr,
    b_ptr,
    scalings_ptr,
    weights_ptr,  # float32 [modules, sources]
    low_ptr,  # float32 [modules, sources]: least magnitude kept
    high_ptr,  # float32 [modules, sources]: least magnitude of an outlier
    keys_ptr,  # int64 [modules, sources]
    shares_ptr,  # int32 [sources]
    rescales_ptr,  # float32 [sources]
    module,
    modules,
    row,
    column,
    rows,
    columns,
    SOURCES: tl.constexpr,
    RANK: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    KEEP: tl.constexpr,
    RULE: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """A tile of the merged delta, zeros outside."""
    total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    positive = total
    negative = total
    counts = tl.zeros([row.shape[0], column.shape[0]], tl.int32)
    # A loop, not unrolled: the products of several sources at a time would not fit into registers.
    for i in range(SOURCES):
        at = i * modules + module
        x = _product(
            a_ptr + at * RANK * columns, b_ptr + at * rows * RANK, row, column, rows, columns,
            RANK, DEPTH, PRECISION,
        )  # fmt: skip
        entry = module * SOURCES + i
        x = x * tl.load(scalings_ptr + entry)
        if KEEP == KEEP_LARGEST:
            x = tl.where(tl.abs(x) >= tl.load(low_ptr + entry), x, 0.0)
        elif KEEP == KEEP_BETWEEN:
            kept = (tl.abs(x) >= tl.load(low_ptr + entry)) & (tl.abs(x) < tl.load(high_ptr + entry))
            x = tl.where(kept, x, 0.0)
        elif KEEP == KEEP_RANDOM:
            index = row.to(tl.int64)[:, None] * columns + column.to(tl.int64)[None, :]
            drawn = draws(index // 8, (index % 8).to(tl.int32), tl.load(keys_ptr + entry))
            x = tl.where(drawn < tl.load(shares_ptr + i), x * tl.load(rescales_ptr + i), 0.0)
        weight = tl.load(weights_ptr + entry)
        total, positive, negative, counts = add_entries(
            x, weight, total, positive, negative, counts, RULE, WEIGHTED
        )
    if RULE != SUM:
        elected = total >= 0.0
        count = tl.where(elected, counts & 0xFFFF, counts >> 16)
        total = tl.where(elected, positive, negative) / tl.maximum(count, 1).to(tl.float32)
    return tl.where((row < rows)[:, None] & (column < columns)[None, :], total, 0.0)


@triton.jit(do_not_specialize=VARYING)
def _times_kernel(
    a_ptr, b_ptr, scalings_ptr, weights_ptr, low_ptr, high_ptr, keys_ptr, shares_ptr, rescales_ptr,
    right_ptr,  # float32 [modules, columns, WIDTH]
    product_ptr,  # float32 [modules, rows, WIDTH]
    norms_ptr,  # float32 [modules, rows]: squared norms of the rows
    modules, rows, columns,
    SOURCES: tl.constexpr, RANK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    KEEP: tl.constexpr, RULE: tl.constexpr, WEIGHTED: tl.constexpr,
    SKETCH: tl.constexpr,  # precision of the product with T
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    module = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wide = tl.arange(0, WIDTH)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    norms = tl.zeros([ROWS], tl.float32)
    start = 0
    while start < columns:
        column = start + tl.arange(0, COLUMNS)
        tile = _merged_tile(
            a_ptr,
            b_ptr,
            scalings_ptr,
            weights_ptr,
            low_ptr,
            high_ptr,
            keys_ptr,
            shares_ptr,
            rescales_ptr,
            module,
            modules,
            row,
            column,
            rows,
            columns,
            SOURCES,
            RANK,
            DEPTH,
            PRECISION,
            KEEP,
            RULE,
            WEIGHTED,
        )
        place = (module * columns + column)[:, None] * WIDTH + wide[None, :]
        right = tl.load(right_ptr + place, mask=(column < columns)[:, None], other=0.0)
        acc = tl.dot(tile, right, acc, input_precision=SKETCH)
        norms += tl.sum(tile * tile, axis=1)
        start += COLUMNS
    tl.store(
        product_ptr + (module * rows + row)[:, None] * WIDTH + wide[None, :], acc, mask=(row < rows)[:, None]
    )
    tl.store(norms_ptr + module * rows + row, norms, mask=row < rows)


@triton.jit(do_not_specialize=VARYING)
def _transposed_times_kernel(
    a_ptr, b_ptr, scalings_ptr, weights_ptr, low_ptr, high_ptr, keys_ptr, shares_ptr, rescales_ptr,
    left_ptr,  # float32 [modules, rows, WIDTH]
    product_ptr,  # float32 [modules, columns, WIDTH]
    modules, rows, columns,
    SOURCES: tl.constexpr, RANK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    KEEP: tl.constexpr, RULE: tl.constexpr, WEIGHTED: tl.constexpr,
    SKETCH: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    module = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    wide = tl.arange(0, WIDTH)
    acc = tl.zeros([COLUMNS, WIDTH], tl.float32)
    start = 0
    while start < rows:
        row = start + tl.arange(0, ROWS)
        tile = _merged_tile(
            a_ptr,
            b_ptr,
            scalings_ptr,
            weights_ptr,
            low_ptr,
            high_ptr,
            keys_ptr,
            shares_ptr,
            rescales_ptr,
            module,
            modules,
            row,
            column,
            rows,
            columns,
            SOURCES,
            RANK,
            DEPTH,
            PRECISION,
            KEEP,
            RULE,
            WEIGHTED,
        )
        place = (module * rows + row)[:, None] * WIDTH + wide[None, :]
        left = tl.load(left_ptr + place, mask=(row < rows)[:, None], other=0.0)
        acc = tl.dot(tl.trans(tile), left, acc, input_precision=SKETCH)
        start += ROWS
    place = (module * columns + column)[:, None] * WIDTH + wide[None, :]
    tl.store(product_ptr + place, acc, mask=(column < columns)[:, None])


@dataclass(frozen=True, eq=False)
class Sources:
    """What every pass reads, on the device; the shapes are told at the kernels.

    a, b: filled up to one rank.  precision: of a tile's products.
    """

    a: torch.Tensor
    b: torch.Tensor
    scalings: torch.Tensor
    weights: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    keys: torch.Tensor
    shares: torch.Tensor
    rescales: torch.Tensor
    precision: str
    keep: int
    rule: int
    weighted: bool

    @property
    def extent(self) -> tuple[int, int, int, int]:
        """Sources, modules, rows and columns."""
        return self.a.shape[0], self.a.shape[1], self.b.shape[2], self.a.shape[3]


def count(sources: Sources, base: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """How many magnitudes lie in each of BINS bins from ``base`` on, and above: int32 ``[.., BINS + 1]``.

    base, shift: int32 ``[modules, sources]``.
    """
    number, modules, rows, columns = sources.extent
    counts = torch.zeros(modules, number, BINS + 1, dtype=torch.int32, device=base.device)
    _count_kernel[(triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS), modules, number)](
        a_ptr=sources.a,
        b_ptr=sources.b,
        scalings_ptr=sources.scalings,
        base_ptr=base,
        shift_ptr=shift,
        counts_ptr=counts,
        modules=modules,
        sources=number,
        rows=rows,
        columns=columns,
        RANK=sources.a.shape[2],
        DEPTH=DEPTH,
        PRECISION=sources.precision,
        BINS=BINS,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return counts


def times(sources: Sources, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``T @ right``, float32 ``[modules, rows, width]``, and the squared norms of the rows of T.

    right: float32 ``[modules, columns, width]``, contiguous, width a power of two, 16 to WIDEST.
    """
    _, modules, rows, _ = sources.extent
    product = right.new_empty(modules, rows, right.shape[2])
    norms = right.new_empty(modules, rows)
    arguments = _arguments(sources, right.shape[2])
    _times_kernel[(triton.cdiv(rows, ROWS), modules)](
        right_ptr=right, product_ptr=product, norms_ptr=norms, **arguments
    )
    return product, norms


def transposed_times(sources: Sources, left: torch.Tensor) -> torch.Tensor:
    """``T^T @ left``, float32 ``[modules, columns, width]``; left: ``[modules, rows, width]``, as above."""
    _, modules, _, columns = sources.extent
    product = left.new_empty(modules, columns, left.shape[2])
    _transposed_times_kernel[(triton.cdiv(columns, COLUMNS), modules)](
        left_ptr=left, product_ptr=product, **_arguments(sources, left.shape[2])
    )
    return product


def _arguments(sources: Sources, width: int) -> dict[str, object]:
    number, modules, rows, columns = sources.extent
    return {
        "a_ptr": sources.a,
        "b_ptr": sources.b,
        "scalings_ptr": sources.scalings,
        "weights_ptr": sources.weights,
        "low_ptr": sources.low,
        "high_ptr": sources.high,
        "keys_ptr": sources.keys,
        "shares_ptr": sources.shares,
        "rescales_ptr": sources.rescales,
        "modules": modules,
        "rows": rows,
        "columns": columns,
        "SOURCES": number,
        "RANK": sources.a.shape[2],
        "DEPTH": DEPTH,
        "PRECISION": sources.precision,
        "KEEP": sources.keep,
        "RULE": sources.rule,
        "WEIGHTED": sources.weighted,
        "SKETCH": PRECISE,
        "WIDTH": width,
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
        "num_warps": WARPS,
        "enable_fp_fusion": False,
    }


PRECISE = "ieee" if torch.version.hip else "tf32x3"
"""Of products of float32 numbers; AMD's matrix cores take them as they are."""


def precision(dtypes: set[torch.dtype]) -> str:
    """Of products of factors of these dtypes: 16 bits fit into tf32."""
    return PRECISE if torch.float32 in dtypes or torch.version.hip else "tf32"
