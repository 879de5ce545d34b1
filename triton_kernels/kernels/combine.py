"""All tensors of a merge in one launch: keep, weight, elect, average, entry by entry, into strided targets.

Per entry ``j``, over the sources ``i`` in their order (TIES, arXiv 2306.01708; DARE, arXiv 2311.03099):

    x_i  =  kept entry, else 0       largest: mag > thr or (mag == thr and j < cut)
                                     random:  draw(j) < share, and x_i = rescale * entry
    y_i  =  w_i x_i
    sum:             out = y_1 + y_2 + ...
    agreeing mean:   out = (sum of y_i with sgn z_i = elected) / max(1, their count)
                     z_i = x_i or y_i;  elected = + where sum z_i (or sum sgn z_i) >= 0, else -

Every operation rounds to float32 in source order, without fused multiply-add, and the result is rounded once
to the dtype of the merge: the bits of ``reference.factors``.  One pass: only running sums are kept.

An entry's place is a row and a column of its target, so that a slot may have a larger rank (what lies beyond
the source is zero) and any strides.  Groups of eight columns share this arithmetic and one call of Philox;
where eight columns never cross a row and every address is a multiple of 16 bytes (``ALIGNED``), a group is
also loaded and stored whole.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .philox import draws
from .words import BF16, FP16, FP32, INFINITY, MAGNITUDE, MIXED, WARPS, narrow, pointer, widen

COPY: tl.constexpr = tl.constexpr(3)  # of one source; a sum would turn its -0.0 into 0.0
SUM: tl.constexpr = tl.constexpr(0)
VOTE_TOTAL: tl.constexpr = tl.constexpr(1)
VOTE_FREQUENCY: tl.constexpr = tl.constexpr(2)
KEEP_ALL: tl.constexpr = tl.constexpr(0)
KEEP_LARGEST: tl.constexpr = tl.constexpr(1)
KEEP_RANDOM: tl.constexpr = tl.constexpr(2)

GROUP: tl.constexpr = tl.constexpr(8)  # entries that share a Philox call
NEGATIVE: tl.constexpr = tl.constexpr(1 << 16)  # positive entries are counted in the lower half of a word
COLUMNS: tl.constexpr = tl.constexpr(9)  # of the table of tensors
BLOCK = 2048  # entries of a target that one program makes
UNROLLED = 4  # sources up to which the loop over them is unrolled; not of mixed dtypes, which takes registers


@triton.jit
def _load(address, kind, index, mask, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """float32 bits of a source's entries, 0 where masked."""
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
def add_entries(x, weight, total, positive, negative, counts, RULE: tl.constexpr, WEIGHTED: tl.constexpr):
    """Add kept entries of one source to the running sums; counts hold NEGATIVE for each negative one."""
    y = x * weight
    if RULE == COPY:
        total = y
    elif RULE == SUM:
        total += y
    else:
        z = y if WEIGHTED else x
        up = z > 0.0
        down = z < 0.0
        if RULE == VOTE_TOTAL:
            total += z
        else:
            total += up.to(tl.float32) - down.to(tl.float32)
        positive = tl.where(up, positive + y, positive)
        negative = tl.where(down, negative + y, negative)
        counts += tl.where(up, 1, tl.where(down, NEGATIVE, 0))
    return total, positive, negative, counts


