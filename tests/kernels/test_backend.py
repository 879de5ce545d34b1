"""What the backend guarantees around its launches: order of streams, memory, and no stale tables."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from agreement.comparing import assert_same_bits, run
from kernels.converting import triton_narrow, triton_widen
from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.backends import Slot
from merged_lora.errors import PlanError
from merged_lora.factors import Factors
from merged_lora.plan import MergePlan
from merged_lora.planning import make_plan
from merged_lora.spec import parse
from merged_lora.triton_kernels import backend as module
from merged_lora.triton_kernels.batched import groups, lowrank
from merged_lora.triton_kernels.factors import launch, writer
from merged_lora.triton_kernels.factors import slots as slots_room
from merged_lora.triton_kernels.packed import pack

SHAPES = {f"m{i}": (24, 40) for i in range(5)}


def fresh() -> module.TritonBackend:
    return module.TritonBackend(module.load().device)


def plan(spec: str, dtype: torch.dtype = torch.float32) -> MergePlan:
    return make_plan(parse(spec), {k: random_adapter(SHAPES, 4, dtype, i) for i, k in enumerate("ab")})


def slots(backend: module.TritonBackend) -> dict[str, Slot]:
    shapes = {name: ((4, columns), (rows, 4)) for name, (rows, columns) in SHAPES.items()}
    return {
        name: Slot(*(torch.full(s, 7.0, device=backend.device) for s in pair))
        for name, pair in shapes.items()
    }


class Stream:
    """A stream that logs its calls."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.log.append(f"the host waits for {self.name}")


@pytest.fixture
def streaming(monkeypatch: pytest.MonkeyPatch) -> tuple[module.TritonBackend, list[str]]:
    """A backend with a stream of its own, and the log of the calls of both streams."""
    log: list[str] = []
    main, own = Stream("main", log), Stream("own", log)

    @contextlib.contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        log.append(f"{stream.name} begins")
        yield
        log.append(f"{stream.name} ends")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    backend = fresh()
    monkeypatch.setattr(backend, "_stream", own)
    return backend, log


def test_a_write_comes_after_what_is_queued_and_before_what_will_be(streaming: Any) -> None:
    backend, log = streaming
    backend.write(plan("linear(a, b)"), slots(backend))
    assert log == ["own waits for main", "own begins", "own ends", "main waits for own"]


@pytest.mark.parametrize("spec", ["linear(a, b)", "svd(a, b)"])
def test_a_merge_is_staged_beside_all_else_and_is_complete_when_anyone_hears_of_it(
    streaming: Any, spec: str
) -> None:
    backend, log = streaming
    backend.stage(plan(spec), torch.float32, lambda count: log.append(f"{count} modules"))
    part = ["own begins", "own ends", "the host waits for own"]
    assert log == [*part, "5 modules", *part]  # the second time, what is reported besides the modules is read


def test_a_merge_is_placed_in_the_current_streams_order_alone(streaming: Any) -> None:
    backend, log = streaming
    staged = backend.stage(plan("svd(a, b)"), torch.float32)
    log.clear()
    backend.place(staged, slots(backend))
    assert log == []


def test_what_fails_leaves_nothing_running_behind(streaming: Any) -> None:
    backend, log = streaming
    full = {k: Adapter({"m": Factors(torch.full((1, 9), 3e38), torch.ones(9, 1))}) for k in "ab"}
    with pytest.raises(PlanError):
        backend.stage(make_plan(parse("linear(a, b)"), full), torch.float32)
    assert log[-1] == "the host waits for own"


def test_one_group_is_free_before_the_next_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[lowrank.MergedStack]] = []
    real = lowrank.merge_stack

    def watched(stack: lowrank.Stack) -> lowrank.MergedStack:
        assert not [merged for merged in alive if merged() is not None]
        merged = real(stack)
        alive.append(weakref.ref(merged))
        return merged

    monkeypatch.setattr(lowrank, "merge_stack", watched)
    monkeypatch.setattr(groups, "RESULTS", 2 * (24 + 40) * 3 * 4)
    backend, svd = fresh(), plan("svd(a, b, rank=3)")
    backend.stage(svd, torch.float32)
    backend.write(svd, slots(backend))
    assert len(alive) == 6  # five modules, two at a time, twice
    assert not [merged for merged in alive if merged() is not None]


@pytest.mark.slow
def test_what_is_reserved_is_lent_for_decompositions_alone() -> None:
    backend = fresh()
    backend.reserve(1 << 20)
    before = backend._spare
    backend.write(plan("ties(a, b)"), slots(backend))
    assert backend._spare is before
    backend.write(plan("svd(a, b)"), slots(backend))
    assert backend._spare is not None
    assert backend._spare is not before


