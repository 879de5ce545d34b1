"""The CPU backend's threads, and jobs that it prepares some at a time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from merged_lora.adapters import Adapter
from merged_lora.backends import load_backend
from merged_lora.cpu_kernels import combine
from merged_lora.cpu_kernels.pool import Pool
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
    whole = combine.combine(pool, jobs, done.append)
    monkeypatch.setattr(combine, "COPY_BYTES", 1)
    parts = combine.combine(pool, jobs, done.append)
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
