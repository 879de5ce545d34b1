"""Merges on a GPU: device time beside a copy of the same bytes, whole calls beside PEFT's on the same GPU."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import cast

import torch

from merged_lora.backends import SlotBackend, load_backend
from merged_lora.errors import BackendError
from merged_lora.factors import Factors
from merged_lora.plan import MergePlan

from . import cases, peers
from .device import Copies, CudaTimer, Timer, copy_speed
from .device_agreement import groups
from .pool import DisagreementError, Merges, Pool, one_of_each
from .timing import Aim, ratio, shown

Turn = Callable[[int], object]
"""Something to be timed, for the set of that number."""

DENSITY = 0.5
TRIMMED = f", density={DENSITY}"
OPTIONS = {
    "linear": "",
    "magnitude_prune": TRIMMED,
    "ties": TRIMMED,
    "dare_linear": TRIMMED,
    "dare_ties": TRIMMED,
}
USUAL = ("linear", "ties", "dare_ties")

AIMED = 4
"""The number of sources that the aims are for, in bfloat16 and into slots of the sources' rank."""
COPY_AIMS = {"linear": 1.25, "ties": 1.5, "ties, cold": 3.0, "dare_ties": 1.6}
"""Times the copy of the same bytes, at most."""
ENTRY_AIMS = {"core_linear": 50.0, "core_ties": 50.0, "knots": None, "ties_svd": 1000.0}
"""Milliseconds for merges of entries of all modules of 32 layers, at most."""
SVD_AIM = 30.0
"""Milliseconds for the svd to the sources' rank of all modules of 32 layers, at most."""
PEFT_AIMS = {"ties": 100.0, "svd": 1000.0}
"""Times faster than PEFT, at least."""


@dataclass(frozen=True)
class Work:
    """What is measured, and how often.

    counts: of sources.  sets: of sources and slots taken in turn, at most.  row_seconds: after which a row
    gets no further round.  svd_seconds: that PEFT's SVDs may take.  large: entries of a tensor that is
    trimmed in spans.  copied: bytes for the copy speed.  everything: more than what has an aim.
    """

    shapes: cases.Shapes
    rank: int = 16
    counts: tuple[int, ...] = (AIMED, 2, 8, 16)
    sets: int = 4
    rounds: int = 9
    row_seconds: float = 5.0
    peft_rounds: int = 3
    svd_seconds: float = 90.0
    large: int = 1 << 22
    copied: int = 2 << 30
    everything: bool = True


def work(quick: bool, layers: int) -> Work:
    """What the command measures."""
    shapes = cases.llama3_8b(layers)
    if quick:
        return Work(
            shapes, counts=(AIMED,), sets=2, rounds=5, peft_rounds=1, svd_seconds=0.0, everything=False
        )
    return Work(shapes)


@dataclass
class Row:
    """A case and every time of it.

    bytes: of all sources and of all that is written.  slot_rank: None where nothing is written.
    seconds: by what was timed: ``copy``, ``kernels``, ``write`` (by device events), ``call`` and ``queued``
    (by the host's clock, until the device has finished and until the call returns), ``peft``.
    gapless: the device never waited for the host while ``copy``, ``kernels`` and ``write`` were timed.
    """

    case: str
    spec: str
    dtype: str
    sources: int
    slot_rank: int | None
    bytes: int
    gapless: bool = True
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        """Keep a time."""
        self.seconds.setdefault(name, []).append(seconds)

    def times_copy(self, name: str) -> float:
        """How many times the copy's time, by medians."""
        return ratio(self.seconds[name], self.seconds["copy"])

    def line(self) -> str:
        """The row of the table."""
        cells = {name: shown(seconds, 1e6, 0) for name, seconds in self.seconds.items()}
        times = {name: f"{self.times_copy(name):.2f}" for name in ("kernels", "write") if name in cells}
        fastest = self.seconds.get("kernels") or self.seconds.get("write")
        speed = f"{self.bytes / statistics.median(fastest) / 1e9:.0f}" if fastest else ""
        return (
            f"  {self.case:26} {self.sources or '':>2} {self.slot_rank or '':>5} {self.bytes / 1e6:>5.0f}  "
            f"{cells.get('copy', ''):17} {cells.get('kernels', ''):17} {times.get('kernels', ''):>6} "
            f"{speed:>5}  {cells.get('write', ''):20} {times.get('write', ''):>6}"
            f"{' ' if self.gapless else '*'} {cells.get('call', '')}"
        )


