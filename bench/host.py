"""Time what the host does to fill slots, with the launches left out; this needs no GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch

from merged_lora.planning import make_plan
from merged_lora.triton_kernels.factors import launch
from merged_lora.triton_kernels.placing import Placer

from . import cases, machine
from .device_agreement import USUAL
from .pool import Pool
from .recording import write_report
from .timing import Aim, once, quartiles, spread

RANK = 16
COUNTS = (2, 4)
AIM = 1.0
"""The most milliseconds for a write whose sources and slots have not moved."""


@dataclass(frozen=True)
class Row:
    """Seconds of every timed write of one merge.

    again: the same write, repeated.
    moved: a write whose sources have been evicted and brought back before, which is not timed.
    first: the first write of a merge that has been planned anew.
    placed: placing a merge that was staged, in slots that a merge of the same shapes was placed in before.
    placed_first: the same in slots that none was placed in.
    """

    strategy: str
    sources: int
    again: list[float]
    moved: list[float]
    first: list[float]
    placed: list[float]
    placed_first: list[float]


def run(layers: int, rounds: int, file: Path | None) -> int:
    """Measure, print and return the exit code.

    layers: number of layers of Llama-3-8B, seven modules each.
    file: gets every measured time as JSON.
    """
    torch.set_num_threads(1)  # what torch does with all cores here, a GPU does
    facts = machine.facts("triton")
    machine.show(facts)
    shapes = cases.llama3_8b(layers)
    pool = Pool(shapes, max(COUNTS), RANK, torch.bfloat16, torch.device("cpu"))
    print(f"\n{len(shapes)} modules, rank {RANK}, launches left out; milliseconds, median (quartiles)")
    names = ("again", "sources moved", "first", "placed", "placed first")
    print(f"  {'merge':10} {'N':>2}  " + " ".join(f"{name:22}" for name in names).rstrip())
    rows = []
    for count in COUNTS:
        for strategy in USUAL:
            rows.append(measure(pool, strategy, count, rounds))
            cells = (spread(times, digits=3) for times in _kinds(rows[-1]))
            print("  {:10} {:>2}  {:22} {:22} {:22} {:22} {}".format(strategy, count, *cells), flush=True)
    slowest = max(1e3 * quartiles(row.again)[1] for row in rows)
    aim = Aim(f"host time of a write of {len(shapes)} modules, ms", slowest, AIM)
    print(f"\naims\n{aim.line()}")
    saved = [asdict(row) for row in rows]
    write_report(file, machine=facts, modules=len(shapes), rows=saved, aims=[aim.as_json()])
    return 0


def measure(pool: Pool, strategy: str, count: int, rounds: int) -> Row:
    """The times of one merge, ``rounds`` of each kind."""
    merges = pool.merges(strategy, count, "", 1)
    spec = merges.plans[0].spec

    def evict() -> None:
        pool.reserve(max(COUNTS))
        merges.upload(0)

    def renew() -> None:
        merges.plans = [make_plan(spec, pool.sources)]
        merges.stage(0)

    with mock.patch.object(launch, "combine"), mock.patch.object(launch, "find_thresholds"):
        merges.write(0)
        again = _time(merges.write, lambda: None, rounds)
        moved = _time(merges.write, evict, rounds)
        first = _time(merges.write, renew, rounds)
        with mock.patch.object(Placer, "bring"):  # the copy to the device, which a GPU makes by itself
            placed_first = _time(merges.place, merges.renew_slots, rounds)
            placed = _time(merges.place, renew, rounds)
    return Row(strategy, count, again, moved, first, placed, placed_first)


def _time(call: Callable[[int], object], before: Callable[[], None], rounds: int) -> list[float]:
    """Seconds of calls for the first set, without what is done before each."""
    seconds = []
    for _ in range(rounds):
        before()
        gc.collect()
        seconds.append(once(lambda: call(0)))
    return seconds


def _kinds(row: Row) -> tuple[list[float], ...]:
    return row.again, row.moved, row.first, row.placed, row.placed_first
