"""Batched merges of sums of deltas: against dense float64, in hard cases, and what they cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.stacks import (
    RESOLUTION,
    Source,
    assert_best,
    deltas,
    interpolated,
    product,
    source,
    stacked,
    weights_of,
)
from kernels.watching import Watch
from merged_lora import lowrank
from merged_lora.bench.device_agreement import HALF_STEP, UNIT
from merged_lora.factors import DTYPES, Factors
from merged_lora.plan import Mean, SumModule
from merged_lora.triton_kernels.batched import lowrank as batched
from merged_lora.triton_kernels.batched.lowrank import MergedStack, Stack, kind, merge_stack


@pytest.mark.parametrize("modules", [1, 4])
@pytest.mark.parametrize("ranks", [(6,), (3, 5), (2, 3, 1, 4), (1,) * 16], ids=str)
def test_a_sum_is_the_best_of_its_rank(ranks: tuple[int, ...], modules: int) -> None:
    sources = [source(r, seed, modules) for seed, r in enumerate(ranks)]
    weights = weights_of(modules, len(ranks))
    for rank in (1, 4, sum(ranks) - 1):
        assert_best(merge_stack(stacked(sources, weights, rank)), deltas(sources, weights), rank)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_an_interpolation_is_the_best_of_its_rank(t: float) -> None:
    x, y = source(3, 0), source(5, 1)
    weights = [[1.0, 1.0], [0.7, -2.0], [-0.25, 1e-3]]
    target = interpolated(x, y, weights, t)
    for rank in (2, 7):
        assert_best(merge_stack(stacked([x, y], weights, rank, t)), target, rank)


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-8, 3e-12, 1e8])
@pytest.mark.parametrize("rank", [2, 4, 6])
def test_the_sizes_of_two_factors_do_not_matter_only_their_product(size: float, rank: int) -> None:
    sources = [source(3, 1), source(4, 2, size=size)]
    weights = [[1.0, 1.0]] * 3
    assert_best(merge_stack(stacked(sources, weights, rank)), deltas(sources, weights), rank)


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12, 1e30])
def test_the_size_of_a_product_does_not_matter(factor: float) -> None:
    """Squares of squares of these numbers exceed float32, and those of 1e-30 nearly underflow in float64."""
    (a, b), other = source(3, 1), source(4, 2)
    sources = [(a * factor, b * factor), (other[0] * factor, other[1] * factor)]
    weights = [[1.0, -0.5]] * 3
    assert_best(merge_stack(stacked(sources, weights, 5)), deltas(sources, weights), 5)


@pytest.mark.parametrize("tail", [1e-7, 3e-8, 1e-8])
@pytest.mark.parametrize("side", ["a", "b"])
def test_singular_values_at_the_edge_of_resolution_do_not_add_up(side: str, tail: float) -> None:
    """One singular value of 1 and 63 of size ``tail`` in one factor."""
    rotation, a, b = (
        torch.linalg.qr(source(64, seed, 2, (1, n))[0].double().mT)[0] for seed, n in enumerate((64, 80, 70))
    )
    values = torch.full((64,), tail, dtype=torch.float64)
    values[0] = 1.0
    sizes_a, sizes_b = (values, 1.0) if side == "a" else (1.0, values)
    sources = [(rotation @ (a * sizes_a).mT, (b * sizes_b) @ rotation.mT)]
    for rank in (32, 63):
        assert_best(merge_stack(stacked(sources, [[1.0]] * 2, rank)), deltas(sources, [[1.0]] * 2), rank)


@pytest.mark.parametrize("step", [0.5, 0.1, 1e-2, 1e-4])
def test_singular_values_of_every_size_are_found(step: float) -> None:
    """Values that decrease by ``step``: squaring halves the digits that float64 resolves."""
    a, b = source(12, 0)
    a, b = (torch.linalg.qr(x.double())[0] for x in (a.mT, b))
    sources = [((a * step ** torch.arange(12)).mT.float(), b.float())]
    weights = [[1.0]] * 3
    for rank in (1, 3, 8, 11):
        assert_best(merge_stack(stacked(sources, weights, rank)), deltas(sources, weights), rank)


def test_singular_values_are_split_evenly_between_the_factors() -> None:
    sources, weights = [source(3, 0), source(5, 1)], [[1.0, 0.5]] * 3
    merged = merge_stack(stacked(sources, weights, 4))
    values = torch.linalg.svdvals(deltas(sources, weights))[:, :4]
    for lengths in (merged.a.norm(dim=2) ** 2, merged.b.norm(dim=1) ** 2):
        torch.testing.assert_close(lengths, values, rtol=RESOLUTION, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_rounded_to_its_dtype(dtype: torch.dtype) -> None:
    """Factors have errors of u times their entries, and a product of about 2 u times that of magnitudes."""
    sources, weights = [source(3, 0, dtype=dtype), source(5, 1, dtype=dtype)], [[1.0, -0.5]] * 3
    merged = merge_stack(stacked(sources, weights, 6, dtype=dtype))
    assert merged.a.dtype == merged.b.dtype == dtype
    a, b = merged.a.double().abs(), merged.b.double().abs()
    small = HALF_STEP[dtype] * (b.sum(2, keepdim=True) + a.sum(1, keepdim=True))
    slack = 2.02 * UNIT[dtype] * (b @ a) + small
    assert_best(merged, deltas(sources, weights), 6, slack.flatten(1).norm(dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [(3,), (3, 5), (2, 3, 1, 4)], ids=str)
def test_at_full_rank_the_bits_are_those_of_the_plain_concatenation(
    ranks: tuple[int, ...], dtype: torch.dtype
) -> None:
    sources = [source(r, seed, dtype=DTYPES[seed % 3]) for seed, r in enumerate(ranks)]
    awkward = torch.tensor([0.0, -0.0, 1e-40, -1e-45, 6e-8, 60000.0])
    for a, b in sources:
        a[:, 0, :6], b[:, :6, 0] = awkward, awkward
    weights = weights_of(3, len(ranks))
    merged = merge_stack(stacked(sources, weights, sum(ranks), dtype=dtype))
    assert merged.energy is None
    words = torch.int32 if dtype == torch.float32 else torch.int16
    for m in range(3):
        expected = lowrank.concatenate([Factors(a[m], b[m]) for a, b in sources], weights[m], dtype)
        for got, wanted in zip((merged.a[m], merged.b[m]), expected, strict=True):
            assert got.dtype == wanted.dtype
            assert torch.equal(got.view(words), wanted.contiguous().view(words))


def assert_interpolates(merged: MergedStack, x: Source, y: Source, target: torch.Tensor) -> None:
    """The product is the target, up to two roundings of an entry of A to float32 at full rank.

    One is that of the weight, one that of the product; the angle is computed in float64 and adds no error
    that matters.
    """
    assert merged.energy is None
    magnitude = merged.b.abs() @ merged.a.abs()
    assert ((product(merged) - target).abs() <= 2.01 * UNIT[torch.float32] * magnitude).all()
    assert torch.equal(merged.b, torch.cat([x[1], y[1]], dim=2).double())


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_at_full_rank_an_interpolation_has_weights_on_a_alone(t: float) -> None:
    x, y = source(3, 0), source(5, 1)
    weights = [[1.0, 1.0], [0.75, -2.0], [-0.25, 0.5]]
    assert_interpolates(merge_stack(stacked([x, y], weights, 8, t)), x, y, interpolated(x, y, weights, t))


def test_parallel_and_zero_deltas_are_interpolated_on_a_straight_line_beside_curved_ones() -> None:
    """Modules: parallel, antiparallel, zero by a factor, zero by a weight, on the circle."""
    a, b = source(3, 0, 5)
    y_a, y_b = source(3, 1, 5)
    y_a[:2], y_b[:4] = a[:2], b[:4] * torch.tensor([2.0, -0.5, 0.0, 1.0])[:, None, None]
    weights = [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    straight = deltas([(a, b), (y_a, y_b)], [[0.75 * x, 0.25 * y] for x, y in weights])
    curved = interpolated((a, b), (y_a, y_b), weights, 0.25)
    target = torch.cat([straight[:4], curved[4:]])
    assert_interpolates(
        merge_stack(stacked([(a, b), (y_a, y_b)], weights, 6, 0.25)), (a, b), (y_a, y_b), target
    )


@pytest.mark.parametrize("cosine", [0.9990, 0.9999, -0.9990, -0.9999])
def test_the_circle_becomes_a_line_where_the_reference_says(cosine: float) -> None:
    """Rank 1 and the same B: the cosine is that of the rows of A."""
    _, b = source(1, 0)
    rows = torch.linalg.qr(source(2, 1)[0].double().mT)[0].mT
    other = cosine * rows[:, :1] + (1 - cosine**2) ** 0.5 * rows[:, 1:]
    x, y = (rows[:, :1].float(), b), (other.float(), b)
    weights = [[1.0, 1.0]] * 3
    assert_interpolates(merge_stack(stacked([x, y], weights, 2, 0.3)), x, y, interpolated(x, y, weights, 0.3))


def assert_zero(merged: MergedStack) -> None:
    assert not product(merged).any()
    assert merged.energy is not None
    assert not merged.energy.any()


def test_sources_that_cancel_give_zero() -> None:
    a, b = source(3, 1)
    order = [2, 0, 1]
    shuffled = a[:, order], b[:, :, order] / 2
    assert_zero(merge_stack(stacked([(a, b), (a, b)], [[1.0, -1.0]] * 3, 3)))
    assert_zero(merge_stack(stacked([(a, b), shuffled], [[0.5, -1.0]] * 3, 3)))


def test_what_does_not_cancel_is_found() -> None:
    (a, b), other = source(3, 1), source(2, 2)
    sources, weights = [(a, b), other, (a, b)], [[1.0, 1.0, -1.0]] * 3
    assert_best(merge_stack(stacked(sources, weights, 3)), deltas([other], [[1.0]] * 3), 3)


@pytest.mark.parametrize("share", [1e-2, 1e-4])
def test_a_small_difference_of_two_sources_is_found(share: float) -> None:
    """The difference is squared, but it is the sources that are rounded."""
    (a, b), (c, d) = source(3, 1), source(3, 2)
    sources, weights = [(a, b), (a + share * c, b + share * d)], [[1.0, -1.0]] * 3
    target = deltas(sources, weights)
    merged = merge_stack(stacked(sources, weights, 5))
    values = torch.linalg.svdvals(target)
    errors = (target - product(merged)).flatten(1).norm(dim=1)
    size = torch.linalg.matrix_norm(deltas(sources[:1], [[1.0]] * 3))
    assert (errors <= values[:, 5:].norm(dim=1) + RESOLUTION * size).all()


@pytest.mark.parametrize("side", ["a", "b", "both", "weight"])
def test_a_zero_source_is_no_obstacle(side: str) -> None:
    x, (a, b) = source(3, 1), source(4, 2)
    if side in ("a", "both"):
        a.zero_()
    if side in ("b", "both"):
        b.zero_()
    weights = [[1.0, 0.0 if side == "weight" else 1.0]] * 3
    for rank in (2, 4):
        assert_best(merge_stack(stacked([x, (a, b)], weights, rank)), deltas([x], [[1.0]] * 3), rank)


def test_zero_rows_and_columns_are_no_obstacle() -> None:
    (a, b), other = source(3, 1), source(4, 2)
    a[:, 1], b[:, :, 2] = 0.0, 0.0
    sources, weights = [(a, b), other], [[1.0, 1.0]] * 3
    for rank in (2, 6):
        assert_best(merge_stack(stacked(sources, weights, rank)), deltas(sources, weights), rank)


@pytest.mark.parametrize("side", ["a", "b", "weight"])
def test_nothing_but_zeros_gives_zero_and_eigh_no_zeros(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuSOLVER has failed on zero matrices (pytorch#94772)."""
    eigh = torch.linalg.eigh

    def checked(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert matrices.flatten(1).any(dim=1).all()
        result: tuple[torch.Tensor, torch.Tensor] = eigh(matrices)
        return result

    monkeypatch.setattr(torch.linalg, "eigh", checked)
    (a, b), other = source(3, 1), source(4, 2)
    if side != "weight":
        (a if side == "a" else b).zero_()
        (other[0] if side == "a" else other[1]).zero_()
    weight = 0.0 if side == "weight" else 1.0
    for slerp in (None, 0.5):
        merged = merge_stack(stacked([(a, b), other], [[weight, weight]] * 3, 4, slerp))
        assert_zero(merged)
        assert not merged.a.isnan().any()
        assert not merged.b.isnan().any()


@pytest.mark.parametrize("rank", [2, 3, 5, 9])
def test_dependent_factors_are_no_obstacle(rank: int) -> None:
    """The same A in two sources, one row of it twice in a third: rank 3 of 10."""
    (a, b), (_, c), (_, d) = source(3, 1), source(3, 2), source(4, 3)
    sources = [(a, b), (a, c), (a[:, [0, 0, 1, 2]], d)]
    weights = [[1.0, -0.5, 2.0]] * 3
    assert_best(merge_stack(stacked(sources, weights, rank)), deltas(sources, weights), rank)


@pytest.mark.parametrize("shape", [(1, 40), (30, 1), (4, 6), (1, 1)])
@pytest.mark.parametrize("rank", [1, 7, 9])
def test_ranks_over_the_dimensions_of_the_delta_are_no_obstacle(shape: tuple[int, int], rank: int) -> None:
    sources = [source(5, 1, shape=shape), source(5, 2, shape=shape)]
    weights = [[1.0, -0.5]] * 3
    assert_best(merge_stack(stacked(sources, weights, rank)), deltas(sources, weights), rank)


def test_views_of_any_strides_are_taken() -> None:
    sources = []
    for seed, rank in enumerate((3, 5)):
        a, b = source(rank, seed, 6)
        sources.append((a.mT.contiguous().mT[::2], b.mT.contiguous().mT[::2]))
    weights = weights_of(3, 2)
    for rank in (4, 8):
        got = merge_stack(stacked(sources, weights, rank))
        plain = merge_stack(stacked([(a.contiguous(), b.contiguous()) for a, b in sources], weights, rank))
        assert got.a.is_contiguous()
        assert got.b.is_contiguous()
        if rank == 8:
            assert torch.equal(got.a, plain.a)
            assert torch.equal(got.b, plain.b)
        else:
            assert_best(got, deltas(sources, weights), rank)


def test_a_module_does_not_feel_the_others_of_its_stack() -> None:
    """Among the other modules are huge, tiny, zero and cancelling ones."""
    x, y = source(3, 1, 5), source(3, 2, 5)
    x[0][0] *= 1e15
    x[1][1] *= 1e-15
    y[0][1] *= 1e-15
    x[0][2], y[1][2] = 0.0, 0.0
    y[0][3], y[1][3] = x[0][3], -x[1][3]
    weights = [[1.0, 1.0]] * 5
    for slerp in (None, 0.25):
        merged = merge_stack(stacked([x, y], weights, 4, slerp))
        assert merged.energy is not None
        alone = MergedStack(merged.a[4:], merged.b[4:], merged.energy[4:])
        last = [(a[4:], b[4:]) for a, b in (x, y)]
        target = deltas(last, weights[:1])
        if slerp is not None:
            target = interpolated(last[0], last[1], weights[:1], slerp)
        assert_best(alone, target, 4)


@pytest.mark.parametrize("workspace", [1, 90_000])
@pytest.mark.parametrize("slerp", [None, 0.3])
def test_a_small_workspace_changes_nothing(
    workspace: int, slerp: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five modules are merged one at a time, or two, two and one."""
    x, y = source(3, 0, 5), source(5, 1, 5)
    weights = [[1.0, -0.5 * (m + 1)] for m in range(5)]
    at_once = merge_stack(stacked([x, y], weights, 8, slerp))
    monkeypatch.setattr(batched, "WORKSPACE", workspace)
    target = deltas([x, y], weights) if slerp is None else interpolated(x, y, weights, slerp)
    assert_best(merge_stack(stacked([x, y], weights, 4, slerp)), target, 4)
    parts = merge_stack(stacked([x, y], weights, 8, slerp))
    torch.testing.assert_close(parts.a, at_once.a, rtol=2 * UNIT[torch.float32], atol=0)
    assert torch.equal(parts.b, at_once.b)


def given(stack: Stack) -> list[torch.Tensor]:
    """The tensors of a stack."""
    return [*stack.a, *stack.b, stack.weights]


CASES: list[Callable[[int], Stack]] = [
    lambda m: stacked([source(3, 0, m), source(5, 1, m)], [[1.0, 0.5]] * m, 4, None, torch.float32),
    lambda m: stacked([source(3, 0, m), source(5, 1, m)], [[1.0, 0.5]] * m, 8, None, torch.float32),
    lambda m: stacked([source(3, 0, m), source(5, 1, m)], [[1.0, 0.5]] * m, 4, 0.3, torch.float32),
    lambda m: stacked([source(3, 0, m), source(5, 1, m)], [[1.0, 0.5]] * m, 8, 0.3, torch.float32),
]


@pytest.mark.parametrize("case", CASES, ids=["cut", "exact", "slerp cut", "slerp exact"])
def test_no_operator_waits_for_the_device_and_none_runs_per_module(case: Callable[[int], Stack]) -> None:
    """Operators whose result's shape or value Python has to wait for, and the number of all operators."""
    names = []
    for modules in (2, 7):
        stack = case(modules)
        with Watch(given(stack)) as watch:
            merge_stack(stack)
        names.append(watch.names)
    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "aten.index", "repeat_interleave", "unique")
    assert names[0] == names[1]
    assert not [name for name in names[0] if any(word in name for word in waiting)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(400, 300), (9, 8)], ids=["wide", "narrow"])
