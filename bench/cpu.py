"""Time merges on CPU cores, beside PEFT's merges of the same sources where PEFT has them."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path

import torch

from merged_lora.adapters import Adapter
from merged_lora.backends import Backend, load_backend
from merged_lora.plan import MergePlan
from merged_lora.planning import make_plan
from merged_lora.spec import parse

from . import cases, machine, peers
from .agreement import count_agreed, entry_checks, factor_checks
from .recording import write_report
from .timing import Aim, extremes, interleaved, once, ratio

RANK, DENSITY, ROUNDS = 16, 0.5, 9
COMPONENTS = 32
"""Eigenvectors of a calibration, the default of the command."""
MEMORY = 200e6
"""Bytes that a merge of a layer may take on top of its inputs."""
HEADER = (
    f"rank {RANK}; milliseconds: median (fastest-slowest), ours and PEFT's in turn; MB: peak memory\n"
    f"  {'merge':40} {'ours':24} {'PEFT':24} {'ratio':>7} {'GB/s':>5} {'plan':18} {'MB':>4}"
)


@dataclass(frozen=True)
class Case:
    """A merge that is timed.

    count: number of sources.
    options: text that follows the sources in the spec.
    layers: number of layers of Llama-3-8B that are merged; the memory of a merge of one layer is measured.
    module: the one module that is merged instead of layers.
    peft_rounds: how often PEFT merges the same; 0 if it does not.
    faster: the least number of times PEFT's speed that is aimed at.
    seconds: the most seconds that are aimed at.
    """

    strategy: str
    count: int = 4
    options: str = ""
    layers: int = 4
    module: str = ""
    dtype: torch.dtype = torch.bfloat16
    rounds: int = ROUNDS
    peft_rounds: int = 0
    faster: float | None = None
    seconds: float | None = None

    @property
    def name(self) -> str:
        """The case in words."""
        what = f"{self.module} alone" if self.module else f"{self.layers} layer{'s' * (self.layers > 1)}"
        return f"{self.strategy}, N = {self.count}, {what}"

    @property
    def spec(self) -> str:
        """The text of the merge."""
        return f"{self.strategy}({', '.join(cases.names(self.count))}{self.options})"

    def sources(self) -> dict[str, Adapter]:
        """The adapters that are merged; for ``regmean`` they are calibrated."""
        return self._ready(_sources(self.layers, self.module, self.count, self.dtype))

    def small_sources(self) -> dict[str, Adapter]:
        """As many adapters of a few small modules, to compile everything with."""
        return self._ready(cases.random_sources(cases.SMALL, self.count, RANK, self.dtype))

    def _ready(self, drawn: dict[str, Adapter]) -> dict[str, Adapter]:
        if self.strategy != "regmean":
            return drawn
        return {
            name: cases.calibrated(adapter, seed, COMPONENTS)
            for seed, (name, adapter) in enumerate(drawn.items())
        }


@cache
def _sources(layers: int, module: str, count: int, dtype: torch.dtype) -> dict[str, Adapter]:
    shapes = {module: cases.LLAMA3_8B_LAYER[module]} if module else cases.llama3_8b(layers)
    return cases.random_sources(shapes, count, RANK, dtype)


TRIM = f", density={DENSITY}"
CUT = f", rank={RANK}"
SHAPES = ("self_attn.k_proj", "self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
"""A module of every distinct shape, the smallest first."""
FASTER = {"linear": None, "ties": 40, "dare_ties": 20}
CORE_SECONDS = {
    "core_linear": None,
    "core_ties": 0.06,
    "core_dare_ties": None,
    "knots": 0.15,
    "regmean": 0.25,
}
ENTRY_SECONDS = {"ties_svd": 15.0, "dare_ties_svd": None, "magnitude_prune_svd": None, "della_svd": None}
F32 = torch.float32  # torch has no SVD of bfloat16
CASES = {
    "factors": [
        *(
            Case(strategy, n, "" if strategy == "linear" else TRIM, peft_rounds=ROUNDS, faster=faster)
            for strategy, faster in FASTER.items()
            for n in (2, 4, 8)
        ),
        Case("svd", 2, CUT, dtype=F32),
        *(Case("svd", 2, CUT, module=name, dtype=F32, peft_rounds=1, faster=1000) for name in SHAPES),
    ],
    "core": [Case(strategy, layers=1, seconds=seconds) for strategy, seconds in CORE_SECONDS.items()],
    "entries": [
        *(Case(name, layers=1, rounds=3, seconds=seconds) for name, seconds in ENTRY_SECONDS.items()),
        Case("ties_svd", 4, CUT + TRIM, module=SHAPES[0], dtype=F32, rounds=3, peft_rounds=3, faster=20),
    ],
}
"""The cases by the space that is named on the command line."""


@dataclass
class Row:
    """A case and every time of it, in seconds.

    bytes_moved: bytes of all sources and of the result, which must be read and written at least.
    peak_bytes: the most memory that the merge takes on top of its inputs.
    """

    case: str
    spec: str
    bytes_moved: int
    ours_s: list[float]
    plan_s: list[float]
    peft_s: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    aims: list[Aim] = field(default_factory=list)

    def line(self) -> str:
        """The row of the table."""
        peft, times = "", ""
        if self.peft_s:
            peft, times = extremes(self.peft_s), f"{ratio(self.peft_s, self.ours_s):.1f}"
        speed = self.bytes_moved / statistics.median(self.ours_s) / 1e9
        memory = "" if self.peak_bytes is None else f"{self.peak_bytes / 1e6:.0f}"
        return (
            f"  {self.case:40} {extremes(self.ours_s):24} {peft:24} {times:>7} {speed:>5.1f} "
            f"{extremes(self.plan_s):18} {memory:>4}"
        ).rstrip()


def run(quick: bool, spaces: Collection[str], file: Path | None) -> int:
    """Check, measure, print and return the exit code, 1 if anything disagrees.

    quick: leave out the cases of ``svd``.
    spaces: keys of CASES.
    file: gets every measured time as JSON.
    """
    backend = load_backend("cpu")
    print("agreement")
    checks = count_agreed([factor_checks(backend) if "factors" in spaces else entry_checks(backend)])
    if checks is None:
        return 1
    facts = machine.facts()
    machine.show(facts)
    print(f"\n{HEADER}")
    rows = []
    for case in (case for space in spaces for case in CASES[space]):
        if not (quick and case.strategy == "svd"):
            rows.append(measure(backend, case))
            print(rows[-1].line(), flush=True)
    print("\naims")
    for aim in (aim for row in rows for aim in row.aims):
        print(aim.line())
    write_report(file, machine=facts, checks=checks, rows=[asdict(row) for row in rows])
    return 0


def measure(backend: Backend, case: Case) -> Row:
    """The row of a case."""
    sources = case.sources()
    plan = make_plan(parse(case.spec), sources)
    planned = [once(partial(make_plan, plan.spec, sources)) for _ in range(case.rounds)]
    functions = {"ours": partial(backend.merge, plan)}
    theirs = partial(_merge_by_peft, plan, sources)
    if case.peft_rounds > 1:
        seconds = interleaved(functions | {"peft": theirs}, case.rounds)
    else:
        seconds = interleaved(functions, case.rounds)
        seconds["peft"] = [once(theirs) for _ in range(case.peft_rounds)]
    moved = sum(adapter.nbytes for adapter in sources.values()) + plan.nbytes
    row = Row(case.name, str(plan.spec), moved, seconds["ours"], planned, seconds["peft"])
    if case.faster is not None:
        times = ratio(row.peft_s, row.ours_s)
        row.aims.append(Aim(f"{case.name}: times PEFT's speed", times, case.faster, at_most=False))
    if case.seconds is not None:
        row.aims.append(Aim(f"{case.name}: seconds", statistics.median(row.ours_s), case.seconds))
    if case.layers == 1:
        # In a process of its own: here, memory that an earlier merge has freed would hide what this takes.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row.peak_bytes = pool.apply(_peak_memory, (case,))
        row.aims.append(Aim(f"{case.name}: MB on top of its inputs", row.peak_bytes / 1e6, MEMORY / 1e6))
    return row


def _peak_memory(case: Case) -> int:
    """The most bytes that a merge takes on top of its inputs, with everything compiled and loaded."""
    backend = load_backend("cpu")
    sources = case.sources()
    backend.merge(make_plan(parse(case.spec), case.small_sources()))
    return machine.peak_memory(partial(backend.merge, make_plan(parse(case.spec), sources)))


def _merge_by_peft(plan: MergePlan, sources: Mapping[str, Adapter]) -> None:
    spec = plan.spec
    density = spec.option("density")
    for module in plan.modules:
        layer = {name: sources[name].modules[module] for name in spec.names}
        if spec.strategy.endswith("svd"):
            trim = None if spec.strategy == "svd" else DENSITY
            peers.merge_svd(layer, spec.weights(), RANK, spec.strategy, trim)
        else:
            assert density is None or isinstance(density, float)
            peers.merge_factors(spec.strategy, layer, spec.weights(), density)
