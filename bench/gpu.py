"""Time merges on a GPU: device time beside a copy of the same bytes, whole calls beside PEFT's."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch

from merged_lora.backends import load_backend
from merged_lora.errors import BackendError
from merged_lora.factors import Factors
from merged_lora.plan import MergePlan
from merged_lora.triton_kernels.backend import TritonBackend
from merged_lora.triton_kernels.kernels import trim

from . import cases, machine, peers
from .agreement import count_agreed, name_of
from .device import Copies, CudaTimer, Timer, copy_speed
from .device_agreement import USUAL, groups
from .gpu_report import HEADER, Row
from .pool import DENSITY, DisagreementError, Merges, Pool, one_of_each
from .recording import write_report
from .timing import ratio

TRIMMED = ", density={density}"
OPTIONS = {"ties": TRIMMED, "dare_ties": TRIMMED}

AIMED = 4
"""The number of sources that the aims are for, in bfloat16 and into slots of the sources' rank."""
COPY_AIMS = {"linear": 1.25, "ties": 1.5, "ties, cold": 3.0, "dare_ties": 1.6}
"""How many times as long as the copy of the same bytes a merge may take."""
ENTRY_AIMS = {"core_linear": 50.0, "core_ties": 50.0, "knots": None, "ties_svd": 1000.0}
"""The most milliseconds for merges of entries of all modules of 32 layers."""
SVD_AIM = 30.0
"""The most milliseconds for the svd to the sources' rank of all modules of 32 layers."""
PEFT_AIMS = {"ties": 100.0, "svd": 1000.0}
"""The least number of times PEFT's speed."""
TRIM_BLOCKS = (2048, 8192)
"""Other numbers of entries that the search for thresholds may look at together."""


@dataclass(frozen=True)
class Work:
    """What is measured, and how often.

    counts: numbers of sources.
    sets: the most sets of sources and slots that are taken in turn.
    row_seconds: after how long a row gets no further round.
    svd_seconds: how long PEFT's SVDs may take.
    copied: bytes of the copies whose speed is measured.
    everything: whether more is measured than what has a goal.
    """

    shapes: cases.Shapes
    rank: int = 16
    counts: tuple[int, ...] = (AIMED, 2, 8, 16)
    sets: int = 2
    rounds: int = 9
    row_seconds: float = 5.0
    peft_rounds: int = 3
    svd_seconds: float = 90.0
    copied: int = 2 << 30
    everything: bool = True


def work(quick: bool, layers: int) -> Work:
    """What the command measures."""
    shapes = cases.llama3_8b(layers)
    if quick:
        return Work(shapes, counts=(AIMED,), rounds=5, peft_rounds=1, svd_seconds=0.0, everything=False)
    return Work(shapes)


def first_day_work(layers: int) -> Work:
    """What is measured when there are only minutes: everything, in as many rounds as the quick command."""
    return Work(cases.llama3_8b(layers), rounds=5, peft_rounds=1)


