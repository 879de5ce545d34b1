"""Staged merges: complete in host memory, placed without sources, and unmoved by what is made beside."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch

from agreement.comparing import run
from agreement.test_bits import spec_of
from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.backends import Slot, StagedMerge, no_progress
from merged_lora.bench.device_agreement import find_wrong_slot
from merged_lora.errors import PlanError
from merged_lora.plan import MergePlan
from merged_lora.planning import make_plan
from merged_lora.spec import parse
from merged_lora.strategies import TABLE
from merged_lora.triton_kernels import backend as module
from merged_lora.triton_kernels import placing
from merged_lora.triton_kernels.batched import groups
from merged_lora.triton_kernels.factors import launch
from merged_lora.triton_kernels.factors.slots import Targets, draft_placing
from merged_lora.triton_kernels.kernels import combine as combining
from merged_lora.triton_kernels.packed import pack

SHAPES = {f"m{i}": (24, 40) for i in range(4)} | {"odd": (17, 33)}
MODEL = 'knots(a, b, scope="model")'
"""A merge whose thresholds are found over all modules before any of them is merged."""
PATIENCE = 30.0
"""Seconds after which a thread counts as stuck."""


def adapters(names: str = "ab") -> dict[str, Adapter]:
    return {name: random_adapter(SHAPES, 4, seed=ord(name)) for name in names}


def plan(spec: str, sources: dict[str, Adapter] | None = None) -> MergePlan:
    return make_plan(parse(spec), sources or adapters())


def reserving(sources: int = 2, largest: int | None = 1 << 16) -> module.TritonBackend:
    """A backend with room for so many adapters of SHAPES, and for a merge of so many bytes."""
    made = module.TritonBackend(module.load().device)
    made.reserve(sources * int(pack(adapters()["a"], made.device).host.numel()), "", largest)
    return made


def slots(
    backend: module.TritonBackend, rank: int = 8, dtype: torch.dtype = torch.float32
) -> dict[str, Slot]:
    """Slots full of NaN."""

    def full(*shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=backend.device)

    return {name: Slot(full(rank, columns), full(rows, rank)) for name, (rows, columns) in SHAPES.items()}


def assert_placed(backend: module.TritonBackend, staged: StagedMerge, merge: MergePlan) -> None:
    """What is placed has the bits that the backend returns of the same merge."""
    filled = slots(backend)
    backend.place(staged, filled)
    assert find_wrong_slot(filled, run(merge, "triton")) is None


def in_a_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.parametrize("strategy", TABLE)
def test_what_is_placed_is_what_is_merged_and_what_is_written(strategy: str) -> None:
    limit = 4 if TABLE[strategy].recipe.rank == "fit" else None
    merge = make_plan(spec_of(strategy, {}, 2), adapters(), limit)
    backend, expected = reserving(), run(merge, "triton")
    filled, written = slots(backend), slots(backend)
    backend.place(backend.stage(merge, torch.float32), filled)
    backend.write(merge, written)
    assert find_wrong_slot(filled, expected) is None
    assert find_wrong_slot(written, expected) is None


@pytest.mark.parametrize("spec", ["linear(a, b)", "ties(a, b)", "svd(a, b)"])
def test_a_merge_is_placed_after_its_sources_were_evicted_and_forgotten(spec: str) -> None:
    backend, sources = reserving(), adapters("ab")
    merge = plan(spec, sources)
    expected = run(merge, "triton")
    staged = backend.stage(merge, torch.float32)
    gone = [weakref.ref(x) for x in (merge, *sources.values())]
    del merge
    sources.clear()
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
    backend.stage(plan("sum(c, d)", adapters("cd")), torch.float32)  # takes the memory of the sources
    filled = slots(backend)
    backend.place(staged, filled)
    assert find_wrong_slot(filled, expected) is None


def test_the_next_merge_is_placed_while_the_last_one_is_referred_to_by_nobody() -> None:
    backend, merges = reserving(), [plan("linear(a, b)"), plan("linear(a, -1*b)")]
    for merge in (*merges, *merges):
        assert_placed(backend, backend.stage(merge, torch.float32), merge)


@pytest.mark.parametrize("largest", [1 << 16, None])
def test_merges_of_one_kind_share_the_tables_of_a_slot(
    largest: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []

    def drafting(*given: object) -> object:
        made.append(given)
        return draft_placing(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(placing, "draft_placing", drafting)
    backend = reserving(2, largest)
    first, second = slots(backend), slots(backend)
    other = plan("svd(a, b, rank=3)")
    for merge, filled, count in (
        (plan("linear(a, b)"), first, 1),
        (plan("ties(a, -1*b)"), first, 1),
        (plan("linear(a, b)"), second, 2),  # another slot
        (other, first, 3),  # another rank
        (plan("linear(b, a)"), first, 3),
    ):
        backend.place(backend.stage(merge, torch.float32), filled)
        assert find_wrong_slot(filled, run(merge, "triton")) is None
        assert len(made) == count


def test_tables_are_made_anew_when_the_staging_buffer_has_moved() -> None:
    backend, merge = reserving(2, None), plan("linear(a, b)")
    small = make_plan(parse("linear(a, b)"), {k: random_adapter({"m0": (24, 40)}, 4) for k in "ab"})
    filled = slots(backend)
    staged = backend.stage(small, torch.float32)
    for _ in range(2):
        backend.place(staged, {"m0": filled["m0"]})
        assert find_wrong_slot({"m0": filled["m0"]}, run(small, "triton")) is None
        assert_placed(backend, backend.stage(merge, torch.float32), merge)


def test_the_bytes_of_a_staged_merge_are_those_of_its_tensors_side_by_side() -> None:
    merge = plan("linear(a, b)")
    staged = reserving().stage(merge, torch.bfloat16)
    assert staged.nbytes == sum(-(-2 * 4 * side // 64) * 64 for shape in SHAPES.values() for side in shape)
    assert {f.a.dtype for f in staged.modules.values()} == {torch.bfloat16}
    owned = {t.untyped_storage().data_ptr() for f in staged.modules.values() for t in (f.a, f.b)}
    assert owned == {staged.host.untyped_storage().data_ptr()}
    assert list(staged.modules) == list(merge.modules)


@pytest.mark.parametrize("spec", ["linear(a, b)", "svd(a, b)"])
def test_a_merge_larger_than_any_that_was_announced_is_refused_when_it_is_staged(spec: str) -> None:
    nbytes = reserving().stage(plan(spec), torch.float32).nbytes
    assert_placed(exact := reserving(2, nbytes), exact.stage(plan(spec), torch.float32), plan(spec))
    with pytest.raises(PlanError, match="device memory that are reserved for one"):
        reserving(2, nbytes - 1).stage(plan(spec), torch.float32)


def test_nothing_is_allocated_for_a_merge_that_was_announced() -> None:
    backend = reserving()
    before = backend._placer._staging, backend._results
    merge = plan("svd(a, b)")
    assert_placed(backend, backend.stage(merge, torch.float32), merge)
    assert (backend._placer._staging, backend._results) == before


def test_whole_modules_are_returned_on_the_device() -> None:
    backend, merge = reserving(), plan("svd(a, 0.5*b)")
    staged, expected = backend.stage(merge, torch.float32), run(merge, "triton").modules
    filled = slots(backend)
    odd = filled.pop("odd")
    whole = backend.place(staged, filled, [], ["odd"])
    assert list(whole) == ["odd"]
    assert whole["odd"].a.device == backend.device
    assert torch.equal(whole["odd"].a.cpu(), expected["odd"].a)
    assert torch.equal(whole["odd"].b.cpu(), expected["odd"].b)
    assert bool(odd.a.isnan().all())


class InterruptionError(Exception):
    """Raised by a progress function."""


def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let groups have two modules each."""
    monkeypatch.setattr(groups, "RESULTS", 2 * (24 + 40) * 4 * 4)


