"""All tensors of a merge in one launch: keep, weight, elect, average, entry by entry, into strided targets.

For each entry ``j``, over the sources ``i`` in their order (TIES, arXiv 2306.01708; DARE, arXiv 2311.03099):

    x_i  =  kept entry, else 0       largest: mag > thr or (mag == thr and j < cut)
                                     random:  draw(j) < share, and x_i = rescale * entry
    y_i  =  w_i x_i
    sum:             out = y_1 + y_2 + ...
    agreeing mean:   out = (sum of y_i with sgn z_i = elected) / max(1, their count)
                     z_i = x_i or y_i;  elected = + where sum z_i (or sum sgn z_i) >= 0, else -

Every operation rounds to float32, in source order and without fused multiply-add, and the result is rounded
once to the dtype of the merge.  This gives the bits of ``reference.entries``.  One pass over the sources is
enough, since only running sums are kept.

An entry is addressed by its row and column in the target, which may have any strides and a larger rank than
the sources (entries beyond the sources become zero).  Groups of eight columns share this arithmetic and one
call of Philox.  If eight columns never cross a row and every address is a multiple of 16 bytes (``ALIGNED``),
a group is also loaded and stored by one instruction.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from collections.abc import Collection
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from merged_lora.plan import AgreeingMean, All, Blend, Keep, Largest, Random, Sum

from .philox import draws
from .words import BF16, FP16, FP32, GROUP, INFINITY, MAGNITUDE, MIXED, WARPS, narrow, pointer, widen

COPY: tl.constexpr = tl.constexpr(3)  # of a single source, since a sum would turn its -0.0 into 0.0
SUM: tl.constexpr = tl.constexpr(0)
VOTE_TOTAL: tl.constexpr = tl.constexpr(1)
VOTE_FREQUENCY: tl.constexpr = tl.constexpr(2)
KEEP_ALL: tl.constexpr = tl.constexpr(0)
KEEP_LARGEST: tl.constexpr = tl.constexpr(1)
KEEP_RANDOM: tl.constexpr = tl.constexpr(2)

NEGATIVE: tl.constexpr = tl.constexpr(1 << 16)  # negative entries are counted in the upper half of a word
TABLE_COLUMNS: tl.constexpr = tl.constexpr(9)  # of the table of tensors
BLOCK = 2048  # entries of a target that one program computes
COMBINED = (All, Largest, Random), (Sum, AgreeingMean)
"""Keep rules and blends that the kernel does."""
UNROLLED = 4
"""The loop over up to this many sources is unrolled, unless their dtypes differ: that takes too many
registers."""


@triton.jit
def _load(address, kind, index, mask, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """The float32 bits of a source's entries, int32; 0 where masked.

    kind: dtype of this source, if KIND is MIXED.
    """
    if KIND == MIXED:
        if kind == BF16:
            bits = _load_kind(address, index, mask, BF16, ALIGNED)
        elif kind == FP16:
            bits = _load_kind(address, index, mask, FP16, ALIGNED)
        else:
            bits = _load_kind(address, index, mask, FP32, ALIGNED)
    else:
        bits = _load_kind(address, index, mask, KIND, ALIGNED)
    return bits


@triton.jit
def _load_kind(address, index, mask, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    return widen(tl.load(pointer(address, KIND, ALIGNED) + index, mask=mask, other=0), KIND)


@triton.jit
def add_entries(x, weight, total, positive, negative, counts, BLEND: tl.constexpr, WEIGHTED: tl.constexpr):
    """The running sums after adding one source's kept entries ``x``.

    total: sum of the results (SUM), or of the votes.
    positive, negative: sums of the positive and of the negative weighted entries.
    counts: 1 for each positive entry and NEGATIVE for each negative one.
    """
    y = x * weight
    if BLEND == COPY:
        total = y
    elif BLEND == SUM:
        total += y
    else:
        z = y if WEIGHTED else x
        up = z > 0.0
        down = z < 0.0
        if BLEND == VOTE_TOTAL:
            total += z
        else:
            total += up.to(tl.float32) - down.to(tl.float32)
        positive = tl.where(up, positive + y, positive)
        negative = tl.where(down, negative + y, negative)
        counts += tl.where(up, 1, tl.where(down, NEGATIVE, 0))
    return total, positive, negative, counts


@triton.jit
def _add_source(
    cell,  # of the tables [tensors, count]
    index,  # flat index in the source, and the same index as Philox counter and lane
    counter,
    lane,
    inside,
    total,
    positive,
    negative,
    counts,
    sources_ptr,
    keeps_ptr,
    weights_ptr,
    shares_ptr,
    rescales_ptr,
    kinds_ptr,
    KIND: tl.constexpr,
    KEEP: tl.constexpr,
    BLEND: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The running sums of :func:`add_entries` after loading, trimming and adding one source's entries."""
    address = tl.load(sources_ptr + cell)
    kind = 0
    if KIND == MIXED:
        kind = tl.load(kinds_ptr + cell)
    # `where`, not `&`: the interpreter turns an `&` with a scalar into integers.
    bits = _load(address, kind, index, tl.where(address != 0, inside, False), KIND, ALIGNED)
    x = bits.to(tl.float32, bitcast=True)
    if KEEP == KEEP_LARGEST:
        threshold = tl.load(keeps_ptr + cell).to(tl.pointer_type(tl.int32))
        thr = tl.load(threshold)
        cut = tl.load(threshold + 1)
        if KIND != FP32 and KIND != MIXED:
            # A 16-bit dtype leaves at least the 13 lowest bits of its float32 value zero.  They have room for
            # the index within a group: the least magnitude kept rises by one from entry to entry and passes
            # the threshold at the cut.  A threshold of 0 is raised to 7, so that the least magnitude stays
            # positive; every entry that is not zero lies above that.
            before = tl.minimum(tl.maximum(cut - (index - lane), 0), GROUP)
            least = tl.maximum(thr, 7) + 1 - before + lane
        else:
            least = thr + (index >= cut).to(tl.int32)
        large = tl.abs(x) >= least.to(tl.float32, bitcast=True)
        x = tl.where(large, x, 0.0)
    elif KEEP == KEEP_RANDOM:
        drawn = draws(counter, lane, tl.load(keeps_ptr + cell))
        x = tl.where(drawn < tl.load(shares_ptr + cell), x * tl.load(rescales_ptr + cell), 0.0)
    return add_entries(x, tl.load(weights_ptr + cell), total, positive, negative, counts, BLEND, WEIGHTED)