HEADER = (
    f"  {'case':26} {'N':>2} {'slots':>5} {'MB':>5}  {'copy':17} {'kernels':17} {'x copy':>6} {'GB/s':>5}  "
    f"{'write':20} {'x copy':>6}  call"
)


def run(work: Work, file: Path | None, agreement_only: bool = False, timer: Timer | None = None) -> int:
    """Check, measure and print; the exit code, 1 where something disagrees.

    file: gets every measured time as JSON.  timer: of the device, made where none is given.
    Raises BackendError where there is no device.
    """
    backend = cast(SlotBackend, load_backend("triton"))
    if timer is None and not agreement_only:
        if backend.device.type != "cuda":
            raise BackendError("there is no GPU to time; --agreement-only runs under the interpreter too")
        timer = CudaTimer(backend.device)
    checks = _check(backend)
    if checks is None:
        print("not timed: what disagrees must be mended first")
        return 1
    if timer is None:
        return 0
    bench = Bench(work, timer)
    try:
        bench.measure()
    except DisagreementError as error:
        print(f"WRONG {error}\nnot timed any further: what disagrees must be mended first")
        return 1
    if file is not None:
        file.write_text(json.dumps(bench.report() | {"checks": checks}, indent=1) + "\n")
        print(f"\nwritten: {file}")
    return 0


def _check(backend: SlotBackend) -> int | None:
    """The number of checks; None where one of them failed."""
    print(f"agreement, on {backend.device}", flush=True)
    total, failed = 0, False
    for about, checks in groups(backend):
        found = list(checks)
        wrong = [(what, text) for what, text in found if text]
        print(f"  {'WRONG' if wrong else 'ok':6}{len(found):>3}  {about}", flush=True)
        for what, text in wrong:
            print(f"           {what}: {text}", flush=True)
        total, failed = total + len(found), failed or bool(wrong)
    return None if failed else total