@triton.jit
def _add_source(
    at,  # row of the source tables
    index,  # flat index in the source, and the same as Philox counter and lane
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
    RULE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Add one source's entries to the running sums."""
    address = tl.load(sources_ptr + at)
    kind = 0
    if KIND == MIXED:
        kind = tl.load(kinds_ptr + at)
    # `where`, not `&`: the interpreter turns an `&` with a scalar into integers.
    bits = _load(address, kind, index, tl.where(address != 0, inside, False), KIND, ALIGNED)
    x = bits.to(tl.float32, bitcast=True)
    if KEEP == KEEP_LARGEST:
        pair = tl.load(keeps_ptr + at).to(tl.pointer_type(tl.int32))
        thr = tl.load(pair)
        cut = tl.load(pair + 1)
        if KIND != FP32 and KIND != MIXED:
            # 16 bits leave at least 13 zeros below them in float32, room for a place in the group: the least
            # magnitude grows by one from entry to entry, and passes the threshold at the cut.  A threshold
            # of 7 for 0 keeps it positive, and what is not zero lies above.
            before = tl.minimum(tl.maximum(cut - (index - lane), 0), GROUP)
            least = tl.maximum(thr, 7) + 1 - before + lane
        else:
            least = thr + (index >= cut).to(tl.int32)
        large = tl.abs(x) >= least.to(tl.float32, bitcast=True)
        x = tl.where(large, x, 0.0)
    elif KEEP == KEEP_RANDOM:
        drawn = draws(counter, lane, tl.load(keeps_ptr + at))
        x = tl.where(drawn < tl.load(shares_ptr + at), x * tl.load(rescales_ptr + at), 0.0)
    return add_entries(x, tl.load(weights_ptr + at), total, positive, negative, counts, RULE, WEIGHTED)


@triton.jit
def _divide(x, count, SOURCES: tl.constexpr):
    """``x / max(count, 1)`` rounded to nearest, for a count of up to SOURCES (0: any) and x not -0.0."""
    if SOURCES == 0 or SOURCES > 4:
        return tl.div_rn(x, tl.maximum(count, 1).to(tl.float32))
    # 1, 1, 1/2, 1/4 for counts of 0, 1, 2, 4: exact, so the product is the rounded quotient.
    power = (0x3F800000 - ((count >> 1) << 23)).to(tl.float32, bitcast=True)
    quotient = x * power
    if SOURCES >= 3:
        # Markstein's correction (the interpreter of Triton 3.6 rounds it twice, hardware and 3.9 once). The
        # remainder is exact, as both its terms are multiples of the smallest float32; a third of a number is
        # never within 1/6 of the last place of a midpoint.
        third = x * 0.3333333432674408
        corrected = tl.fma(tl.fma(third, -3.0, x), 0.3333333432674408, third)
        quotient = tl.where(count == 3, corrected, quotient)
    return quotient


@triton.jit(do_not_specialize=["count"])  # a kernel of its own for 1 and for 16 sources gains nothing
def _combine_kernel(
    items_ptr,  # int32 [items, 2]: tensor, first entry of the block
    tensors_ptr,  # int64 [tensors, COLUMNS]: address, strides of a row and a column, rows and columns of the
    #               target; stride of a row in the sources, rows and columns that they fill, and their
    #               first entry
    sources_ptr,  # int64 [tensors, count]: address, 0 where a source lacks the tensor
    keeps_ptr,  # int64 [tensors, count]: address of the int32 pair (thr, cut), or Philox key
    weights_ptr,  # float32 [tensors, count]
    shares_ptr,  # int32 [tensors, count]
    rescales_ptr,  # float32 [tensors, count]
    kinds_ptr,  # int32 [tensors, count]
    flags_ptr,  # int32 [tensors]
    count,
    SOURCES: tl.constexpr,  # count, or 0 for a loop at run time
    KIND: tl.constexpr,  # dtype of the sources, of the merge, of the targets
    ROUND: tl.constexpr,
    TARGET: tl.constexpr,
    KEEP: tl.constexpr,
    RULE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHECK: tl.constexpr,  # store nothing; raise the flag of a tensor whose result is not finite
    BLOCK: tl.constexpr,
):
    item = items_ptr + 2 * tl.program_id(0)
    tensor = tl.load(item)
    row = tensors_ptr + COLUMNS * tensor.to(tl.int64)
    rows = tl.load(row + 3).to(tl.int32)
    columns = tl.load(row + 4).to(tl.int32)
    stride = tl.load(row + 5).to(tl.int32)
    filled_rows = tl.load(row + 6).to(tl.int32)
    filled_columns = tl.load(row + 7).to(tl.int32)
    skipped = tl.load(row + 8).to(tl.int32)

    begin = tl.load(item + 1)
    group = begin + tl.arange(0, BLOCK // GROUP)[:, None] * GROUP
    eight = tl.arange(0, GROUP)[None, :]
    if ALIGNED:
        place = group
        group_row = place // columns
        group_column = place - group_row * columns
        start = tl.multiple_of(skipped + group_row * stride + group_column, [GROUP, GROUP])
        index = start + eight
        counter = start // GROUP
        lane = eight
        target_column = group_column + eight
    else:
        place = group + eight
        group_row = place // columns
        group_column = place - group_row * columns
        index = skipped + group_row * stride + group_column
        counter = index // GROUP
        lane = index - counter * GROUP
        target_column = group_column
    inside = (place < rows * columns) & (group_row < filled_rows) & (group_column < filled_columns)

    total = tl.zeros([BLOCK // GROUP, GROUP], tl.float32)
    positive = total
    negative = total
    counts = tl.zeros([BLOCK // GROUP, GROUP], tl.int32)
    at = tensor * count
    if SOURCES == 0:
        end = at + count
        while at < end:
            total, positive, negative, counts = _add_source(
                at, index, counter, lane, inside, total, positive, negative, counts,
                sources_ptr, keeps_ptr, weights_ptr, shares_ptr, rescales_ptr, kinds_ptr,
                KIND, KEEP, RULE, WEIGHTED, ALIGNED,
            )  # fmt: skip
            at += 1
    else:
        for i in tl.static_range(SOURCES):
            total, positive, negative, counts = _add_source(
                at + i, index, counter, lane, inside, total, positive, negative, counts,
                sources_ptr, keeps_ptr, weights_ptr, shares_ptr, rescales_ptr, kinds_ptr,
                KIND, KEEP, RULE, WEIGHTED, ALIGNED,
            )  # fmt: skip

    if RULE != SUM and RULE != COPY:
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
            offset = tl.multiple_of(group_row * row_stride + group_column, [GROUP, GROUP]) + eight
        else:
            offset = group_row * row_stride + target_column * tl.load(row + 2).to(tl.int32)
        tl.store(target + offset, word, mask=place < rows * columns)


@dataclass(frozen=True, eq=False)
class Tables:
    """What one launch works on, on the device; the columns of each are told at ``_combine_kernel``."""

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
    """The compile-time side of a launch.

    kind, round, target: a kind of ``words`` for the sources, the merge, and the targets.
    keep, rule: one of KEEP_... and SUM, VOTE_...; weighted: whether the vote counts weighted values.
    aligned: every address is a multiple of 16, every row and stride one of eight entries.
    check: store nothing, raise the flags of tensors that overflow.
    """

    kind: int
    round: int
    target: int
    keep: int
    rule: int
    weighted: bool
    aligned: bool
    check: bool = False


def combine(tables: Tables, variant: Variant, programs: int) -> None:
    """Merge what the tables name, in one launch on the current stream.

    programs: as many as the tables have items; 0 compiles the kernel and launches nothing.
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
        RULE=variant.rule,
        WEIGHTED=variant.weighted,
        ALIGNED=variant.aligned,
        CHECK=variant.check,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,  # a fused multiply-add would round once where the reference rounds twice
    )