@pytest.mark.parametrize(("spec", "counts"), [("linear(a, b)", [5]), ("svd(a, b)", [2, 2, 1])])
def test_progress_is_told_of_every_part(
    spec: str, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_parts(monkeypatch)
    heard: list[int] = []
    reserving().stage(plan(spec), torch.float32, heard.append)
    assert heard == counts


def test_thresholds_of_the_whole_model_are_a_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    merge = plan(MODEL)
    backend = reserving()
    staged = backend.stage(merge, torch.float32, heard.append)
    assert heard[0] == 0
    assert sum(heard) == len(SHAPES)
    assert_placed(backend, staged, merge)


@pytest.mark.parametrize(
    ("spec", "after"), [("linear(a, b)", 1), ("svd(a, b)", 1), ("svd(a, b)", 2), (MODEL, 1), (MODEL, 2)]
)
def test_a_merge_that_is_cancelled_leaves_the_backend_as_it_was(
    spec: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_parts(monkeypatch)
    backend, heard = reserving(), []

    def cancelling(count: int) -> None:
        heard.append(count)
        if len(heard) == after:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        backend.stage(plan(spec), torch.float32, cancelling)
    assert backend._spare is not None
    assert not backend._turn.locked()
    for merge in (plan(spec), plan("svd(a, b)")):
        assert_placed(backend, backend.stage(merge, torch.float32), merge)


def test_a_merge_that_is_interrupted_by_others_comes_out_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # In the interruption another merge takes the memory of the sources and of the results.
    in_parts(monkeypatch)
    backend = reserving()
    others = plan("svd(c, d)", adapters("cd"))
    between: list[StagedMerge] = []

    def interrupting(_: int) -> None:
        between.append(backend.stage(others, torch.float32))

    for spec in ("svd(a, b)", MODEL, "linear(a, b)"):
        between.clear()
        merge = plan(spec)
        assert_placed(backend, backend.stage(merge, torch.float32, interrupting), merge)
        for staged in between:
            assert_placed(backend, staged, others)
    assert backend._spare is not None


def test_a_merge_is_placed_while_another_is_paused_and_while_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_parts(monkeypatch)
    backend, merge, other = reserving(), plan("ties(a, b)"), plan("svd(c, d)", adapters("cd"))
    expected, expected_other = run(merge, "triton"), run(other, "triton")
    staged = backend.stage(merge, torch.float32)
    reached, go_on, placed = threading.Event(), threading.Event(), threading.Event()

    def pausing(*_: object) -> None:
        reached.set()
        assert go_on.wait(PATIENCE)

    made: list[StagedMerge] = []

    def holding(*given: object) -> object:  # here the lock of those who merge is held
        assert backend._turn.locked()
        pausing()
        return groups.merge_group(*given)  # type: ignore[arg-type]

    def place() -> None:
        filled = slots(backend)
        backend.place(staged, filled)
        assert find_wrong_slot(filled, expected) is None
        placed.set()

    def stage(progress: Callable[[int], None]) -> None:
        made.append(backend.stage(other, torch.float32, progress))

    for progress, merging in ((pausing, groups.merge_group), (no_progress, holding)):
        monkeypatch.setattr(module, "merge_group", merging)
        for event in (reached, go_on, placed):
            event.clear()
        making = in_a_thread(lambda progress=progress: stage(progress))  # type: ignore[misc]
        assert reached.wait(PATIENCE)
        assert not made
        in_a_thread(place)
        assert placed.wait(PATIENCE)
        go_on.set()
        making.join(PATIENCE)
        filled = slots(backend)
        backend.place(made.pop(), filled)
        assert find_wrong_slot(filled, expected_other) is None


def test_adapters_are_adopted_while_a_merge_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, merge = reserving(), plan("svd(a, b)")
    reached, go_on = threading.Event(), threading.Event()

    def holding(*given: object) -> object:
        reached.set()
        assert go_on.wait(PATIENCE)
        return groups.merge_group(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "merge_group", holding)
    made: list[StagedMerge] = []
    making = in_a_thread(lambda: made.append(backend.stage(merge, torch.float32)))
    assert reached.wait(PATIENCE)
    adopted: list[Adapter] = []
    in_a_thread(lambda: adopted.append(backend.adopt(adapters("c")["c"]))).join(PATIENCE)
    assert len(adopted) == 1
    go_on.set()
    making.join(PATIENCE)
    monkeypatch.undo()
    assert_placed(backend, made[0], merge)


def empties(filled: Sequence[Slot]) -> list[bool]:
    return [not bool(t.any()) for slot in filled for t in (slot.a, slot.b)]


def test_slots_of_modules_that_a_merge_lacks_are_emptied_and_the_others_filled_in_one_launch() -> None:
    backend = reserving()
    shapes = {name: SHAPES[name] for name in ("m0", "m1")}
    merge = make_plan(parse("ties(a, b)"), {k: random_adapter(shapes, 8, torch.bfloat16) for k in "ab"})
    staged = backend.stage(merge, torch.bfloat16)
    filled = {name: slot for name, slot in slots(backend, 16, torch.bfloat16).items() if name != "odd"}
    rest = [filled.pop("m2"), filled.pop("m3")]
    targets = Targets(filled, rest)
    assert len(draft_placing(staged, targets, 0)) == 1
    backend.place(staged, filled, rest)
    assert find_wrong_slot(filled, run(merge, "triton")) is None
    assert all(empties(rest))


@pytest.mark.parametrize("rank", [8, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_a_merge_is_placed_with_was_compiled_before(
    dtype: torch.dtype, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, launched = set[object](), set[object]()

    def combine(tables: combining.Tables, variant: combining.Variant, programs: int) -> None:
        (launched if programs else compiled).add((variant, tables.sources.shape[1]))

    backend = reserving(8)
    merge = make_plan(parse("ties(a, b)"), {k: random_adapter(SHAPES, rank, seed=ord(k)) for k in "ab"})
    staged = backend.stage(merge, dtype)
    filled = slots(backend, 8, dtype)
    shard = Slot(filled["m0"].a[:, :20], filled["m0"].b, begin_a=(0, 20))
    rest = [filled.pop("m1")]
    monkeypatch.setattr(launch, "combine", combine)
    backend.compile(staged, {**filled, "m0": shard}, rest)
    assert not launched
    backend.place(staged, {**filled, "m0": shard}, rest)
    assert launched == compiled
    assert launched


def test_memory_that_was_reserved_in_inference_mode_serves_outside_of_it() -> None:
    with torch.inference_mode():
        backend = reserving()
    merge = plan("svd(a, b)")
    staged = backend.stage(merge, torch.float32)
    assert_placed(backend, staged, merge)
    with torch.inference_mode():
        assert_placed(backend, staged, merge)
