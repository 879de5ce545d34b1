"""Products with merged deltas that are never stored: tiles are formed, merged and multiplied in one kernel.

For each entry, over the sources ``i`` in their order (TIES, arXiv 2306.01708; DARE, arXiv 2311.03099):

    x_i = s_i (B_i A_i)        largest: mag >= low_i,  and mag < high_i if outliers are skipped, else 0
                               random:  draw(index) < share_i, and x_i = rescale_i x_i, else 0
    T   = sum of w_i x_i, or the mean of the w_i x_i whose sign is elected

Only the sketches ``T V`` and ``T^T Q`` of T, and its squared norm, are stored (N. Halko, P. G. Martinsson and
J. A. Tropp, "Finding structure with randomness", SIAM Review 53, 2011).

Every pass forms a tile by the same product of the same shape, so an entry has the same bits in all passes.
Factors of 16 bits are exact in tf32, so one tf32 product of them is as good as float32; other factors take
three tf32 products each.  Unlike in ``trim.py``, all entries that equal a threshold are kept: the order of
the sums inside a product is up to the hardware, and so is which entries tie.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .combine import KEEP_LARGEST, KEEP_RANDOM, SUM, add_entries
from .philox import draws
from .words import GROUP, MAGNITUDE, WARPS

KEEP_BETWEEN: tl.constexpr = tl.constexpr(4)
TILE_ROWS, TILE_COLUMNS = 32, 64
DEPTH = 16  # ranks that one product step takes; ranks are padded with zeros to a multiple
WIDEST = 128  # largest number of columns that a tile is multiplied with; more sums exceed the registers
BINS = 2048
VARYING = ["modules"]  # specializing for one module would compile another kernel within a server's step
FLOAT32 = "ieee" if torch.version.hip else "tf32x3"
"""Precision of products of float32 operands; AMD's matrix cores support them natively."""


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
    """A tile of ``B A``, float32 ``[TILE_ROWS, TILE_COLUMNS]``."""
    inner = tl.arange(0, DEPTH)
    acc = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    # Not unrolled: the compiler would load the factors of all steps before the first product.
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
    shift_ptr,  # int32 [modules, sources]: a bin spans 2^shift magnitudes
    counts_ptr,  # int32 [modules, sources, BINS + 1]: the last one counts the magnitudes above all bins
    modules,
    sources,
    rows,
    columns,
    RANK: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BINS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    across = tl.cdiv(columns, TILE_COLUMNS)
    tile = tl.program_id(0)
    module = tl.program_id(1).to(tl.int64)
    source = tl.program_id(2).to(tl.int64)
    row = (tile // across) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = (tile % across) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    stack = source * modules + module
    x = _product(
        a_ptr=a_ptr + stack * RANK * columns,
        b_ptr=b_ptr + stack * rows * RANK,
        row=row,
        column=column,
        rows=rows,
        columns=columns,
        RANK=RANK,
        DEPTH=DEPTH,
        PRECISION=PRECISION,
    )
    cell = module * sources + source  # of the tables [modules, sources]
    x = x * tl.load(scalings_ptr + cell)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    mag = x.to(tl.int32, bitcast=True) & MAGNITUDE
    base = tl.load(base_ptr + cell)
    bin_index = (mag - base) >> tl.load(shift_ptr + cell)
    counts = counts_ptr + cell * (BINS + 1)
    tl.atomic_add(counts + bin_index, 1, mask=inside & (mag >= base) & (bin_index < BINS), sem="relaxed")
    above = tl.sum(tl.where(inside & (mag >= base) & (bin_index >= BINS), 1, 0))
    tl.atomic_add(counts + BINS, above, sem="relaxed")


@triton.jit
def _merged_tile(
    a_ptr,  # pointers as in _multiply_kernel
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
    row,  # int32 [TILE_ROWS]
    column,  # int32 [TILE_COLUMNS]
    rows,
    columns,
    SOURCES: tl.constexpr,
    RANK: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    KEEP: tl.constexpr,
    BLEND: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """A tile of the merged delta, float32 ``[TILE_ROWS, TILE_COLUMNS]``; zeros outside of the delta."""
    total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    positive = total
    negative = total
    counts = tl.zeros([row.shape[0], column.shape[0]], tl.int32)
    # Not unrolled: the products of several sources at a time would not fit into registers.
    for i in range(SOURCES):
        stack = i * modules + module
        x = _product(
            a_ptr=a_ptr + stack * RANK * columns,
            b_ptr=b_ptr + stack * rows * RANK,
            row=row,
            column=column,
            rows=rows,
            columns=columns,
            RANK=RANK,
            DEPTH=DEPTH,
            PRECISION=PRECISION,
        )
        cell = module * SOURCES + i  # of the tables [modules, sources]
        x = x * tl.load(scalings_ptr + cell)
        if KEEP == KEEP_LARGEST:
            x = tl.where(tl.abs(x) >= tl.load(low_ptr + cell), x, 0.0)
        elif KEEP == KEEP_BETWEEN:
            kept = (tl.abs(x) >= tl.load(low_ptr + cell)) & (tl.abs(x) < tl.load(high_ptr + cell))
            x = tl.where(kept, x, 0.0)
        elif KEEP == KEEP_RANDOM:
            index = row.to(tl.int64)[:, None] * columns + column.to(tl.int64)[None, :]
            drawn = draws(index // GROUP, (index % GROUP).to(tl.int32), tl.load(keys_ptr + cell))
            x = tl.where(drawn < tl.load(shares_ptr + i), x * tl.load(rescales_ptr + i), 0.0)
        weight = tl.load(weights_ptr + cell)
        total, positive, negative, counts = add_entries(
            x, weight, total, positive, negative, counts, BLEND, WEIGHTED
        )
    if BLEND != SUM:
        elected = total >= 0.0
        count = tl.where(elected, counts & 0xFFFF, counts >> 16)
        total = tl.where(elected, positive, negative) / tl.maximum(count, 1).to(tl.float32)
    return tl.where((row < rows)[:, None] & (column < columns)[None, :], total, 0.0)


@triton.jit(do_not_specialize=VARYING)
def _multiply_kernel(
    a_ptr,  # float32 [sources, modules, RANK, columns]
    b_ptr,  # float32 [sources, modules, rows, RANK]
    scalings_ptr,  # float32 [modules, sources]
    weights_ptr,  # float32 [modules, sources]
    low_ptr,  # float32 [modules, sources]: least magnitude kept
    high_ptr,  # float32 [modules, sources]: least magnitude of an outlier
    keys_ptr,  # int64 [modules, sources]: of Philox
    shares_ptr,  # int32 [sources]: of 65536 draws
    rescales_ptr,  # float32 [sources]
    factor_ptr,  # float32 [modules, columns, WIDTH], or [modules, rows, WIDTH] if TRANSPOSED
    product_ptr,  # float32 [modules, rows, WIDTH], or [modules, columns, WIDTH] if TRANSPOSED
    norms_ptr,  # float32 [modules, rows]: squared norms of the rows of T; None if TRANSPOSED
    modules,
    rows,
    columns,
    TRANSPOSED: tl.constexpr,  # multiply T^T instead of T
    SOURCES: tl.constexpr,
    RANK: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,  # of the products B A
    KEEP: tl.constexpr,
    BLEND: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SKETCH: tl.constexpr,  # precision of the product with T
    WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    # Each program computes LENGTH rows of the product, over one stripe of tiles of T.
    LENGTH: tl.constexpr = TILE_COLUMNS if TRANSPOSED else TILE_ROWS
    STEP: tl.constexpr = TILE_ROWS if TRANSPOSED else TILE_COLUMNS
    length = columns if TRANSPOSED else rows
    end = rows if TRANSPOSED else columns
    module = tl.program_id(1).to(tl.int64)
    fixed = tl.program_id(0) * LENGTH + tl.arange(0, LENGTH)
    wide = tl.arange(0, WIDTH)
    acc = tl.zeros([LENGTH, WIDTH], tl.float32)
    norms = tl.zeros([LENGTH], tl.float32)
    start = 0
    while start < end:
        moving = start + tl.arange(0, STEP)
        tile = _merged_tile(
            a_ptr=a_ptr,
            b_ptr=b_ptr,
            scalings_ptr=scalings_ptr,
            weights_ptr=weights_ptr,
            low_ptr=low_ptr,
            high_ptr=high_ptr,
            keys_ptr=keys_ptr,
            shares_ptr=shares_ptr,
            rescales_ptr=rescales_ptr,
            module=module,
            modules=modules,
            row=moving if TRANSPOSED else fixed,
            column=fixed if TRANSPOSED else moving,
            rows=rows,
            columns=columns,
            SOURCES=SOURCES,
            RANK=RANK,
            DEPTH=DEPTH,
            PRECISION=PRECISION,
            KEEP=KEEP,
            BLEND=BLEND,
            WEIGHTED=WEIGHTED,
        )
        offset = (module * end + moving)[:, None] * WIDTH + wide[None, :]
        factor = tl.load(factor_ptr + offset, mask=(moving < end)[:, None], other=0.0)
        if TRANSPOSED:
            acc = tl.dot(tl.trans(tile), factor, acc, input_precision=SKETCH)
        else:
            acc = tl.dot(tile, factor, acc, input_precision=SKETCH)
            norms += tl.sum(tile * tile, axis=1)
        start += STEP
    offset = (module * length + fixed)[:, None] * WIDTH + wide[None, :]
    tl.store(product_ptr + offset, acc, mask=(fixed < length)[:, None])
    if not TRANSPOSED:
        tl.store(norms_ptr + module * length + fixed, norms, mask=fixed < length)


@dataclass(frozen=True, eq=False)
class Deltas:
    """The deltas ``s_i B_i A_i`` of all sources, on the device.

    a: float32 ``[sources, modules, rank, columns]``, padded with zeros to a rank that is a multiple of DEPTH.
    b: float32 ``[sources, modules, rows, rank]``, likewise.
    scalings: float32 ``[modules, sources]``.
    precision: of the products B A, from :func:`precision`.
    """

    a: torch.Tensor
    b: torch.Tensor
    scalings: torch.Tensor
    precision: str

    @property
    def extent(self) -> tuple[int, int, int, int]:
        """Sources, modules, rows and columns."""
        return self.a.shape[0], self.a.shape[1], self.b.shape[2], self.a.shape[3]


@dataclass(frozen=True, eq=False)
class Merge:
    """How deltas are merged; ``_multiply_kernel`` has the shapes and dtypes of the tensors.

    keep: KEEP_ALL, KEEP_LARGEST, KEEP_BETWEEN or KEEP_RANDOM.
    blend: SUM, VOTE_TOTAL or VOTE_FREQUENCY.
    weighted: whether weighted entries vote, instead of entries as they are.
    """

    weights: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    keys: torch.Tensor
    shares: torch.Tensor
    rescales: torch.Tensor
    keep: int
    blend: int
    weighted: bool


def count(deltas: Deltas, base: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The number of magnitudes in each bin and above all bins, int32 ``[modules, sources, BINS + 1]``.

    base: magnitude at which the bins begin, int32 ``[modules, sources]``.
    shift: a bin spans ``2 ** shift`` magnitudes, int32 ``[modules, sources]``.
    """
    number, modules, rows, columns = deltas.extent
    counts = torch.zeros(modules, number, BINS + 1, dtype=torch.int32, device=base.device)
    tiles = triton.cdiv(rows, TILE_ROWS) * triton.cdiv(columns, TILE_COLUMNS)
    _count_kernel[(tiles, modules, number)](
        a_ptr=deltas.a,
        b_ptr=deltas.b,
        scalings_ptr=deltas.scalings,
        base_ptr=base,
        shift_ptr=shift,
        counts_ptr=counts,
        modules=modules,
        sources=number,
        rows=rows,
        columns=columns,
        RANK=deltas.a.shape[2],
        DEPTH=DEPTH,
        PRECISION=deltas.precision,
        BINS=BINS,
        TILE_ROWS=TILE_ROWS,
        TILE_COLUMNS=TILE_COLUMNS,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return counts


def times(deltas: Deltas, merge: Merge, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``T @ right`` for the merged deltas T, float32 ``[modules, rows, width]``, and norms.

    right: float32 ``[modules, columns, width]``, contiguous; width is a power of two from 16 to WIDEST.
    The norms are the squared norms of the rows of T, float32 ``[modules, rows]``.
    """
    _, modules, rows, _ = deltas.extent
    product = right.new_empty(modules, rows, right.shape[2])
    norms = right.new_empty(modules, rows)
    _multiply(deltas, merge, right, product, norms, transposed=False)
    return product, norms


def transposed_times(deltas: Deltas, merge: Merge, left: torch.Tensor) -> torch.Tensor:
    """``T^T @ left`` for the merged deltas T, float32 ``[modules, columns, width]``.

    left: float32 ``[modules, rows, width]``, contiguous; width is a power of two from 16 to WIDEST.
    """
    _, modules, _, columns = deltas.extent
    product = left.new_empty(modules, columns, left.shape[2])
    _multiply(deltas, merge, left, product, None, transposed=True)
    return product


def _multiply(
    deltas: Deltas,
    merge: Merge,
    factor: torch.Tensor,
    product: torch.Tensor,
    norms: torch.Tensor | None,
    transposed: bool,
) -> None:
    number, modules, rows, columns = deltas.extent
    stripes = triton.cdiv(columns, TILE_COLUMNS) if transposed else triton.cdiv(rows, TILE_ROWS)
    _multiply_kernel[(stripes, modules)](
        a_ptr=deltas.a,
        b_ptr=deltas.b,
        scalings_ptr=deltas.scalings,
        weights_ptr=merge.weights,
        low_ptr=merge.low,
        high_ptr=merge.high,
        keys_ptr=merge.keys,
        shares_ptr=merge.shares,
        rescales_ptr=merge.rescales,
        factor_ptr=factor,
        product_ptr=product,
        norms_ptr=norms,
        modules=modules,
        rows=rows,
        columns=columns,
        TRANSPOSED=transposed,
        SOURCES=number,
        RANK=deltas.a.shape[2],
        DEPTH=DEPTH,
        PRECISION=deltas.precision,
        KEEP=merge.keep,
        BLEND=merge.blend,
        WEIGHTED=merge.weighted,
        SKETCH=FLOAT32,
        WIDTH=factor.shape[2],
        TILE_ROWS=TILE_ROWS,
        TILE_COLUMNS=TILE_COLUMNS,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def precision(dtypes: set[torch.dtype]) -> str:
    """Precision of products of factors of these dtypes: 16 bits are exact in tf32."""
    return FLOAT32 if torch.float32 in dtypes or torch.version.hip else "tf32"