@pytest.mark.parametrize(("rank", "slerp"), [(15, None), (1, 0.3), (16, None), (16, 0.3)])
@pytest.mark.parametrize("at_a_time", [1, 3])
def test_the_workspace_bounds_what_is_taken_beside_the_result(
    rank: int,
    slerp: float | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    at_a_time: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The formula is that of the docstring, and a workspace for many modules is used, too."""
    sources = [source(8, seed, 12, shape, dtype=dtype) for seed in range(2)]
    stack = stacked(sources, [[1.0, 0.5]] * 12, rank, slerp, dtype)
    workspace = at_a_time * 8 * (sum(shape) * (16 + rank) + 16 * 16**2)
    monkeypatch.setattr(batched, "WORKSPACE", workspace)
    with Watch(given(stack)) as watch:
        merged = merge_stack(stack)
    kept = sum(x.nbytes for x in (merged.a, merged.b, merged.energy) if x is not None)
    assert watch.peak - kept <= workspace
    if rank < 16:
        assert watch.peak - kept > workspace / 3


def test_modules_of_one_kind_may_differ_in_weights_and_entries_alone() -> None:
    x, y = source(3, 0, 2), source(3, 1, 2)

    def module(m: int, **changes: Any) -> SumModule:
        factors = Factors(x[0][m], x[1][m], 0.5 + m), Factors(y[0][m], y[1][m])
        plain = SumModule(factors, (0, 2), (1.0, float(m)), 4, None, torch.float32, False)
        return dataclasses.replace(plain, **changes)

    first = module(0)
    assert kind(first) == kind(module(1))
    assert hash(kind(first)) == hash(kind(module(1)))
    f, g = first.sources
    others = [
        module(1, present=(0, 1)),
        module(1, rank=5),
        module(1, mean=Mean("slerp", (0.5, 0.5), 2)),
        module(1, dtype=torch.bfloat16),
        module(1, embedding=True),
        module(1, sources=(f,)),
        module(1, sources=(dataclasses.replace(f, a=f.a.half()), g)),
        module(1, sources=(dataclasses.replace(f, b=f.b.half()), g)),
        module(1, sources=(f, Factors(g.a[:2], g.b[:, :2]))),
        module(1, sources=(Factors(f.a[:, :9], f.b), Factors(g.a[:, :9], g.b))),
        module(1, sources=(Factors(f.a, f.b[:9]), Factors(g.a, g.b[:9]))),
    ]
    assert not [other for other in others if kind(other) == kind(first)]