@pytest.mark.slow
def test_a_search_that_fails_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, ties = fresh(), plan("ties(a, b)")
    expected = run(ties, "numpy")

    def failing(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(launch, "find_thresholds", failing)
        with pytest.raises(torch.OutOfMemoryError):
            backend.merge(ties)
    assert_same_bits(backend.merge(ties), expected)


@pytest.mark.slow
def test_thresholds_belong_to_the_modules_they_were_found_for() -> None:
    backend, ties = fresh(), plan("ties(a, b)")
    for name in SHAPES:
        part = replace(ties, modules={name: ties.modules[name]})
        assert_same_bits(backend.merge(part), run(part, "numpy"))


@pytest.mark.parametrize("density", ["0.5", "[0.3, 0.6]"])
def test_sources_of_equal_content_share_thresholds_that_are_still_there_when_they_are_read(
    density: str,
) -> None:
    twins = {name: random_adapter(SHAPES, 8, torch.bfloat16) for name in "ab"}
    ties = make_plan(parse(f"ties(a, 0.5*b, density={density})"), twins)
    assert_same_bits(fresh().merge(ties), run(ties, "numpy"))


@pytest.mark.slow
def test_the_newest_thresholds_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "KEPT_THRESHOLDS", 3)
    backend = fresh()
    adapters = {k: random_adapter(SHAPES, 4, torch.bfloat16, i) for i, k in enumerate("ab")}
    for density in np.linspace(0.1, 0.9, 5):
        trimmed = make_plan(parse(f"ties(a, b, density={density:.2f})"), adapters)
        assert_same_bits(backend.merge(trimmed), run(trimmed, "numpy"))
    (first, _) = backend.load_sources(trimmed)
    assert len(first.thresholds) == 3


def reserving(adapters: int) -> module.TritonBackend:
    """A backend with room for that many adapters of SHAPES."""
    backend = fresh()
    backend.reserve(adapters * int(pack(random_adapter(SHAPES, 4), backend.device).host.numel()))
    return backend


