"""Memory for the results of the next merge: how much is made ready, and that nobody shares it."""

from __future__ import annotations

import mmap
import resource
from pathlib import Path

import pytest
import torch

from making import random_adapter
from merged_lora.backends import load_backend, no_progress
from merged_lora.cpu_kernels.room import REMEMBERED, Room
from merged_lora.planning import make_plan
from merged_lora.spec import parse

LARGE = 64 << 20
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
single_pages = pytest.mark.skipif(
    HUGE.exists() and "[always]" in HUGE.read_text(), reason="this system touches many pages at once"
)


def faults() -> int:
    """Pages that this process has touched first."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def faults_of(tensor: torch.Tensor) -> int:
    """Pages of a tensor that were not touched yet."""
    before = faults()
    tensor.fill_(1)
    return faults() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_taken_is_a_tensor_like_any_other(dtype: torch.dtype) -> None:
    room = Room()
    for _ in range(2):
        taken = room.take(1000, dtype)
        assert (taken.dtype, taken.shape, taken.untyped_storage().nbytes()) == (
            dtype,
            (1000,),
            1000 * dtype.itemsize,
        )
        taken.fill_(3.0)
        assert bool(taken.eq(3.0).all())
        room.make_ready(no_progress)
    assert room.take(0, dtype).shape == (0,)


@single_pages
def test_memory_that_was_made_ready_is_touched_before_it_is_taken() -> None:
    room = Room()
    room.take(LARGE, torch.uint8)
    room.make_ready(no_progress)
    assert faults_of(room.take(LARGE, torch.uint8)) < LARGE // mmap.PAGESIZE * 0.1
    assert room._ready is None


@single_pages
@pytest.mark.parametrize("wanted", [LARGE // 2, LARGE + LARGE // 2])
def test_ready_memory_fits_smaller_and_larger_results(wanted: int) -> None:
    room = Room()
    room.take(LARGE, torch.uint8)
    room.make_ready(no_progress)
    taken = room.take(wanted, torch.uint8)
    assert taken.untyped_storage().nbytes() == wanted
    untouched = max(0, wanted - LARGE) // mmap.PAGESIZE
    assert untouched * 0.9 <= faults_of(taken) <= untouched * 1.1 + LARGE // mmap.PAGESIZE * 0.1


@single_pages
def test_the_largest_of_the_last_results_decides() -> None:
    room = Room()
    room.take(LARGE, torch.uint8)
    room.take(1, torch.uint8)
    room.make_ready(no_progress)
    assert faults_of(room.take(LARGE, torch.uint8)) < LARGE // mmap.PAGESIZE * 0.1
    for _ in range(REMEMBERED):
        room.take(1, torch.uint8)
    room.make_ready(no_progress)
    assert room._ready is not None
    assert len(room._ready) == 1


def test_what_progress_raises_ends_it_and_the_next_time_begins_anew() -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    room = Room()
    room.make_ready(stop)  # nothing was taken yet
    room.take(LARGE, torch.uint8)
    with pytest.raises(KeyboardInterrupt):
        room.make_ready(stop)
    room.make_ready(no_progress)
    assert faults_of(room.take(LARGE, torch.uint8)) < LARGE // mmap.PAGESIZE * 0.1
    room.make_ready(no_progress)
    room.make_ready(stop)  # enough is ready


@pytest.mark.parametrize("spec", ["linear(a, b)", "sum(a, b)", "ties(a, b)"])
def test_merges_share_no_memory(spec: str) -> None:
    shapes = {"x": (64, 48), "y": (48, 64)}
    dtypes = {"a": torch.float32, "b": torch.bfloat16}
    sources = {n: random_adapter(shapes, 4, dtype, seed) for seed, (n, dtype) in enumerate(dtypes.items())}
    backend = load_backend("cpu")
    plan = make_plan(parse(spec), sources)
    first = backend.merge(plan).modules
    expected = {name: (f.a.clone(), f.b.clone()) for name, f in first.items()}
    for _ in range(3):
        backend.make_room(no_progress)
        again = backend.merge(plan).modules
        for f in again.values():
            f.a.zero_()
    for name, (a, b) in expected.items():
        assert torch.equal(first[name].a, a)
        assert torch.equal(first[name].b, b)
