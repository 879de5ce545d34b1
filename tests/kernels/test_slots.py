"""Merges in slots, written there or placed: of any strides and ranks, with no trace of earlier content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch

from agreement.comparing import run
from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.backends import Slot, load_backend
from merged_lora.bench.device_agreement import find_wrong_slot
from merged_lora.errors import PlanError
from merged_lora.factors import DTYPES, Factors, bits
from merged_lora.plan import MergePlan
from merged_lora.planning import make_plan
from merged_lora.spec import parse
from merged_lora.triton_kernels import backend as backend_module
from merged_lora.triton_kernels.batched import groups
from merged_lora.triton_kernels.kernels.combine import BLOCK

SHAPES = {"m.wide": (24, 300), "m.tall": (BLOCK + 40, 16), "m.odd": (33, 17)}
RULES = (
    "linear(a, -0.5*b)",
    "ties(a, 0.3*b, density=0.4)",
    "dare_ties(a, b, seed=3)",
    "svd(a, b)",
    "cat(a, b)",
)
WAYS = ("written", "placed")
"""Straight into slots, or staged in host memory and then copied into slots, as a server does."""
EIGHT, FIVE = 8, 5
"""Ranks that are a multiple of eight columns, and not."""


def backend() -> backend_module.TritonBackend:
    loaded = load_backend("triton")
    assert isinstance(loaded, backend_module.TritonBackend)
    return loaded


def fill(way: str, plan: MergePlan, slots: Mapping[str, Slot], empty: Sequence[Slot] = ()) -> None:
    """Fill slots with a merge in one of WAYS."""
    if way == "written":
        backend().write(plan, slots, empty)
    else:
        dtype = next(iter(slots.values())).a.dtype
        backend().place(backend().stage(plan, dtype), slots, empty)


def pair(rank: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Adapter]:
    return {name: random_adapter(SHAPES, rank, dtype, seed) for seed, name in enumerate("ab")}


def slots(rank: int, dtype: torch.dtype, layout: str = "plain") -> dict[str, Slot]:
    """Slots of a rank, full of NaN, as parts of larger tensors."""
    made = {}
    device = backend().device
    for name, (rows, columns) in SHAPES.items():
        if layout == "plain":  # as vLLM's: (slot, 1, rank, in) and (slot, 1, out, rank)
            a = torch.full((3, 1, rank, columns), torch.nan, dtype=dtype, device=device)[1, 0]
            b = torch.full((3, 1, rows, rank), torch.nan, dtype=dtype, device=device)[1, 0]
        elif layout == "strided":
            a = torch.full((rank, columns + 7), torch.nan, dtype=dtype, device=device)[:, 3 : columns + 3]
            b = torch.full((rows, rank + 5), torch.nan, dtype=dtype, device=device)[:, :rank]
        else:
            a = torch.full((columns, rank), torch.nan, dtype=dtype, device=device).T
            b = torch.full((rank, rows), torch.nan, dtype=dtype, device=device).T
        made[name] = Slot(a, b)
    return made


def assert_written(slots: Mapping[str, Slot], plan: MergePlan) -> None:
    """Each slot holds the merge that the backend returns, and zeros beyond its rank."""
    assert find_wrong_slot(slots, run(plan, "triton")) is None


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", ["plain", "strided", "transposed"])
@pytest.mark.parametrize("rank", [EIGHT, FIVE])
@pytest.mark.parametrize("spec", RULES)
def test_a_slot_of_larger_rank_holds_the_merge_and_zeros(spec: str, rank: int, layout: str, way: str) -> None:
    plan = make_plan(parse(spec), pair(rank))
    written = slots(16, torch.bfloat16, layout)
    fill(way, plan, written)
    assert_written(written, plan)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rank", [EIGHT, FIVE])
@pytest.mark.parametrize("spec", RULES[:4])
def test_a_slot_of_the_same_rank_holds_the_merge(spec: str, rank: int, way: str) -> None:
    plan = make_plan(parse(spec), pair(rank))
    written = slots(rank, torch.bfloat16)
    fill(way, plan, written)
    assert_written(written, plan)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spec", ["ties(a, 0.3*b)", "svd(a, 0.3*b)"])
@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_is_rounded_to_the_plans_dtype_before_the_slots(
    dtype: torch.dtype, target: torch.dtype, spec: str, way: str
) -> None:
    plan = make_plan(parse(spec), pair(EIGHT, dtype))
    written = slots(16, target)
    fill(way, plan, written)
    assert_written(written, plan)


@pytest.mark.parametrize("way", WAYS)
def test_empty_slots_become_zero(way: str) -> None:
    less = {name: Adapter({"m.wide": a.modules["m.wide"]}) for name, a in pair(EIGHT).items()}
    plan = make_plan(parse("ties(a, b)"), less)
    written = slots(16, torch.float32)
    fill(way, plan, {"m.wide": written["m.wide"]}, [written["m.tall"], written["m.odd"]])
    for name in ("m.tall", "m.odd"):
        assert not written[name].a.any()
        assert not written[name].b.any()
    assert_written({"m.wide": written["m.wide"]}, plan)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spec", RULES)
def test_only_the_slots_that_are_given_are_written(spec: str, way: str) -> None:
    plan = make_plan(parse(spec), pair(EIGHT))
    written = slots(16, torch.bfloat16)
    for name in SHAPES:
        fill(way, plan, {name: written[name]})
    assert_written(written, plan)


WINDOWS = {
    # Where the slot of A begins, its shape, and the same for B; the factors are [8, 300] and [24, 8].
    "columns of A": ((0, 152), (16, 148), (0, 0), (24, 16)),
    "odd columns of A": ((0, 151), (16, 149), (0, 0), (24, 16)),
    "rows of B": ((0, 0), (16, 300), (12, 0), (12, 16)),
    "odd rows of B": ((0, 0), (16, 300), (7, 0), (17, 16)),
    "first rows of A and of B": ((0, 0), (4, 300), (0, 0), (12, 16)),
    "last rows of A and of B": ((4, 0), (4, 300), (12, 0), (12, 16)),
    "rows that A has not": ((8, 0), (8, 300), (0, 0), (24, 16)),
    "B as wide as its slot": ((0, 0), (16, 300), (8, 0), (8, 8)),
    "corners": ((3, 40), (4, 8), (5, 2), (4, 4)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("spec", RULES)
def test_a_slot_that_takes_a_part_of_the_factors_holds_that_part(spec: str, window: str, way: str) -> None:
    plan = make_plan(parse(spec), pair(EIGHT))
    begin_a, shape_a, begin_b, shape_b = WINDOWS[window]
    device = backend().device
    made = [torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device) for shape in (shape_a, shape_b)]
    slot = Slot(*made, begin_a=begin_a, begin_b=begin_b)
    fill(way, plan, {"m.wide": slot})
    whole = run(plan, "numpy" if "svd" not in spec else "triton").modules["m.wide"]
    for got, factor, (row, column) in ((slot.a, whole.a, begin_a), (slot.b, whole.b, begin_b)):
        expected = torch.zeros_like(got, device="cpu")
        part = factor[row : row + got.shape[0], column : column + got.shape[1]]
        expected[: part.shape[0], : part.shape[1]] = part
        assert torch.equal(bits(got.cpu()), bits(expected))


@pytest.mark.parametrize("way", WAYS)
def test_what_lies_around_a_slot_is_left_alone(way: str) -> None:
    around = torch.full((3, 1, 300, 16), 7.0, device=backend().device)
    plan = make_plan(parse("linear(a, b)"), {k: random_adapter({"m": (300, 40)}, EIGHT) for k in "ab"})
    fill(way, plan, {"m": Slot(torch.zeros(16, 40, device=backend().device), around[1, 0])})
    assert bool((around[[0, 2]] == 7.0).all())
    assert not bool((around[1] == 7.0).any())


def test_modules_in_delta_space_are_merged_in_bounded_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = {
        k: random_adapter({f"m{i}": (24, 40) for i in range(7)}, 4, torch.float32, i)
        for i, k in enumerate("ab")
    }
    spec = parse("svd(a, 0.5*b, rank=3)")
    whole = run(make_plan(spec, adapters), "triton")
    monkeypatch.setattr(groups, "RESULTS", 2 * (24 + 40) * 3 * 4)
    parts = run(make_plan(spec, adapters), "triton")
    for name, f in whole.modules.items():
        assert torch.equal(parts.modules[name].a, f.a)
        assert torch.equal(parts.modules[name].b, f.b)
    assert parts.energy == whole.energy


def test_what_was_reserved_for_intermediates_is_taken_back() -> None:
    own = backend_module.TritonBackend(backend().device)
    own.reserve(1 << 20)
    size = own._spare.numel() if own._spare is not None else 0
    plan = make_plan(parse("svd(a, b)"), pair(EIGHT))
    own.write(plan, slots(16, torch.bfloat16))
    assert own._spare is not None
    assert own._spare.numel() == size
    own.stage(plan, torch.bfloat16)
    assert own._spare is not None
    full = {k: Adapter({"m": Factors(torch.full((1, 9), 3e38), torch.full((9, 1), 3e38))}) for k in "ab"}
    with pytest.raises(PlanError):
        own.stage(make_plan(parse("svd(a, b)"), full), torch.float32)
    assert own._spare is not None


def test_the_last_tie_is_found_where_a_block_begins_in_the_padding() -> None:
    # Rows of 24 in the slot hold 8 entries of the source. The third block begins at row 170, column 16: what
    # it holds begins with entry 171 * 8 = 1368, and of 1440 equal entries the first 1370 are kept.
    assert divmod(2 * BLOCK, 24) == (170, 16)
    equal = Adapter({"m": Factors(torch.full((8, 40), 0.375), torch.full((180, 8), 0.375))})
    plan = make_plan(parse("magnitude_prune(a, density=0.9514)"), {"a": equal})
    device = backend().device
    slot = Slot(torch.empty(24, 40, device=device), torch.empty(180, 24, device=device))
    backend().write(plan, {"m": slot})
    expected = torch.where(torch.arange(1440).view(180, 8) < 1370, 0.375, 0.0)
    assert torch.equal(slot.b[:, :8].cpu(), expected)
