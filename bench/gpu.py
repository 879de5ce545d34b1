"""Merges on a GPU: device time beside a copy of the same bytes, whole calls beside PEFT's on the same GPU."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import cast

import torch

from merged_lora.backends import SlotBackend, load_backend
from merged_lora.errors import BackendError
from merged_lora.factors import Factors
from merged_lora.plan import MergePlan
from merged_lora.strategies import TABLE
from merged_lora.triton_kernels.kernels import trim

from . import cases, peers
from .agreement import named
from .device import Copies, CudaTimer, Timer, copy_speed
from .device_agreement import groups
from .gpu_report import HEADER, Row
from .pool import DENSITY, DisagreementError, Merges, Pool, one_of_each
from .timing import ratio

Turn = Callable[[int], object]
"""Something to be timed, for the set of that number."""

TRIMMED = ", density={density}"
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
TRIM_BLOCKS = (2048, 8192)
"""Other numbers of entries that the search for thresholds may look at together."""


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
    sets: int = 2
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
        return Work(shapes, counts=(AIMED,), rounds=5, peft_rounds=1, svd_seconds=0.0, everything=False)
    return Work(shapes)


def first_day_work(layers: int) -> Work:
    """What is measured where minutes are counted: everything, the rounds of the quick command."""
    return Work(cases.llama3_8b(layers), rounds=5, peft_rounds=1)


class LeftOutError(Exception):
    """Something would take longer than it may, or cannot be done here; the message says why."""


@dataclass(frozen=True)
class Case:
    """A row that is still to be measured.

    strategy, dtype: whose agreement it stands on.  measure: raises DisagreementError instead of timing what
    is wrong, LeftOutError where it would take too long.
    """

    name: str
    strategy: str
    dtype: str
    measure: Callable[[], Row]


def on_a_gpu() -> tuple[SlotBackend, Timer]:
    """The backend and a clock for its device; raises BackendError where there is no GPU."""
    backend = cast(SlotBackend, load_backend("triton"))
    if backend.device.type != "cuda":
        raise BackendError("there is no GPU to time; --agreement-only runs under the interpreter too")
    return backend, CudaTimer(backend.device)


def run(work: Work, file: Path | None, agreement_only: bool = False, timer: Timer | None = None) -> int:
    """Check, measure and print; the exit code, 1 where something disagrees.

    file: gets every measured time as JSON.  timer: of the device, made where none is given.
    Raises BackendError where there is no device.
    """
    backend = cast(SlotBackend, load_backend("triton"))
    if timer is None and not agreement_only:
        backend, timer = on_a_gpu()
    checks = _check(backend)
    if checks is None:
        print("not timed: what disagrees must be mended first")
        return 1
    if timer is None:
        return 0
    bench = Bench(work, timer)
    facts = bench.facts()
    print("\nmachine")
    for name, value in facts.items():
        print(f"  {name:24}{value}")
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
            print(f"WRONG {error}\nnot timed any further: what disagrees must be mended first")
            return 1
    print("\naims")
    for row in rows:
        for aim in row.aims:
            print(aim.line())
    for text in left_out:
        print(f"  left out: {text}")
    if file is not None:
        report = {
            "date": date.today().isoformat(),
            "machine": facts,
            "modules": len(work.shapes),
            "density": DENSITY,
            "work": {name: value for name, value in asdict(work).items() if name != "shapes"},
            "rows": [asdict(row) for row in rows],
            "left_out": left_out,
            "checks": checks,
        }
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwritten: {file}")
    return 0


def _check(backend: SlotBackend) -> int | None:
    """The number of checks; None where one of them failed."""
    print(f"agreement, on {backend.device}", flush=True)
    total, failed = 0, False
    for about, checks in groups(backend):
        found = [(check.what, check.find()) for check in checks]
        wrong = [(what, text) for what, text in found if text]
        print(f"  {'WRONG' if wrong else 'ok':6}{len(found):>3}  {about}", flush=True)
        for what, text in wrong:
            print(f"           {what}: {text}", flush=True)
        total, failed = total + len(found), failed or bool(wrong)
    return None if failed else total


class Bench:
    """Everything that is timed, the most worth knowing first."""

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
        """All rows to measure, in order of their worth."""
        work, rank = self.work, self.work.rank
        for strategy in USUAL:
            yield self._warm_case(strategy)
        yield self._case("ties, cold", "ties", self._cold)
        yield self._case("linear, planned anew", "linear", partial(self._planned_anew, "linear"))
        yield self._case("svd", "svd", partial(self._decomposed, "svd", AIMED, f", rank={rank}"))
        for strategy in ENTRY_AIMS:
            yield self._case(strategy, strategy, partial(self._of_entries, strategy))
        yield self._case("check of ties", "ties", self._check_of_ties)
        for n in (AIMED * rank, 2 * rank):
            yield self._case(f"one eigh of {n} x {n}", "svd", partial(self._eigh, n))
        yield self._case("svd of 2", "svd", partial(self._decomposed, "svd", 2, f", rank={rank}"))
        cut = partial(self._decomposed, "slerp", 2, ", t=0.5", limit=rank)
        yield self._case("slerp, rank cut", "slerp", cut)
        exact = partial(self._decomposed, "sum", AIMED, "", slot_rank=AIMED * rank)
        yield self._case("sum, exact", "sum", exact)
        yield self._case("ties beside PEFT", "ties", partial(self._beside_peft, "ties"))
        for case in ("upload alone", "ties, with upload", "check, with upload"):
            yield self._case(case, "ties", partial(self._first_use, case))
        if work.everything:
            yield from self._variants()
            yield from self._rest()
        shapes = work.shapes
        for name in sorted(one_of_each(shapes), key=lambda name: peers.svd_work(shapes[name])):
            measure = partial(self._svd_beside_peft, name)
            yield Case(f"svd beside PEFT, {name}", "svd", "float32", measure)

    def _variants(self) -> Iterator[Case]:
        """Other ways to do the same, to be compared with the rows of the same name."""
        for block in TRIM_BLOCKS:
            name = f"ties, cold, trim by {block}"
            yield self._case(name, "ties", partial(self._cold_by, name, block))
        magma = partial(self._by_library, "svd, magma", "magma")
        yield self._case("svd, magma", "svd", magma)

    def _rest(self) -> Iterator[Case]:
        work = self.work
        for count in (count for count in work.counts if count != AIMED):
            for strategy in USUAL:
                yield self._warm_case(strategy, count)
            yield self._case(f"ties of {count}, cold", "ties", partial(self._cold, count))
        for strategy in OPTIONS:
            if strategy not in USUAL:
                yield self._warm_case(strategy)
        for strategy in USUAL:
            yield self._warm_case(strategy, slot_rank=4 * work.rank)
        for strategy in (
            s.name
            for s in TABLE.values()
            if s.recipe.space in ("entries", "core") and s.name not in ENTRY_AIMS
        ):
            yield self._case(strategy, strategy, partial(self._of_entries, strategy))
        for strategy in ("linear", "dare_ties"):
            case = f"{strategy} beside PEFT"
            yield self._case(case, strategy, partial(self._beside_peft, strategy))
        for strategy in USUAL:
            yield self._warm_case(strategy, dtype=torch.float32)
        cold = partial(self._cold, dtype=torch.float32)
        yield Case("ties, cold, float32", "ties", "float32", cold)
        yield self._case("a tensor as large as an lm_head's", "magnitude_prune", self._large)

    def _case(self, name: str, strategy: str, measure: Callable[[], Row]) -> Case:
        return Case(name, strategy, "bfloat16", measure)

    def _warm_case(
        self,
        strategy: str,
        count: int = AIMED,
        slot_rank: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Case:
        name = strategy
        if count != AIMED:
            name += f" of {count}"
        if slot_rank is not None:
            name += f" into rank {slot_rank}"
        if dtype != torch.bfloat16:
            name += f", {named(dtype)}"
        measure = partial(self._warm, strategy, count, slot_rank, dtype)
        return Case(name, strategy, named(dtype), measure)

    def _sources(self, count: int = AIMED, dtype: torch.dtype = torch.bfloat16) -> Pool:
        """Sources for sets of so many; those of the last row where they are the same."""
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
        slot_rank: int | None = None,
        options: str | None = None,
        limit: int | None = None,
        sets: int | None = None,
    ) -> Merges:
        """Merges that were made once, as they must be; their sources are on the device."""
        options = OPTIONS.get(strategy, "") if options is None else options
        sets = self.work.sets if sets is None else sets
        merges = self._sources(count, dtype).merges(strategy, count, options, sets, slot_rank, limit)
        merges.verify()
        for turn in range(1, len(merges)):
            merges.write(turn)
        return merges

    def _row(self, case: str, merges: Merges, writes: bool = True) -> Row:
        """A row for the first set, without times."""
        plan, slots = merges.plans[0], list(merges.slots[0].values())
        written = sum(slot.a.nbytes + slot.b.nbytes for slot in slots) if writes else 0
        moved = sum(source.nbytes for source in plan.sources) + written
        dtype = named(slots[0].a.dtype)
        slot_rank = slots[0].a.shape[0] if writes else None
        return Row(case, str(plan.spec), dtype, len(plan.sources), slot_rank, moved)

    def _rounds(self, counted: int) -> Iterator[bool]:
        """Whether each round counts: the first does not, the last is the one that ends after row_seconds."""
        begin = time.perf_counter()
        yield False
        for _ in range(counted):
            yield True
            if time.perf_counter() - begin > self.work.row_seconds:
                return

    def _time(self, row: Row, merges: Merges, cold: bool = False) -> Row:
        """Fill a row with what a write takes.

        Each round takes every set in turn, first for the copies, then for the kernels, for all that the
        device does, and for the whole calls.  cold: every write is of a plan that was never seen; planning
        is not part of the times.
        """
        turns = range(len(merges))
        copies = Copies(self._device, row.bytes, len(merges))
        writes = [partial(merges.write_anew if cold else merges.write, turn) for turn in turns]
        for counts in self._rounds(self.work.rounds):
            copied = self._timer.on_device([partial(copies, turn) for turn in turns])
            kernels = self._timer.in_kernels(writes)
            written = self._timer.on_device(writes)
            calls = []
            for turn in turns:
                if cold:
                    merges.renew(turn)
                calls.append(self._timer.until_done(partial(merges.write, turn)))
            if not counts:
                continue
            row.gapless = row.gapless and copied.gapless and kernels.gapless and written.gapless
            for name, seconds in (("copy", copied.seconds), ("write", written.seconds)):
                for one in seconds:
                    row.add(name, one)
            for by_name in kernels.seconds:
                row.add_kernels(by_name)
            for queued, done in calls:
                row.add("queued", queued)
                row.add("call", done)
        return row

    def _time_calls(self, row: Row, merges: Merges, call: Turn) -> Row:
        """Fill a row with whole calls, by the host's clock; each was made before."""
        begin = time.perf_counter()
        for i in range(1 + self.work.rounds):
            queued, done = self._timer.until_done(partial(call, i % len(merges)))
            row.add("queued", queued)
            row.add("call", done)
            if time.perf_counter() - begin > self.work.row_seconds:
                break
        return row

    # One function for each kind of row

    def _warm(
        self,
        strategy: str,
        count: int = AIMED,
        slot_rank: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Row:
        """Sources on the device, thresholds known."""
        merges = self._verified(strategy, count, dtype, slot_rank)
        row = self._time(self._row(strategy, merges), merges)
        return self._aimed_at_copy(row)

    def _cold(self, count: int = AIMED, dtype: torch.dtype = torch.bfloat16, case: str = "ties, cold") -> Row:
        """Thresholds of a density that was never asked for."""
        merges = self._verified("ties", count, dtype)
        row = self._time(self._row(case, merges), merges, cold=True)
        return self._aimed_at_copy(row)

    def _planned_anew(self, strategy: str) -> Row:
        """A merge that was never asked for: the host has it all to lay out."""
        merges = self._verified(strategy)
        return self._time(self._row(f"{strategy}, planned anew", merges), merges, cold=True)

    def _cold_by(self, case: str, block: int) -> Row:
        usual = trim.BLOCK
        trim.BLOCK = block
        try:
            return self._cold(case=case)
        finally:
            trim.BLOCK = usual

    def _aimed_at_copy(self, row: Row) -> Row:
        if (row.sources, row.dtype, row.slot_rank) == (AIMED, "bfloat16", self.work.rank):
            for name in ("kernels", "write") if row.case in COPY_AIMS else ():
                what = f"{row.case}, {name} over a copy of the same bytes"
                row.aim(what, row.times_copy(name), COPY_AIMS[row.case])
        return row

    def _decomposed(
        self,
        strategy: str,
        count: int,
        options: str,
        slot_rank: int | None = None,
        limit: int | None = None,
        case: str | None = None,
    ) -> Row:
        """Merges of deltas as a whole; the host waits for the device after each decomposition."""
        merges = self._verified(strategy, count, slot_rank=slot_rank, options=options, limit=limit, sets=1)
        row = self._time_calls(self._row(case or strategy, merges), merges, merges.write)
        if strategy == "svd" and count == AIMED:
            self._aim_at_call(row, SVD_AIM)
        return row

    def _of_entries(self, strategy: str) -> Row:
        """Merges of entries of deltas, or of their coordinates, which may take a minute.

        So the kernels are timed while the first one is verified.
        """
        slot_rank = self.work.rank * (AIMED if strategy == "knots" else 1)
        merges = self._sources().merges(strategy, AIMED, "", 1, slot_rank, slot_rank)
        row = self._row(strategy, merges)
        row.add_kernels(self._timer.in_kernels([merges.verify], held=False).seconds[0])
        self._time_calls(row, merges, merges.write)
        row.gapless = False
        limit = ENTRY_AIMS.get(strategy)
        if limit is not None:
            self._aim_at_call(row, limit)
        return row

    def _aim_at_call(self, row: Row, limit: float) -> None:
        what = f"{row.case} of {row.sources} sources, {len(self.work.shapes)} modules, call, milliseconds"
        row.aim(what, 1e3 * statistics.median(row.seconds["call"]), limit)

    def _by_library(self, case: str, library: str) -> Row:
        """The svd with another library of linear algebra behind torch."""
        with _preferred(library):
            return self._decomposed("svd", AIMED, f", rank={self.work.rank}", case=case)

    def _check_of_ties(self) -> Row:
        merges = self._verified("ties")
        return self._time_calls(self._row("check of ties", merges, writes=False), merges, merges.check)

    def _eigh(self, n: int) -> Row:
        """What torch's batched decomposition takes of that: an svd needs two, of the sum of all ranks."""
        x = torch.randn(len(self.work.shapes), n, 2 * n, dtype=torch.float64, device=self._device)
        gram = x @ x.mT
        row = Row(f"one eigh of {n} x {n}", "", "float64", 0, None, 2 * len(x) * n * n * 8)
        for counts in self._rounds(self.work.rounds):
            done = self._timer.until_done(partial(torch.linalg.eigh, gram))[1]
            if counts:
                row.add("call", done)
        return row

    def _beside_peft(self, strategy: str) -> Row:
        """Whole calls of all modules beside PEFT's, in turn.  PEFT trims in every call, so ours must too."""
        merges = self._verified(strategy)
        there = [_on_device(source.modules, self._device) for source in merges.plans[0].sources]
        density = DENSITY if OPTIONS[strategy] else None
        theirs = partial(_peft_merge, merges.plans[0], there, density)
        row = self._row(f"{strategy} beside PEFT", merges)
        for counts in (False, *[True] * self.work.peft_rounds):
            merges.renew(0)
            times = {
                "peft": self._timer.until_done(theirs)[1],
                "call": self._timer.until_done(partial(merges.write, 0))[1],
            }
            for name, seconds in times.items() if counts else ():
                row.add(name, seconds)
        if strategy in PEFT_AIMS:
            what = f"{strategy} of {AIMED} sources, cold, whole call, times PEFT's speed"
            faster = ratio(row.seconds["peft"], row.seconds["call"])
            row.aim(what, faster, PEFT_AIMS[strategy], at_most=False)
        return row

    def _first_use(self, case: str) -> Row:
        """Sources in page-locked memory: each merge uploads its own, which evicts those of the last."""
        merges = self._verified("ties")
        pool = self._sources()
        pool.reserve(AIMED)
        try:
            return self._time_uploads(self._row(case, merges, writes=case == "ties, with upload"), merges)
        finally:
            pool.reserve(len(pool.sources))

    def _time_uploads(self, row: Row, merges: Merges) -> Row:
        if row.case == "upload alone":
            for counts in self._rounds(self.work.rounds):
                times = self._timer.on_device([partial(merges.upload, turn) for turn in range(len(merges))])
                for seconds in times.seconds if counts else ():
                    row.add("write", seconds)
                row.gapless = row.gapless and times.gapless
            return row
        return self._time_calls(row, merges, merges.write if "ties" in row.case else merges.check)

    def _large(self) -> Row:
        """Trims of one tensor of so many entries that it is cut into spans."""
        shapes = {"lm_head": (self.work.large // self.work.rank, self.work.rank)}
        pool = Pool(shapes, 16, self.work.rank, torch.bfloat16, self._device)
        merges = pool.merges("magnitude_prune", 1, TRIMMED, 16)
        merges.verify()
        return self._time(self._row("a tensor as large as an lm_head's", merges), merges, cold=True)

    def _svd_beside_peft(self, name: str) -> Row:
        """One module, two sources in float32 as torch has no SVD of bfloat16; PEFT once."""
        rank, shape = self.work.rank, self.work.shapes[name]
        operations = peers.svd_work(shape)
        if self._svd_pace > 0 and self._svd_pace * operations > self._svd_left:
            seconds = self._svd_pace * operations
            raise LeftOutError(f"PEFT's svd of {name}, which should take {seconds:.0f} s")
        torch.linalg.svd(torch.randn(64, 64, device=self._device))  # makes what the first call makes
        pool = Pool({name: shape}, 2, rank, torch.float32, self._device)
        merges = pool.merges("svd", 2, f", rank={rank}", 1)
        merges.verify()
        row = self._time_calls(self._row(f"svd beside PEFT, {name}", merges), merges, merges.write)
        pair = {key: _on_device(source.modules, self._device)[name] for key, source in pool.sources.items()}
        theirs = self._timer.until_done(partial(peers.merge_svd, pair, [1.0, 1.0], rank))[1]
        row.add("peft", theirs)
        self._svd_left, self._svd_pace = self._svd_left - theirs, theirs / operations
        faster = ratio(row.seconds["peft"], row.seconds["call"])
        row.aim(f"svd of {name}, times PEFT's speed", faster, PEFT_AIMS["svd"], at_most=False)
        return row


@contextlib.contextmanager
def _preferred(library: str) -> Iterator[None]:
    """Let torch prefer a library of linear algebra on CUDA; raises LeftOutError where it has none of it."""
    usual = torch.backends.cuda.preferred_linalg_library()
    try:
        torch.backends.cuda.preferred_linalg_library(library)
    except RuntimeError as error:
        raise LeftOutError(f"svd by {library}: {error}") from None
    try:
        yield
    finally:
        torch.backends.cuda.preferred_linalg_library(usual)


def _on_device(modules: Mapping[str, Factors], device: torch.device) -> dict[str, Factors]:
    return {name: Factors(f.a.to(device), f.b.to(device), f.scaling) for name, f in modules.items()}


def _peft_merge(plan: MergePlan, there: Sequence[Mapping[str, Factors]], density: float | None) -> None:
    for module in plan.modules:
        layer = {name: factors[module] for name, factors in zip(plan.spec.names, there, strict=True)}
        peers.merge_factors(plan.spec.strategy, layer, plan.spec.weights(), density)
