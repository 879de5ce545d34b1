"""The CPU backend's threads: what runs on them, how they stop, and how they end with the process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from merged_lora.adapters import Adapter
from merged_lora.backends import load_backend
from merged_lora.cpu_kernels import combine
from merged_lora.cpu_kernels import pool as pool_module
from merged_lora.cpu_kernels.backend import CpuBackend
from merged_lora.cpu_kernels.pool import Pool
from merged_lora.cpu_kernels.room import Room
from merged_lora.factors import Factors
from merged_lora.plan import AgreeingMean, FactorJob, Middle, Rule
from merged_lora.planning import make_plan
from merged_lora.spec import parse

PROGRAM = """
import sys, threading, torch
from merged_lora.cpu_kernels.pool import Pool

if sys.argv[1] == "pool":
    assert set(Pool().each(lambda _: torch.get_num_threads(), range(32))) == {1}
print(torch.get_num_threads())
later = threading.Thread(target=lambda: print(torch.get_num_threads()))
later.start()
later.join()
"""


def threads(beside: str) -> str:
    """How many threads torch uses, in a process that has not used it before, as in a server."""
    command = [sys.executable, "-c", PROGRAM, beside]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_torch_uses_one_thread_in_those_of_the_pool_and_as_many_as_before_in_all_others() -> None:
    assert threads("pool") == threads("nothing") == "2\n2\n"


def test_jobs_prepared_one_at_a_time_give_what_all_at_once_give(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rule = Rule((0.7, -0.4), (Middle(40, 5), Middle(50, 3)), AgreeingMean(False, True))
    jobs = [
        FactorJob(tuple([torch.randn(4, 16 + i, generator=generator) for _ in range(2)]), rule, torch.float32)
        for i in range(5)
    ]
    pool, done = Pool(), list[int]()
    whole = combine.combine(pool, Room(), jobs, done.append)
    monkeypatch.setattr(pool_module, "BATCH_COST", 1)
    parts = combine.combine(pool, Room(), jobs, done.append)
    assert sum(done) == 2 * len(jobs)
    assert all(torch.equal(x, y) for x, y in zip(whole, parts, strict=True))


@pytest.mark.parametrize(
    "spec", ["ties_svd(a, b)", "svd(a, b, rank=2)", "karcher(a, b)", "core_ties(a, b)", "knots(a, b)"]
)
def test_deltas_are_merged_in_inference_mode_as_a_server_does(spec: str) -> None:
    sources = {
        name: Adapter({f"m{i}": Factors(torch.randn(4, 40), torch.randn(24, 4), 1.0) for i in range(64)})
        for name in "ab"
    }
    plan = make_plan(parse(spec), sources)
    backend = load_backend("cpu")
    expected = backend.merge(plan).modules
    with torch.inference_mode():
        merged = backend.merge(plan).modules
    for name, f in expected.items():
        assert torch.equal(merged[name].a, f.a)
        assert torch.equal(merged[name].b, f.b)


class StopError(Exception):
    """Raised in tests to stop what is being done."""


class Slow:
    """A function that takes a moment, and counts its calls that have begun and those that have ended."""

    def __init__(self, wrong: int = -1) -> None:
        self.begun: list[int] = []
        self.ended: list[int] = []
        self._wrong = wrong

    def __call__(self, item: int) -> int:
        self.begun.append(item)
        time.sleep(0.02)
        self.ended.append(item)
        if item == self._wrong:
            raise StopError
        return -item


def test_results_come_in_the_order_of_the_items_whoever_is_first() -> None:
    def late(item: int) -> int:
        time.sleep(0.01 * (item == 0))
        return -item

    done: list[int] = []
    assert Pool(3).each(late, range(20), done.append) == [-i for i in range(20)]
    assert sorted(done) == list(range(20))


@pytest.mark.parametrize("who", ["the function", "who is told of it"])
def test_an_exception_leaves_when_what_was_begun_has_ended_and_nothing_else_begins(who: str) -> None:
    function, done = Slow(5 if who == "the function" else -1), list[int]()

    def finished(item: int) -> None:
        done.append(item)
        if len(done) == 5 and who != "the function":
            raise StopError

    with pytest.raises(StopError):
        Pool(2).each(function, range(100), finished)
    begun = list(function.begun)
    assert sorted(begun) == sorted(function.ended)
    assert 5 <= len(begun) <= 7
    time.sleep(0.1)
    assert function.begun == begun


def test_batches_stop_as_items_do() -> None:
    begun: list[int] = []

    def work(batch: np.ndarray) -> None:
        begun.append(len(batch))

    def progress(_: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        Pool(2).run(np.ones(1000, np.int64), work, progress)
    assert len(begun) <= 2


def test_nothing_begins_while_the_caller_is_told_and_what_it_asks_for_then_comes_first() -> None:
    pool, outer = Pool(2), Slow()
    inner: list[list[int]] = []

    def finished(item: int) -> None:
        if item == 3:
            time.sleep(0.1)  # what was begun ends
            before = list(outer.begun)
            inner.append(pool.each(lambda x: x + 1, range(50)))
            assert outer.begun == before

    assert pool.each(outer, range(8), finished) == [-i for i in range(8)]
    assert inner == [list(range(1, 51))]


@pytest.mark.parametrize("most", [1, 1 << 30])
def test_every_item_is_in_one_batch_and_no_batch_costs_more_than_the_most(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "BATCH_COST", most)
    batches: list[list[int]] = []
    done: list[int] = []
    Pool(2).run(np.arange(40), lambda batch: batches.append(batch.tolist()), done.append)
    assert sorted(i for batch in batches for i in batch) == list(range(40))
    assert sum(done) == 40
    assert len(batches) == (40 if most == 1 else 2 * pool_module.BATCHES_PER_CORE)


@pytest.mark.slow
def test_a_confined_backend_merges_on_so_many_threads_of_that_nice_value() -> None:
    program = """