def assert_writes(backend: module.TritonBackend, merge: MergePlan, written: dict[str, Slot]) -> None:
    """Slots full of NaN hold the merge after a write."""
    for slot in written.values():
        slot.a.fill_(torch.nan)
        slot.b.fill_(torch.nan)
    backend.write(merge, written)
    expected = run(merge, "numpy").modules
    for name, slot in written.items():
        assert torch.equal(slot.a.cpu(), expected[name].a), name
        assert torch.equal(slot.b.cpu(), expected[name].b), name


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The log of calls of functions that make tables and that upload them."""
    calls: list[str] = []

    def noting(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    noting(slots_room, "target_rows")
    noting(writer, "source_addresses")
    noting(launch, "upload")
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["linear(a, b)", "ties(a, b)", "dare_ties(a, b, seed=3)"])
def test_a_write_that_is_repeated_makes_and_uploads_no_tables(spec: str, built: list[str]) -> None:
    backend, merge = reserving(2), plan(spec)
    written = slots(backend)
    (empty,) = [written.pop("m4")]
    backend.write(merge, written, [empty])
    assert built
    built.clear()
    for tensor in (empty.a, empty.b):
        tensor.fill_(torch.nan)
    backend.write(merge, dict(written), (empty,))
    assert built == []
    assert not empty.a.any()
    assert not empty.b.any()
    assert_writes(backend, merge, written)


def test_sources_that_lie_elsewhere_are_read_there() -> None:
    backend = reserving(2)
    adapters = {k: random_adapter(SHAPES, 4, seed=i) for i, k in enumerate("abcd")}
    merge = make_plan(parse("linear(a, 0.25*b)"), adapters)
    written = slots(backend)
    assert_writes(backend, merge, written)
    (first, _) = backend.load_sources(merge)
    backend.load_sources(make_plan(parse("linear(c, d)"), adapters))
    backend.load_sources(make_plan(parse("sum(b)"), adapters))  # comes to lie where a lay
    assert_writes(backend, merge, written)
    assert backend.load_sources(merge)[0].start != first.start


@pytest.mark.slow
def test_thresholds_that_were_forgotten_are_found_and_read_where_they_are_now(built: list[str]) -> None:
    backend, merge = reserving(2), plan("ties(a, b, density=0.4)")
    written = slots(backend)
    assert_writes(backend, merge, written)
    for resident in backend.load_sources(merge):
        (thresholds,) = resident.thresholds.values()
        thresholds.fill_(launch.KEEP_NONE[0])  # wrong from now on, if they are still read
        resident.thresholds.clear()
    built.clear()
    assert_writes(backend, merge, written)
    assert "upload" in built


@pytest.mark.slow
def test_other_slots_and_slots_that_have_moved_are_written_where_they_are() -> None:
    backend, merge = reserving(2), plan("ties(a, b)")
    first, second = slots(backend), slots(backend)
    for _ in range(2):
        assert_writes(backend, merge, first)
        assert_writes(backend, merge, second)
    before = first["m0"].a
    old = before.detach()
    before.data = torch.full_like(before, 7.0)
    old.fill_(3.0)
    assert_writes(backend, merge, first)
    assert bool((old == 3.0).all())


@pytest.mark.slow
def test_slots_of_modules_that_a_merge_lacks_are_written_before_those_that_it_has() -> None:
    backend, merge = fresh(), plan("ties(a, b, density=0.4)")
    written = slots(backend)
    backend.write(merge, {}, [Slot(torch.ones(8, 8), torch.ones(8, 8))])
    assert_writes(backend, merge, written)


def test_a_slot_for_another_module_is_written_with_that_one() -> None:
    backend, merge = reserving(2), plan("linear(a, b)")
    written = slots(backend)
    assert_writes(backend, merge, written)
    assert_writes(backend, merge, dict(zip(written, reversed(written.values()), strict=True)))
    assert_writes(backend, merge, {"m1": written["m1"]})


def test_tables_take_no_more_than_their_ring_and_are_made_again_where_others_came(
    monkeypatch: pytest.MonkeyPatch, built: list[str]
) -> None:
    monkeypatch.setattr(writer, "TABLES", 2000)  # those of one write take 1.4 kB
    backend = reserving(2)
    ring = backend._writer.reserve()
    first, second = plan("linear(a, 0.5*b)"), plan("linear(a, -0.5*b)")
    written = slots(backend)
    for merge in (first, second, first, second):
        built.clear()
        assert_writes(backend, merge, written)
        assert built
    built.clear()
    assert_writes(backend, second, written)
    assert built == []
    assert backend._writer.reserve() is ring


@pytest.mark.slow
def test_tables_that_the_ring_cannot_hold_are_made_for_every_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "TABLES", 1000)
    backend, merge = reserving(2), plan("ties(a, b)")
    written = slots(backend)
    for _ in range(2):
        assert_writes(backend, merge, written)


@pytest.mark.slow
def test_nothing_of_a_plan_is_kept_when_it_is_gone() -> None:
    backend, merge = reserving(2), plan("ties(a, b)")
    written = slots(backend)
    backend.write(merge, written)
    gone = weakref.ref(merge), weakref.ref(written["m0"])
    del merge, written
    assert [ref() for ref in gone] == [None, None]


@pytest.mark.slow
def test_slots_that_are_gone_are_not_held_by_tables() -> None:
    backend, merge = reserving(2), plan("ties(a, b)")
    written = slots(backend)
    backend.write(merge, written)
    gone = weakref.ref(written["m0"]), weakref.ref(written["m0"].a)
    del written
    assert [ref() for ref in gone] == [None, None]


@pytest.mark.slow
def test_evicted_sources_are_not_held_by_tables() -> None:
    backend, merge = reserving(2), plan("ties(a, b)")
    backend.write(merge, slots(backend))
    gone = [weakref.ref(resident) for resident in backend.load_sources(merge)]
    backend.reserve(1 << 20)
    assert [ref() for ref in gone] == [None, None]


@pytest.mark.parametrize("spec", ["ties(a, b)", "svd(a, b)"])
def test_compiling_writes_nothing(spec: str) -> None:
    backend = fresh()
    written = slots(backend)
    names = list(written)
    staged = backend.stage(plan(spec), torch.float32)
    backend.compile(staged, {name: written[name] for name in names[1:]}, [written[names[0]]])
    assert all(bool((t == 7.0).all()) for slot in written.values() for t in (slot.a, slot.b))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_nan_stays_one_when_it_is_rounded(dtype: str) -> None:
    # As NVIDIA makes it, as x86 does, the usual one and the largest negative one.
    words = np.array([0x7FFFFFFF, 0xFFC00000, 0x7FC00000, 0xFFFFFFFF], np.uint32)
    assert np.isnan(triton_widen(triton_narrow(words.view(np.float32), dtype), dtype)).all()