class Bench:
    """Everything that is timed, in order; rows and aims are printed as they come, and kept."""

    def __init__(self, work: Work, timer: Timer) -> None:
        self.work = work
        self.rows: list[Row] = []
        self.aims: list[Aim] = []
        self.left_out: list[str] = []
        self._timer = timer
        self._device = timer.device
        self._facts = timer.facts()
        self._copy_speed = copy_speed(timer, work.copied, work.rounds)

    def report(self) -> dict[str, object]:
        """Everything, ready for JSON."""
        return {
            "date": date.today().isoformat(),
            "machine": self._facts,
            "copy_bytes_per_second": self._copy_speed,
            "modules": len(self.work.shapes),
            "density": DENSITY,
            "work": {name: value for name, value in asdict(self.work).items() if name != "shapes"},
            "rows": [asdict(row) for row in self.rows],
            "aims": [asdict(aim) | {"met": aim.met} for aim in self.aims],
            "left_out": self.left_out,
        }

    def measure(self) -> None:
        """Time everything.  Raises DisagreementError at the first result that is wrong."""
        work = self.work
        print("\nmachine")
        for name, value in (self._facts | {"copy GB/s": round(self._copy_speed / 1e9)}).items():
            print(f"  {name:16}{value}")
        print(f"\n{len(work.shapes)} modules, rank {work.rank}, density {DENSITY}; microseconds")
        print(f"median (fastest-slowest); *: the device waited for the host\n{HEADER}\n  bfloat16")
        pool = self._pool(torch.bfloat16, max(2 * AIMED, *work.counts))
        for count in work.counts:
            every = work.everything and count == AIMED
            self._factor_rows(pool, tuple(OPTIONS) if every else USUAL, count, work.rank)
        if work.everything:
            self._factor_rows(pool, USUAL, AIMED, 4 * work.rank)
        self._delta_rows(pool)
        self._entry_rows(pool)
        self._eigh_rows()
        self._peft_rows(pool)
        self._first_use_rows(pool)
        del pool
        if work.everything:
            print("  float32")
            self._factor_rows(self._pool(torch.float32, 2 * AIMED), USUAL, AIMED, work.rank)
            print("  bfloat16, one tensor as large as an lm_head's")
            self._large_rows()
        self._svd_rows()
        print("\naims")
        for aim in self.aims:
            print(aim.line())
        for text in self.left_out:
            print(f"  left out: {text}")

    def _pool(self, dtype: torch.dtype, count: int) -> Pool:
        return Pool(self.work.shapes, count, self.work.rank, dtype, self._device)

    def _row(self, case: str, merges: Merges, writes: bool = True) -> Row:
        """A row for the first set, without times."""
        plan, slots = merges.plans[0], list(merges.slots[0].values())
        written = sum(slot.a.nbytes + slot.b.nbytes for slot in slots) if writes else 0
        moved = sum(source.nbytes for source in plan.sources) + written
        dtype = str(slots[0].a.dtype).removeprefix("torch.")
        slot_rank = slots[0].a.shape[0] if writes else None
        return Row(case, str(plan.spec), dtype, len(plan.sources), slot_rank, moved)

    def _time(
        self, row: Row, turns: int, on_device: Mapping[str, Turn], call: Turn | None, held: bool = True
    ) -> None:
        """Fill a row, and print it.

        Each round takes every set in turn, first for the copies, then for each of what is timed on the
        device, then for the whole calls.  The first round is not counted; the last is the one that ends
        after ``row_seconds``.
        """
        begin = time.perf_counter()
        copies = Copies(self._device, row.bytes, turns)
        for i in range(1 + self.work.rounds):
            found: list[tuple[str, float]] = []
            gapless = True
            for timed, hold in (({"copy": copies}, True), (on_device, held)):
                names = [name for name in timed for _ in range(turns)]
                functions = [partial(function, turn) for function in timed.values() for turn in range(turns)]
                if functions:
                    times = self._timer.on_device(functions, hold)
                    found += zip(names, times.seconds, strict=True)
                    gapless = gapless and times.gapless
            for turn in range(turns if call else 0):
                queued, done = self._timer.until_done(partial(cast(Turn, call), turn))
                found += [("queued", queued), ("call", done)]
            if i > 0:
                row.gapless = row.gapless and gapless
                for name, seconds in found:
                    row.add(name, seconds)
                if time.perf_counter() - begin > self.work.row_seconds:
                    break
        self.rows.append(row)
        print(row.line(), flush=True)

    def _factor_rows(self, pool: Pool, strategies: Sequence[str], count: int, slot_rank: int) -> None:
        usual = slot_rank == self.work.rank
        for strategy in strategies:
            merges = pool.merges(strategy, count, OPTIONS[strategy], self.work.sets, slot_rank)
            turns = len(merges)
            merges.prepare()
            merges.verify()
            warm = self._row(strategy, merges)
            self._time(warm, turns, {"kernels": merges.combine, "write": merges.write}, merges.write)
            self._aim_at_copy(warm)
            if strategy != "ties":
                continue
            cold = self._row("ties, cold", merges)
            functions = {"kernels": merges.trim_and_combine, "write": merges.write_cold}
            self._time(cold, turns, functions, merges.write_cold)
            self._aim_at_copy(cold)
            if usual:
                alone = self._row("trim alone", merges, writes=False)
                self._time(alone, turns, {"kernels": merges.trim}, None)
            if usual and count == AIMED:
                self._time(self._row("check of ties", merges, writes=False), turns, {}, merges.check)

    def _aim_at_copy(self, row: Row) -> None:
        if (row.sources, row.dtype, row.slot_rank) == (AIMED, "bfloat16", self.work.rank):
            for name in ("kernels", "write") if row.case in COPY_AIMS else ():
                what = f"{row.case}, {name} over a copy of the same bytes"
                self.aims.append(Aim(what, row.times_copy(name), COPY_AIMS[row.case], at_most=True))

    def _delta_rows(self, pool: Pool) -> None:
        """Merges that decompose matrices; the host waits for the device after each decomposition."""
        rank = self.work.rank
        to_rank = f", rank={rank}"
        for case, strategy, count, options, limit, slot_rank in (
            ("svd", "svd", AIMED, to_rank, None, rank),
            ("svd", "svd", 2, to_rank, None, rank),
            ("slerp, rank cut", "slerp", 2, ", t=0.5", rank, rank),
            ("sum, exact", "sum", AIMED, "", None, AIMED * rank),
        ):
            merges = pool.merges(strategy, count, options, 2, slot_rank, limit)
            merges.verify()
            row = self._row(case, merges)
            self._time(row, len(merges), {"write": merges.write}, merges.write, held=False)
            if (case, count) == ("svd", AIMED):
                what = f"svd of {count} sources, {len(self.work.shapes)} modules, whole call, milliseconds"
                self.aims.append(Aim(what, 1e3 * statistics.median(row.seconds["call"]), SVD_AIM, True))

    def _entry_rows(self, pool: Pool) -> None:
        """Merges of entries of deltas, or of their coordinates."""
        for strategy, aim in ENTRY_AIMS.items():
            slot_rank = self.work.rank * (AIMED if strategy == "knots" else 1)
            merges = pool.merges(strategy, AIMED, "", 2, slot_rank, slot_rank)
            merges.verify()
            row = self._row(strategy, merges)
            self._time(row, len(merges), {"write": merges.write}, merges.write, held=False)
            if aim is not None:
                what = f"{strategy} of {AIMED} sources, {len(self.work.shapes)} modules, call, milliseconds"
                self.aims.append(Aim(what, 1e3 * statistics.median(row.seconds["call"]), aim, True))

    def _eigh_rows(self) -> None:
        """What torch's batched decomposition takes of that: an svd needs two, of the sum of all ranks."""
        for n in (AIMED * self.work.rank, 2 * self.work.rank):
            x = torch.randn(len(self.work.shapes), n, 2 * n, dtype=torch.float64, device=self._device)
            decompose = partial(_decompose, x @ x.mT)
            row = Row(f"one eigh of {n} x {n}", "", "float64", 0, None, 2 * len(x) * n * n * 8)
            self._time(row, 1, {"kernels": decompose}, decompose, held=False)

    def _peft_rows(self, pool: Pool) -> None:
        """Whole calls of all modules beside PEFT's, in turn.  PEFT trims in every call, so ours must too."""
        for strategy in USUAL if self.work.everything else ("ties",):
            merges = pool.merges(strategy, AIMED, OPTIONS[strategy], 1)
            merges.prepare()
            there = [_on_device(source.modules, self._device) for source in merges.plans[0].sources]
            ours = partial(merges.write_cold, 0)
            theirs = partial(_peft_merge, merges.plans[0], there, DENSITY if OPTIONS[strategy] else None)
            row = self._row(f"{strategy} beside PEFT", merges)
            for i in range(1 + self.work.peft_rounds):
                times = {"peft": self._timer.until_done(theirs)[1], "call": self._timer.until_done(ours)[1]}
                for name, seconds in times.items() if i > 0 else ():
                    row.add(name, seconds)
            self.rows.append(row)
            faster = ratio(row.seconds["peft"], row.seconds["call"])
            call, peft = (shown(row.seconds[name], 1e6, 0) for name in ("call", "peft"))
            print(
                f"  {row.case:26} {AIMED:>2}  ours {call}, cold; PEFT {peft}: {faster:.0f} times", flush=True
            )
            if strategy in PEFT_AIMS:
                what = f"{strategy} of {AIMED} sources, cold, whole call, times PEFT's speed"
                self.aims.append(Aim(what, faster, PEFT_AIMS[strategy], at_most=False))

    def _first_use_rows(self, pool: Pool) -> None:
        """Sources in page-locked memory: each merge uploads its own, which evicts those of the last."""
        merges = pool.merges("ties", AIMED, OPTIONS["ties"], 2)
        pool.reserve(AIMED)
        for case, writes, functions, call in (
            ("upload alone", False, {"kernels": merges.upload}, None),
            ("ties, with upload", True, {"write": merges.write}, merges.write),
            ("check, with upload", False, {}, merges.check),
        ):
            self._time(self._row(case, merges, writes), len(merges), functions, call)

    def _large_rows(self) -> None:
        """Trims of one tensor of so many entries that it is cut into spans."""
        shapes = {"lm_head": (self.work.large // self.work.rank, self.work.rank)}
        pool = Pool(shapes, 16, self.work.rank, torch.bfloat16, self._device)
        merges = pool.merges("magnitude_prune", 1, TRIMMED, 16)
        merges.prepare()
        merges.verify()
        row = self._row("trim alone", merges, writes=False)
        self._time(row, len(merges), {"kernels": merges.trim}, None)

    def _svd_rows(self) -> None:
        """One module of each shape, two sources in float32 as torch has no SVD of bfloat16; PEFT once."""
        rank, shapes = self.work.rank, self.work.shapes
        print(f"\nsvd of 2 sources to rank {rank}, float32, one module of each shape; milliseconds")
        print(f"  {'module':34} {'shape':14} {'call':22} {'PEFT':>10} {'ratio':>8}")
        torch.linalg.svd(torch.randn(64, 64, device=self._device))  # makes what the first call makes
        left, pace = self.work.svd_seconds, 0.0
        for name in sorted(one_of_each(shapes), key=lambda name: peers.svd_work(shapes[name])):
            operations = peers.svd_work(shapes[name])
            if pace > 0 and pace * operations > left:
                self.left_out.append(f"PEFT's svd of {name}, which should take {pace * operations:.0f} s")
                continue
            pool = Pool({name: shapes[name]}, 2, rank, torch.float32, self._device)
            merges = pool.merges("svd", 2, f", rank={rank}", 1)
            merges.verify()
            row = self._row(f"svd beside PEFT, {name}", merges)
            for _ in range(self.work.rounds):
                row.add("call", self._timer.until_done(partial(merges.write, 0))[1])
            pair = {
                key: _on_device(source.modules, self._device)[name] for key, source in pool.sources.items()
            }
            row.add("peft", self._timer.until_done(partial(peers.merge_svd, pair, [1.0, 1.0], rank))[1])
            self.rows.append(row)
            theirs = row.seconds["peft"]
            left, pace = left - theirs[0], theirs[0] / operations
            faster = ratio(theirs, row.seconds["call"])
            shape, call = "x".join(map(str, shapes[name])), shown(row.seconds["call"], digits=2)
            print(f"  {name:34} {shape:14} {call:22} {shown(theirs):>10} {faster:>8.0f}", flush=True)
            self.aims.append(Aim(f"svd of {name}, times PEFT's speed", faster, PEFT_AIMS["svd"], False))


def _on_device(modules: Mapping[str, Factors], device: torch.device) -> dict[str, Factors]:
    return {name: Factors(f.a.to(device), f.b.to(device), f.scaling) for name, f in modules.items()}


def _decompose(gram: torch.Tensor, turn: int) -> None:
    torch.linalg.eigh(gram)


def _peft_merge(plan: MergePlan, there: Sequence[Mapping[str, Factors]], density: float | None) -> None:
    for module in plan.modules:
        layer = {name: factors[module] for name, factors in zip(plan.spec.names, there, strict=True)}
        peers.merge_factors(plan.spec.strategy, layer, plan.spec.weights(), density)
