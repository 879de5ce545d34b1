"""A server's requests for merges beside those for plain adapters, with and without the plugin, in one run."""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path

from merged_lora.spec import canonical

from . import machine, serving
from .serve_report import (
    AGAIN,
    COLD,
    LOST,
    MEMORY,
    MERGED,
    NEW,
    OFF,
    ON,
    SEEN,
    WARM,
    Arrival,
    FirstUse,
    Gaps,
    Report,
    merge_milliseconds,
)
from .server import Server, ServerDiedError
from .timing import REST, once

STRATEGIES = ("ties", "linear", "sum")
SLOTS = 2
COPIES = 4
"""Adapters that the server without the plugin loads in turn: more than it keeps in memory."""

WARM_MERGE = "ties(0.5*sql, 0.5*tone)"


@dataclass(frozen=True)
class Work:
    """How much is measured.

    requests: of every kind.  speeds: rounds of throughput.  concurrent, tokens: of one round's requests.
    apart: tokens of a stream between two arrivals.
    """

    requests: int
    speeds: int = 6
    concurrent: int = 8
    tokens: int = 16
    apart: int = 4


def run(work: Work, file: Path | None) -> int:
    """Measure and print; the exit code.  file: gets every measured time as JSON.

    Raises MergeError where something is missing, or a server refuses a request or dies.
    """
    serving.check()
    report = Report(
        machine.facts() | {name: machine.installed(name) for name in ("vllm", "vllm-merged-lora")}
    )
    print("machine")
    for name, value in report.machine.items():
        print(f"  {name:18}{value}")
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        print("\nstarting two servers, one after the other ", end="", flush=True)
        on, off = (stack.enter_context(server) for server in _servers(folder))
        print(f" ready\nmilliseconds: median (quartiles), {work.requests} of each kind, in turn", flush=True)
        bench = Bench(work, report, on, off)
        try:
            bench.measure()
        except OSError as error:
            tail = next((server.tail() for server in (on, off) if not server.running), "")
            raise ServerDiedError(f"a server does not answer: {error}\n{tail}") from error
    print("\naims")
    for aim in report.aims():
        print(aim.line())
    if file is not None:
        about = {
            "date": date.today().isoformat(),
            "work": asdict(work),
            "flags": _flags(),
            "environment": serving.threads(),
        }
        file.write_text(json.dumps(about | report.as_json(), indent=1) + "\n")
        print(f"\nwritten: {file}")
    return 0


def _flags() -> list[str]:
    return [*serving.FLAGS, "--max-loras", str(SLOTS), "--max-cpu-loras", str(SLOTS)]


def _servers(folder: Path) -> Iterator[Server]:
    """One with the plugin, one without, the same flags otherwise."""
    copies = {}
    for i in range(COPIES):
        name = serving.NAMES[i % len(serving.NAMES)]
        copies[f"copy{i}"] = Path(shutil.copytree(serving.ADAPTERS / name, folder / f"copy{i}"))
    flags = [*_flags(), *serving.modules(serving.example_folders() | copies)]
    for name, more in (("on", ["--enable-merged-lora"]), ("off", ["--enable-lora"])):
        log = folder / f"{name}.log"
        arguments = [*flags, *more]
        yield Server(serving.MODEL, *arguments, log=log, waiting=serving.dot, environment=serving.threads())


