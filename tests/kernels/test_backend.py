"""What the backend promises around its launches: order of streams, memory, and nothing false that is kept."""

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
from merged_lora.triton_kernels import delta, groups, launch

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
    """Writes down what it is told."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def wait_stream(self, other: Stream) -> None:
        self.said.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.said.append(f"the host waits for {self.name}")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> tuple[module.TritonBackend, list[str]]:
    """A backend with a stream of its own, and what the streams were told."""
    told: list[str] = []
    main, own = Stream("main", told), Stream("own", told)

    @contextlib.contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        told.append(f"{stream.name} begins")
        yield
        told.append(f"{stream.name} ends")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    backend = fresh()
    monkeypatch.setattr(backend, "_stream", own)
    return backend, told


def test_a_write_comes_after_what_is_queued_and_before_what_will_be(said: Any) -> None:
    backend, told = said
    backend.write(plan("linear(a, b)"), slots(backend))
    assert told == ["own waits for main", "own begins", "own ends", "main waits for own"]


def test_a_check_waits_for_nothing_and_the_host_for_it(said: Any) -> None:
    backend, told = said
    backend.check(plan("linear(a, b)"))
    assert told == ["own begins", "own ends", "the host waits for own"]


def test_what_fails_leaves_nothing_running_behind(said: Any) -> None:
    backend, told = said
    full = {k: Adapter({"m": Factors(torch.full((1, 9), 3e38), torch.ones(9, 1))}) for k in "ab"}
    with pytest.raises(PlanError):
        backend.check(make_plan(parse("linear(a, b)"), full))
    assert told[-1] == "the host waits for own"


def test_one_group_is_free_before_the_next_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[delta.MergedStack]] = []
    real = delta.merge_stack

    def watched(stack: delta.Stack) -> delta.MergedStack:
        assert not [merged for merged in alive if merged() is not None]
        merged = real(stack)
        alive.append(weakref.ref(merged))
        return merged

    monkeypatch.setattr(delta, "merge_stack", watched)
    monkeypatch.setattr(groups, "RESULTS", 2 * (24 + 40) * 3 * 4)
    backend, svd = fresh(), plan("svd(a, b, rank=3)")
    backend.check(svd)
    backend.write(svd, slots(backend))
    assert len(alive) == 6  # five modules, two at a time, twice
    assert not [merged for merged in alive if merged() is not None]


def test_what_is_reserved_is_lent_for_decompositions_alone() -> None:
    backend = fresh()
    backend.reserve(1 << 20)
    before = backend._spare
    backend.write(plan("ties(a, b)"), slots(backend))
    assert backend._spare is before
    backend.write(plan("svd(a, b)"), slots(backend))
    assert backend._spare is not None
    assert backend._spare is not before


def test_a_search_that_fails_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, ties = fresh(), plan("ties(a, b)")
    expected = run(ties, "numpy")

    def failing(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(launch, "find_thresholds", failing)
        with pytest.raises(torch.OutOfMemoryError):
            backend.merge(ties, lambda _: None)
    assert_same_bits(backend.merge(ties, lambda _: None), expected)


def test_thresholds_belong_to_the_modules_they_were_found_for() -> None:
    backend, ties = fresh(), plan("ties(a, b)")
    for name in SHAPES:
        one = replace(ties, modules={name: ties.modules[name]})
        assert_same_bits(backend.merge(one, lambda _: None), run(one, "numpy"))


def test_the_newest_thresholds_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "KEPT_THRESHOLDS", 3)
    backend = fresh()
    adapters = {k: random_adapter(SHAPES, 4, torch.bfloat16, i) for i, k in enumerate("ab")}
    for density in np.linspace(0.1, 0.9, 5):
        trimmed = make_plan(parse(f"ties(a, b, density={density:.2f})"), adapters)
        assert_same_bits(backend.merge(trimmed, lambda _: None), run(trimmed, "numpy"))
    (first, _) = backend.bring(trimmed)
    assert len(first.thresholds) == 3


@pytest.mark.parametrize("spec", ["ties(a, b)", "svd(a, b)"])
def test_compiling_writes_nothing(spec: str) -> None:
    backend = fresh()
    written = slots(backend)
    names = list(written)
    backend.compile(plan(spec), {name: written[name] for name in names[1:]}, [written[names[0]]])
    assert all(bool((t == 7.0).all()) for slot in written.values() for t in (slot.a, slot.b))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_nan_stays_one_when_it_is_rounded(dtype: str) -> None:
    # As NVIDIA makes it, as x86 does, the usual one and the largest negative one.
    words = np.array([0x7FFFFFFF, 0xFFC00000, 0x7FC00000, 0xFFFFFFFF], np.uint32)
    assert np.isnan(triton_widen(triton_narrow(words.view(np.float32), dtype), dtype)).all()