class LeftOutError(Exception):
    """A row would take longer than it may, or cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Case:
    """A row that has not been measured yet.

    strategy, dtype: the row needs a check of these that agrees.
    measure: raises DisagreementError instead of timing a wrong result, and LeftOutError.
    """

    name: str
    strategy: str
    dtype: str
    measure: Callable[[], Row]


def on_a_gpu() -> tuple[TritonBackend, Timer]:
    """The backend and a clock for its device; raises BackendError if there is no GPU."""
    backend = cast(TritonBackend, load_backend("triton"))
    if backend.device.type != "cuda":
        raise BackendError("there is no GPU to time; --agreement-only runs under the interpreter too")
    return backend, CudaTimer(backend.device)


def run(work: Work, file: Path | None, agreement_only: bool = False, timer: Timer | None = None) -> int:
    """Check, measure, print and return the exit code, 1 if anything disagrees.

    file: gets every measured time as JSON.
    timer: a clock for the device; made if there is none.

    Raises BackendError if there is no device.
    """
    backend = cast(TritonBackend, load_backend("triton"))
    if timer is None and not agreement_only:
        backend, timer = on_a_gpu()
    print(f"agreement, on {backend.device}", flush=True)
    checks = count_agreed(groups(backend))
    if checks is None:
        return 1
    if timer is None:
        return 0
    bench = Bench(work, timer)
    facts = bench.facts()
    machine.show(facts)
    print(f"\n{len(work.shapes)} modules, rank {work.rank}, density {DENSITY}\n{HEADER}")
    rows: list[Row] = []
    left_out: list[str] = []
    for case in bench.cases():
        try:
            rows.append(case.measure())
            print(rows[-1].line(), flush=True)
        except LeftOutError as why:
            left_out.append(str(why))
        except DisagreementError as error:
            print(f"WRONG {error}\nnot timed any further: fix the disagreements first")
            return 1
    print("\naims")
    for aim in (aim for row in rows for aim in row.aims):
        print(aim.line())
    for text in left_out:
        print(f"  left out: {text}")
    write_report(
        file,
        machine=facts,
        modules=len(work.shapes),
        density=DENSITY,
        work={name: value for name, value in asdict(work).items() if name != "shapes"},
        rows=[asdict(row) for row in rows],
        left_out=left_out,
        checks=checks,
    )
    return 0


class Bench:
    """Everything that is timed, the most valuable first."""

    def __init__(self, work: Work, timer: Timer) -> None:
        self.work = work
        self._timer = timer
        self._device = timer.device
        self._pool: tuple[tuple[torch.dtype, int], Pool] | None = None
        self._svd_left, self._svd_pace = work.svd_seconds, 0.0

    def facts(self) -> dict[str, object]:
        """What the device is, and the bytes it copies in a second."""
        copied = copy_speed(self._timer, self.work.copied, self.work.rounds)
        return self._timer.facts() | {"copy bytes per second": copied}

    def cases(self) -> Iterator[Case]:
        """All rows to measure, in the order of their value."""
        work, rank = self.work, self.work.rank
        for strategy in USUAL:
            yield self._warm_case(strategy)
        yield self._cold_case("ties, cold")
        yield self._case("linear, planned anew", "linear", self._planned_anew)
        yield self._case("svd", "svd", self._svd)
        for strategy in ENTRY_AIMS:
            yield self._case(strategy, strategy, partial(self._of_entries, strategy))
        yield self._case("stage of ties", "ties", self._stage_of_ties)
        yield self._case("place", "ties", self._place)
        for n in (AIMED * rank, 2 * rank):
            yield self._case(f"one eigh of {n} x {n}", "svd", partial(self._eigh, n))
        yield self._case("svd of 2", "svd", partial(self._svd, "svd of 2", 2))
        yield self._case("ties beside PEFT", "ties", self._ties_beside_peft)
        if work.everything:
            yield from self._variants()
            for count in (count for count in work.counts if count != AIMED):
                for strategy in USUAL:
                    yield self._warm_case(strategy, count)
                yield self._cold_case(f"ties of {count}, cold", count)
            for strategy in USUAL:
                yield self._warm_case(strategy, dtype=torch.float32)
            yield self._cold_case("ties, cold, float32", dtype=torch.float32)
        shapes = work.shapes
        for name in sorted(one_of_each(shapes), key=lambda name: peers.svd_work(shapes[name])):
            yield Case(f"svd beside PEFT, {name}", "svd", "float32", partial(self._svd_beside_peft, name))

    def _variants(self) -> Iterator[Case]:
        """Other ways to do the same, to be compared with the rows of the same name."""
        for block in TRIM_BLOCKS:
            name = f"ties, cold, trim by {block}"
            yield self._case(name, "ties", partial(self._cold_by, name, block))
        yield self._case("svd, magma", "svd", self._svd_by_magma)

    def _case(self, name: str, strategy: str, measure: Callable[[], Row]) -> Case:
        return Case(name, strategy, "bfloat16", measure)

    def _warm_case(self, strategy: str, count: int = AIMED, dtype: torch.dtype = torch.bfloat16) -> Case:
        name = strategy if count == AIMED else f"{strategy} of {count}"
        if dtype != torch.bfloat16:
            name += f", {name_of(dtype)}"
        return Case(name, strategy, name_of(dtype), partial(self._warm, name, strategy, count, dtype))

    def _cold_case(self, name: str, count: int = AIMED, dtype: torch.dtype = torch.bfloat16) -> Case:
        return Case(name, "ties", name_of(dtype), partial(self._cold, name, count, dtype))

    def _sources(self, count: int = AIMED, dtype: torch.dtype = torch.bfloat16) -> Pool:
        """Sources for sets of that many; those of the last row if they are the same."""
        wanted = dtype, max(count, AIMED * self.work.sets)
        if self._pool is None or self._pool[0] != wanted:
            self._pool = None  # its memory is free before more is taken
            self._pool = wanted, Pool(self.work.shapes, wanted[1], self.work.rank, dtype, self._device)
        return self._pool[1]

    def _verified(
        self,
        strategy: str,
        count: int = AIMED,
        dtype: torch.dtype = torch.bfloat16,
        options: str | None = None,
        sets: int | None = None,
    ) -> Merges:
        """Merges that have been made once, correctly; their sources are on the device."""
        options = OPTIONS.get(strategy, "") if options is None else options
        merges = self._sources(count, dtype).merges(strategy, count, options, sets or self.work.sets)
        merges.verify()
        for turn in range(1, len(merges)):
            merges.write(turn)
        return merges

    def _row(self, case: str, merges: Merges, reads: bool = True) -> Row:
        """A row for the first set, without times.

        reads: whether the sources are read; otherwise a finished merge of the size of the slots is.
        """
        plan, slots = merges.plans[0], list(merges.slots[0].values())
        written = sum(slot.a.nbytes + slot.b.nbytes for slot in slots)
        moved = written + (sum(source.nbytes for source in plan.sources) if reads else written)
        slot_rank = slots[0].a.shape[0]
        return Row(case, str(plan.spec), name_of(slots[0].a.dtype), len(plan.sources), slot_rank, moved)

    def _rounds(self) -> Iterator[bool]:
        """Whether each round counts: the first does not, the last is the one that ends after row_seconds."""
        begin = time.perf_counter()
        yield False
        for _ in range(self.work.rounds):
            yield True
            if time.perf_counter() - begin > self.work.row_seconds:
                return

    def _time(self, row: Row, merges: Merges, cold: bool = False) -> Row:
        """Add to a row what a write takes, and judge its aims.

        Each round takes every set in turn, first for the copies, then for the device's work, then for whole
        calls.

        cold: whether every write is of a plan that was never seen; planning is not part of the times.
        """
        turns = range(len(merges))
        copies = Copies(self._device, row.bytes, len(merges))
        for counts in self._rounds():
            copied = self._timer.on_device([partial(copies, turn) for turn in turns])
            write = merges.write_anew if cold else merges.write
            worked = self._timer.on_device([partial(write, turn) for turn in turns])
            calls = []
            for turn in turns:
                if cold:
                    merges.renew(turn)
                calls.append(self._timer.until_done(partial(merges.write, turn)))
            if counts:
                row.add(copy=sum(copied.values()))
                row.add_work(worked)
                for queued, call in calls:
                    row.add(queued=queued, call=call)
        for name in ("kernels", "write") if row.case in COPY_AIMS else ():
            what = f"{row.case}, {name} over a copy of the same bytes"
            row.aim(what, row.times_copy(name), COPY_AIMS[row.case])
        return row

    def _time_calls(self, row: Row, call: Callable[[int], object], sets: int = 1) -> Row:
        """Add whole calls for the sets in turn to a row, by the host's clock; each was made before."""
        begin = time.perf_counter()
        for i in range(1 + self.work.rounds):
            queued, done = self._timer.until_done(partial(call, i % sets))
            row.add(queued=queued, call=done)
            if time.perf_counter() - begin > self.work.row_seconds:
                break
        return row

    def _aim_at_call(self, row: Row, limit: float | None) -> Row:
        if limit is not None:
            what = f"{row.case} of {row.sources} sources, {len(self.work.shapes)} modules, call, milliseconds"
            row.aim(what, 1e3 * statistics.median(row.seconds["call"]), limit)
        return row

    def _aim_at_peft(self, row: Row, what: str, limit: float) -> Row:
        row.aim(what, ratio(row.seconds["peft"], row.seconds["call"]), limit, at_most=False)
        return row

    def _warm(self, case: str, strategy: str, count: int, dtype: torch.dtype) -> Row:
        """A merge whose sources are on the device and whose thresholds are cached."""
        merges = self._verified(strategy, count, dtype)
        return self._time(self._row(case, merges), merges)

    def _cold(self, case: str, count: int = AIMED, dtype: torch.dtype = torch.bfloat16) -> Row:
        """A merge of a density that no earlier merge had, whose thresholds are searched."""
        merges = self._verified("ties", count, dtype)
        return self._time(self._row(case, merges), merges, cold=True)

    def _cold_by(self, case: str, block: int) -> Row:
        usual = trim.BLOCK
        trim.BLOCK = block
        try:
            return self._cold(case)
        finally:
            trim.BLOCK = usual

    def _planned_anew(self) -> Row:
        """A merge that was never requested, for which the host makes all tables."""
        merges = self._verified("linear")
        return self._time(self._row("linear, planned anew", merges), merges, cold=True)

    def _svd(self, case: str = "svd", count: int = AIMED) -> Row:
        """Truncated sums as a whole; the host waits for the device after each decomposition."""
        merges = self._verified("svd", count, options=f", rank={self.work.rank}", sets=1)
        row = self._time_calls(self._row(case, merges), merges.write)
        return self._aim_at_call(row, SVD_AIM if case == "svd" else None)

    def _svd_by_magma(self) -> Row:
        """The same with MAGMA behind torch."""
        with _preferred("magma"):
            return self._svd("svd, magma")

    def _of_entries(self, strategy: str) -> Row:
        """Merges of entries of deltas, or of their coordinates, which may take a minute.

        So the device's work is timed while the first one is verified.
        """
        slot_rank = self.work.rank * (AIMED if strategy == "knots" else 1)
        merges = self._sources().merges(strategy, AIMED, "", 1, slot_rank)
        row = self._row(strategy, merges)
        row.add_work(self._timer.on_device([merges.verify]))
        self._time_calls(row, merges.write)
        return self._aim_at_call(row, ENTRY_AIMS[strategy])

    def _stage_of_ties(self) -> Row:
        """What a server does beside its steps: check the merge, make it, and bring it to host memory."""
        merges = self._verified("ties")
        row = self._row("stage of ties", merges)
        return self._time_calls(row, merges.stage, len(merges))

    def _place(self) -> Row:
        """What a server does within a step: a staged merge goes to the device, and from there into slots."""
        merges = self._verified("ties")
        turns = range(len(merges))
        for turn in turns:
            merges.stage(turn)
        merges.verify(merges.place)
        row = self._row("place", merges, reads=False)
        row.add_work(self._timer.on_device([partial(merges.place, turn) for turn in turns]))
        return self._time_calls(row, merges.place, len(merges))

    def _eigh(self, n: int) -> Row:
        """Torch's batched decomposition of ``n x n``; an svd needs two, with the sum of all ranks for n."""
        x = torch.randn(len(self.work.shapes), n, 2 * n, dtype=torch.float64, device=self._device)
        gram = x @ x.mT
        row = Row(f"one eigh of {n} x {n}", "", "float64", 0, None, 2 * len(x) * n * n * 8)
        return self._time_calls(row, lambda _: torch.linalg.eigh(gram))

    def _ties_beside_peft(self) -> Row:
        """Whole calls of all modules beside PEFT's, in turn.  PEFT trims in every call, so ours must too."""
        merges = self._verified("ties")
        there = [_to_device(source.modules, self._device) for source in merges.plans[0].sources]
        theirs = partial(_merge_by_peft, merges.plans[0], there)
        row = self._row("ties beside PEFT", merges)
        for counts in (False, *[True] * self.work.peft_rounds):
            merges.renew(0)
            peft, call = (self._timer.until_done(f)[1] for f in (theirs, partial(merges.write, 0)))
            if counts:
                row.add(peft=peft, call=call)
        what = f"ties of {AIMED} sources, cold, whole call, times PEFT's speed"
        return self._aim_at_peft(row, what, PEFT_AIMS["ties"])

    def _svd_beside_peft(self, name: str) -> Row:
        """One module, two sources in float32 as torch has no SVD of bfloat16; PEFT once."""
        rank, shape = self.work.rank, self.work.shapes[name]
        seconds = self._svd_pace * peers.svd_work(shape)
        if seconds > self._svd_left:
            raise LeftOutError(f"PEFT's svd of {name}, which should take {seconds:.0f} s")
        torch.linalg.svd(torch.randn(64, 64, device=self._device))  # makes what the first call makes
        pool = Pool({name: shape}, 2, rank, torch.float32, self._device)
        merges = pool.merges("svd", 2, f", rank={rank}", 1)
        merges.verify()
        row = self._time_calls(self._row(f"svd beside PEFT, {name}", merges), merges.write)
        pair = {key: _to_device(source.modules, self._device)[name] for key, source in pool.sources.items()}
        theirs = self._timer.until_done(partial(peers.merge_svd, pair, [1.0, 1.0], rank))[1]
        row.add(peft=theirs)
        self._svd_left, self._svd_pace = self._svd_left - theirs, theirs / peers.svd_work(shape)
        return self._aim_at_peft(row, f"svd of {name}, times PEFT's speed", PEFT_AIMS["svd"])


@contextlib.contextmanager
def _preferred(library: str) -> Iterator[None]:
    """Make torch prefer a library of linear algebra on CUDA; raises LeftOutError if it lacks the library."""
    usual = torch.backends.cuda.preferred_linalg_library()
    try:
        torch.backends.cuda.preferred_linalg_library(library)
    except RuntimeError as error:
        raise LeftOutError(f"svd by {library}: {error}") from None
    try:
        yield
    finally:
        torch.backends.cuda.preferred_linalg_library(usual)


def _to_device(modules: Mapping[str, Factors], device: torch.device) -> dict[str, Factors]:
    return {name: Factors(f.a.to(device), f.b.to(device), f.scaling) for name, f in modules.items()}


def _merge_by_peft(plan: MergePlan, there: Sequence[Mapping[str, Factors]]) -> None:
    for module in plan.modules:
        layer = {name: factors[module] for name, factors in zip(plan.spec.names, there, strict=True)}
        peers.merge_factors(plan.spec.strategy, layer, plan.spec.weights(), DENSITY)
