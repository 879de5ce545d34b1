"""A worker of the first day on a machine without a GPU: the interpreter as device, tiny shapes, and faults.

The command line of ``bench.first_day_worker``, and before it a row of FAULTS, ``all`` or ``none``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

if __name__ == "__main__":  # a process that imports it has decided
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from merged_lora.backends import SlotBackend, load_backend
from merged_lora.bench import device_agreement, first_day_worker, gpu
from merged_lora.bench.agreement import Check
from merged_lora.bench.device import Call
from merged_lora.bench.gpu import Bench, Case, Work
from merged_lora.triton_kernels.backend import TritonBackend

SHAPES = {
    "model.layers.0.self_attn.q_proj": (24, 40),
    "model.layers.0.self_attn.k_proj": (16, 40),
    "model.layers.1.self_attn.k_proj": (16, 40),
}
TINY = Work(
    dict(list(SHAPES.items())[:1]),
    rank=4,
    counts=(4, 2),
    sets=1,
    rounds=2,
    row_seconds=0.0,  # one counted round
    peft_rounds=1,
    copied=1 << 16,
)


class HostTimer:
    """Times by the host's clock, on whatever device the backend has."""

    def __init__(self) -> None:
        loaded = load_backend("triton")
        assert isinstance(loaded, SlotBackend)
        self.device = loaded.device

    def on_device(self, functions: Sequence[Call]) -> dict[str, float]:
        seconds = sum(self.until_done(function)[1] for function in functions) / len(functions)
        return {"_host_kernel": seconds / 2, "Memcpy": seconds / 2}

    def until_done(self, function: Call) -> tuple[float, float]:
        begin = time.perf_counter()
        function()
        return (time.perf_counter() - begin,) * 2

    def facts(self) -> dict[str, object]:
        return {"gpu": "none"}


def check(what: str, strategy: str, wrong: str | None = None) -> Check:
    """A check that has been made already."""
    return Check(what, (f"{strategy} bfloat16",), lambda: wrong)


STRATEGIES = ("linear", "ties", "dare_ties", "svd", "core_linear", "core_ties", "knots", "ties_svd")


def groups(backend: TritonBackend) -> Iterator[tuple[str, Iterator[Check]]]:
    """A check for each strategy of the first rows; the one of ``dare_ties`` fails."""
    checks = [check(f"of {s}", s, "it differs" if s == "dare_ties" else None) for s in STRATEGIES]
    yield "made up", iter(checks)


def raise_it() -> None:
    """What a kernel's fault looks like from Python."""
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def die() -> None:
    """What a fault in a library looks like."""
    os.kill(os.getpid(), signal.SIGSEGV)


FAULTS: dict[str, Callable[[], Any]] = {"ties": raise_it, "ties, cold": die, "svd": partial(time.sleep, 600)}
"""What is done instead of measuring a row."""


def instead(case: Case, faulty: str) -> Case:
    """The case, or a fault in its place."""
    if case.name in FAULTS and faulty in ("all", case.name):
        return Case(case.name, case.strategy, case.dtype, FAULTS[case.name])
    return case


def main() -> int:
    """Work off a role's items, those that are named faulty."""
    faulty, *arguments = sys.argv[1:]
    cases = Bench.cases
    names = ("linear", "ties", "dare_ties", "ties, cold", "linear, planned anew", "svd", "core_ties")
    gpu.on_a_gpu = lambda: (cast(TritonBackend, load_backend("triton")), HostTimer())
    gpu.first_day_work = lambda layers: TINY
    device_agreement.groups = groups
    Bench.cases = lambda self: (  # type: ignore[method-assign]
        instead(case, faulty) for case in cases(self) if case.name in names
    )
    torch.set_num_threads(1)
    code: int = first_day_worker.main(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