class Bench:
    """Everything that is timed, in order; the tables are printed as they come."""

    def __init__(self, work: Work, report: Report, on: Server, off: Server) -> None:
        self._work = work
        self._report = report
        self._on = on
        self._off = off
        self._serial = itertools.count(1)
        self._copy = itertools.cycle(f"copy{i}" for i in range(COPIES))

    def measure(self) -> None:
        """Time everything; the throughput first, before any merge was asked for."""
        self.speeds()
        print(f"\n{self._work.concurrent} requests at a time for plain adapters, tokens per second")
        print(self._report.speed_line(), flush=True)
        self.singles()
        head = f"{'one token':28}over the plain adapter, to 95 %"
        print(f"\n  {'asked for a second time':52}{head}")
        print("\n".join(self._report.warm_lines()))
        print(f"\n  {'asked for the first time':52}{'one token':28}{'then':28}{'difference':28}merged in")
        for use in self._report.first.values():
            print(use.line())
        self.streams()
        for server, gaps in self._report.gaps.items():
            print(f"\ntime between two tokens of a stream, {server}")
            print("\n".join(gaps.lines()), flush=True)
        print(f"  merged in {statistics.median(self._report.gaps[ON].merged):.1f} ms, by the server's log")

    def _new(self, strategy: str, sources: int) -> str:
        """A merge that was never asked for."""
        weight = 0.3 + 1e-4 * next(self._serial)
        return canonical(f"{strategy}({', '.join(f'{weight:.4f}*{s}' for s in serving.NAMES[:sources])})")

    def _once(self, server: Server, model: str) -> float:
        """Seconds of one token."""
        time.sleep(REST)
        return once(partial(serving.complete, server, model))

    # Throughput

    def speeds(self) -> None:
        """Tokens per second of plain adapters, on either server."""
        models = [serving.NAMES[i % SLOTS] for i in range(self._work.concurrent)]
        servers = {ON: self._on, OFF: self._off}
        with ThreadPoolExecutor(self._work.concurrent) as pool:
            for i in range(1 + self._work.speeds):
                for name, server in servers.items():
                    time.sleep(REST)
                    begin = time.perf_counter()
                    ask = partial(serving.complete, server, tokens=self._work.tokens)
                    tokens = sum(pool.map(ask, models))
                    if i > 0:
                        speeds = self._report.speed.setdefault(name, [])
                        speeds.append(tokens / (time.perf_counter() - begin))

    # One request at a time

    def singles(self) -> None:
        """One request at a time: what is warm, and what is asked for the first time."""
        self._report.warm = {WARM: [], AGAIN: [], MERGED: []}
        asked: dict[str, list[str]] = {}
        for i in range(1 + self._work.requests):
            counted = i > 0
            self._warm(i, counted)
            for strategy in STRATEGIES:
                for sources in (2, 3):
                    spec = self._new(strategy, sources)
                    case = f"{strategy}, {sources} sources"
                    self._first_use(case, self._on, spec, counted)
                    if counted:
                        asked.setdefault(case, []).append(spec)
            self._once(self._off, "sql")  # it has been idle, unlike the other one
            self._first_use(COLD, self._off, next(self._copy), counted)
        merged = merge_milliseconds(self._on.log.read_text(errors="replace"))
        for case, specs in asked.items():
            self._report.first[case].merged = [merged[spec] for spec in specs]

    def _warm(self, turn: int, counted: bool) -> None:
        """What has a slot, each of it once in a changing order."""
        models = {WARM: "sql", AGAIN: "sql", MERGED: WARM_MERGE}
        for model in models.values():
            serving.complete(self._on, model)
        order = list(models)
        for case in order[turn % 3 :] + order[: turn % 3]:
            seconds = self._once(self._on, models[case])
            if counted:
                self._report.warm[case].append(seconds)

    def _first_use(self, case: str, server: Server, model: str, counted: bool) -> None:
        use = self._report.first.setdefault(case, FirstUse(case))
        pair = self._once(server, model), self._once(server, model)
        if counted:
            use.first.append(pair[0])
            use.again.append(pair[1])

    # Beside a stream

    def streams(self) -> None:
        """One stream a round on either server, while what is measured arrives in a changing order."""
        gaps = {
            ON: Gaps(largest={SEEN: [], LOST: [], MEMORY: [], NEW: []}),
            OFF: Gaps(largest={COLD: []}),
        }
        other = itertools.cycle(serving.NAMES[1:])
        asked: list[str] = []

        def new() -> str:
            asked.append(self._new("ties", 2))
            return asked[-1]

        kinds: dict[str, dict[str, Callable[[], str]]] = {
            ON: {SEEN: lambda: WARM_MERGE, MEMORY: lambda: next(other), NEW: new},
            OFF: {COLD: lambda: next(self._copy)},
        }
        for i in range(1 + self._work.requests):
            for name, server in {ON: self._on, OFF: self._off}.items():
                cases = list(kinds[name])
                turn = i % len(cases)
                arrivals = []
                with serving.Stream(server, "sql", 400) as stream:
                    stream.wait(self._work.apart)
                    for case in cases[turn:] + cases[:turn]:
                        model = kinds[name][case]()
                        # Those before it have taken its slot, and it takes it back first.
                        for each in (LOST, SEEN) if case == SEEN else (case,):
                            arrivals.append(_arrival(server, each, model))
                            stream.wait(self._work.apart)
                    times = list(stream.times)
                if i > 0:
                    gaps[name].add(times, arrivals)
        merged = merge_milliseconds(self._on.log.read_text(errors="replace"))
        gaps[ON].merged = [merged[spec] for spec in asked[1:]]
        self._report.gaps = gaps


def _arrival(server: Server, case: str, model: str) -> Arrival:
    begin = time.perf_counter()
    serving.complete(server, model)
    return Arrival(case, begin, time.perf_counter())