@triton.jit
def _divide(x, count, SOURCES: tl.constexpr):
    """``x / max(count, 1)`` rounded to nearest, for x that is not -0.0.

    count: int32, at most SOURCES; anything if SOURCES is 0.
    """
    if SOURCES == 0 or SOURCES > 4:
        return tl.div_rn(x, tl.maximum(count, 1).to(tl.float32))
    # For counts of 0, 1, 2, 4 this is 1, 1, 1/2, 1/4, which is exact, so the product is the rounded quotient.
    power = (0x3F800000 - ((count >> 1) << 23)).to(tl.float32, bitcast=True)
    quotient = x * power
    if SOURCES >= 3:
        # Markstein's correction; the interpreter of Triton 3.6 rounds it twice, hardware and 3.9 once. The
        # remainder is exact, since both of its terms are multiples of the smallest float32; and a third of a
        # number is never within 1/6 of the last place of a midpoint, so the rounding is right.
        third = x * 0.3333333432674408
        corrected = tl.fma(tl.fma(third, -3.0, x), 0.3333333432674408, third)
        quotient = tl.where(count == 3, corrected, quotient)
    return quotient


@triton.jit(do_not_specialize=["count"])  # specializing for 1 and for multiples of 16 sources gains nothing
def _combine_kernel(
    items_ptr,  # int32 [items, 2]: tensor, first entry of the block
    tensors_ptr,  # int64 [tensors, TABLE_COLUMNS]: address, strides of a row and a column, rows and columns
    #               of the target; stride of a row in the sources, rows and columns that they fill, and their
    #               first entry
    sources_ptr,  # int64 [tensors, count]: address, 0 if a source lacks the tensor
    keeps_ptr,  # int64 [tensors, count]: address of the int32 threshold (thr, cut), or Philox key
    weights_ptr,  # float32 [tensors, count]
    shares_ptr,  # int32 [tensors, count]: of 65536 draws
    rescales_ptr,  # float32 [tensors, count]
    kinds_ptr,  # int32 [tensors, count]: dtypes of the sources, read if KIND is MIXED
    flags_ptr,  # int32 [tensors]
    count,  # number of sources
    SOURCES: tl.constexpr,  # count, or 0 for a loop at run time
    KIND: tl.constexpr,  # dtype of the sources
    ROUND: tl.constexpr,  # dtype of the merge
    TARGET: tl.constexpr,  # dtype of the targets
    KEEP: tl.constexpr,
    BLEND: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHECK: tl.constexpr,  # store no result; set the flag of a tensor whose result is not finite
    BLOCK: tl.constexpr,
):
    item = items_ptr + 2 * tl.program_id(0)
    tensor = tl.load(item)
    row = tensors_ptr + TABLE_COLUMNS * tensor.to(tl.int64)
    rows = tl.load(row + 3).to(tl.int32)
    columns = tl.load(row + 4).to(tl.int32)
    stride = tl.load(row + 5).to(tl.int32)
    filled_rows = tl.load(row + 6).to(tl.int32)
    filled_columns = tl.load(row + 7).to(tl.int32)
    first = tl.load(row + 8).to(tl.int32)

    begin = tl.load(item + 1)
    group = begin + tl.arange(0, BLOCK // GROUP)[:, None] * GROUP  # [BLOCK / 8, 1]: first entry of each group
    lanes = tl.arange(0, GROUP)[None, :]  # [1, 8]
    if ALIGNED:
        entry = group
        group_row = entry // columns
        group_column = entry - group_row * columns
        start = tl.multiple_of(first + group_row * stride + group_column, [GROUP, GROUP])
        index = start + lanes
        counter = start // GROUP
        lane = lanes
        target_column = group_column + lanes
    else:
        entry = group + lanes
        group_row = entry // columns
        group_column = entry - group_row * columns
        index = first + group_row * stride + group_column
        counter = index // GROUP
        lane = index - counter * GROUP
        target_column = group_column
    inside = (entry < rows * columns) & (group_row < filled_rows) & (group_column < filled_columns)

    total = tl.zeros([BLOCK // GROUP, GROUP], tl.float32)
    positive = total
    negative = total
    counts = tl.zeros([BLOCK // GROUP, GROUP], tl.int32)
    cell = tensor * count
    if SOURCES == 0:
        end = cell + count
        while cell < end:
            total, positive, negative, counts = _add_source(
                cell, index, counter, lane, inside, total, positive, negative, counts,
                sources_ptr, keeps_ptr, weights_ptr, shares_ptr, rescales_ptr, kinds_ptr,
                KIND, KEEP, BLEND, WEIGHTED, ALIGNED,
            )  # fmt: skip
            cell += 1
    else:
        for i in tl.static_range(SOURCES):
            total, positive, negative, counts = _add_source(
                cell + i, index, counter, lane, inside, total, positive, negative, counts,
                sources_ptr, keeps_ptr, weights_ptr, shares_ptr, rescales_ptr, kinds_ptr,
                KIND, KEEP, BLEND, WEIGHTED, ALIGNED,
            )  # fmt: skip

    if BLEND != SUM and BLEND != COPY:
        elected = total >= 0.0
        agreeing = tl.where(elected, positive, negative)
        voters = tl.where(elected, counts & 0xFFFF, counts >> 16)
        total = _divide(agreeing, voters, SOURCES)
    word = narrow(total, ROUND)
    if ROUND != TARGET:
        word = narrow(widen(word, ROUND).to(tl.float32, bitcast=True), TARGET)
    if CHECK:
        largest = tl.max(tl.where(inside, widen(word, TARGET) & MAGNITUDE, 0))
        if largest >= INFINITY:
            tl.store(flags_ptr + tensor, 1)
    else:
        target = pointer(tl.load(row), TARGET, ALIGNED)
        row_stride = tl.load(row + 1).to(tl.int32)
        if ALIGNED:
            offset = tl.multiple_of(group_row * row_stride + group_column, [GROUP, GROUP]) + lanes
        else:
            offset = group_row * row_stride + target_column * tl.load(row + 2).to(tl.int32)
        tl.store(target + offset, word, mask=entry < rows * columns)


@dataclass(frozen=True, eq=False)
class Tables:
    """The tensors that one launch reads, on the device; ``_combine_kernel`` has their shapes and dtypes."""

    items: torch.Tensor
    tensors: torch.Tensor
    sources: torch.Tensor
    keeps: torch.Tensor
    weights: torch.Tensor
    shares: torch.Tensor
    rescales: torch.Tensor
    kinds: torch.Tensor
    flags: torch.Tensor


@dataclass(frozen=True)
class Variant:
    """The compile-time constants of a launch.

    kind: dtype of the sources, as in ``words.KINDS``; MIXED if they differ.
    round: dtype of the merge.
    target: dtype of the targets.
    keep: KEEP_ALL, KEEP_LARGEST or KEEP_RANDOM.
    blend: COPY, SUM, VOTE_TOTAL or VOTE_FREQUENCY.
    weighted: whether weighted entries vote, instead of entries as they are.
    aligned: whether every address is a multiple of 16 bytes, and every row and stride one of eight entries.
    check: whether to store no result and set the flags of tensors that overflow.
    """

    kind: int
    round: int
    target: int
    keep: int
    blend: int
    weighted: bool
    aligned: bool
    check: bool = False


def keep_code(keeps: Collection[Keep]) -> int:
    """``Variant.keep`` for the keep rules of all sources, which are of COMBINED."""
    drawn = any(isinstance(keep, Random) for keep in keeps)
    trimmed = any(isinstance(keep, Largest) for keep in keeps)
    if drawn and trimmed:
        raise TypeError("the kernel trims or draws the entries of all sources, it does not mix the two")
    return int((KEEP_RANDOM if drawn else KEEP_LARGEST if trimmed else KEEP_ALL).value)


def blend_code(blend: Blend) -> int:
    """``Variant.blend`` for a blend of COMBINED."""
    match blend:
        case Sum():
            return int(SUM.value)
        case AgreeingMean(frequency):
            return int((VOTE_FREQUENCY if frequency else VOTE_TOTAL).value)
    raise TypeError(f"the kernel has no blend for {blend}")


def combine(tables: Tables, variant: Variant, programs: int) -> None:
    """Merge the tensors of the tables, in one launch on the current stream.

    programs: number of items in the tables; 0 compiles the kernel and launches nothing.
    """
    count = tables.sources.shape[1]
    _combine_kernel[(programs,)](
        items_ptr=tables.items,
        tensors_ptr=tables.tensors,
        sources_ptr=tables.sources,
        keeps_ptr=tables.keeps,
        weights_ptr=tables.weights,
        shares_ptr=tables.shares,
        rescales_ptr=tables.rescales,
        kinds_ptr=tables.kinds,
        flags_ptr=tables.flags,
        count=count,
        SOURCES=count if count <= UNROLLED and variant.kind != MIXED else 0,
        KIND=variant.kind,
        ROUND=variant.round,
        TARGET=variant.target,
        KEEP=variant.keep,
        BLEND=variant.blend,
        WEIGHTED=variant.weighted,
        ALIGNED=variant.aligned,
        CHECK=variant.check,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,  # a fused multiply-add would round once where the reference rounds twice
    )