import os, threading, time, torch
from merged_lora.cpu_kernels.backend import CpuBackend

def own(_):
    time.sleep(0.01)
    me = threading.get_native_id()
    return me, os.getpriority(os.PRIO_PROCESS, me), torch.get_num_threads()

before = os.getpriority(os.PRIO_PROCESS, 0)
backend = CpuBackend()
backend.confine(3, 7)
found = set(backend._pool.each(own, range(30)))
assert len(found) == 3, found
assert {x[1:] for x in found} == {(max(7, before), 1)}, found
assert os.getpriority(os.PRIO_PROCESS, 0) == before
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(("threads", "nice"), [(0, 5), (-1, 5), (1, -1), (1, 20)])
def test_impossible_numbers_are_refused(threads: int, nice: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        CpuBackend().confine(threads, nice)


def test_threads_end_with_their_pool() -> None:
    def named() -> set[threading.Thread]:
        return {t for t in threading.enumerate() if t.name.startswith("merged-lora")}

    before = named()
    pool = Pool(2)
    own = named() - before
    assert len(own) == 2
    del pool
    for thread in own:
        thread.join(5)
    assert not own & named()


PATIENCE = 5.0
"""Seconds that a busy machine may add to the end of a process whose merges would go on for ever."""
EXIT = """
import atexit, sys, threading, time, torch

# Registered first and so called last: what Python and torch do after that is none of ours.
atexit.register(lambda: print(time.monotonic() - asked, flush=True))
from merged_lora.backends import load_backend
from merged_lora.bench import cases
from merged_lora.planning import make_plan
from merged_lora.spec import parse

_, spec, daemon = sys.argv
sources = cases.random_sources({"large": (4096, 4096), "small": (512, 1024)}, 2, 16, torch.bfloat16)
plan = make_plan(parse(spec), sources)
backend = load_backend("cpu")
backend.confine(2, 5)
begun = threading.Event()

def merge():
    torch.set_num_threads(2)
    while True:
        backend.merge(plan, lambda _: begun.set())

threading.Thread(target=merge, daemon=daemon == "daemon").start()
begun.wait()
time.sleep(0.2)
asked = time.monotonic()
sys.exit(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize("daemon", ["daemon", "no daemon"])
@pytest.mark.parametrize("spec", ["ties_svd(a, b)", "della_svd(a, b)", "della(a, b)", "knots(a, b)"])
def test_a_process_ends_in_the_middle_of_a_merge(spec: str, daemon: str) -> None:
    command = [sys.executable, "-c", EXIT, spec, daemon]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stdout + done.stderr
    assert float(done.stdout) < pool_module.EXIT_SECONDS + PATIENCE
