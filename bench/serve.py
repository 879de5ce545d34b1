"""Measure a server's requests for merges beside those for plain adapters, with and without the plugin."""

from __future__ import annotations

import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from openai import APIError, OpenAI

from merged_lora.adapters import Adapter
from merged_lora.errors import MergeError
from merged_lora.spec import canonical
from merged_lora.vllm_plugin.merge_log import merge_milliseconds

from . import machine, serve_beside, serving
from .chain import Chain
from .launcher import VllmServer, print_dot
from .recording import write_report
from .serve_beside import COLD, CROWD, QUIET_LONG, QUIET_SECONDS, Watch
from .serve_report import (
    AGAIN,
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
)
from .timing import REST, once

STRATEGIES = ("ties", "linear", "sum")
SLOTS = 2
COPIES = 4
"""Adapters that the server without the plugin loads in turn: more than it keeps in memory."""

WARM_MERGE = "ties(0.5*sql, 0.5*tone)"

PARTS = ("speed", "first", "gaps", "clients")
WATCHED = ("linear", "ties", "knots", "core_ties", "ties_svd", "dare_ties_svd", "della_svd")
"""Strategies of which a new merge is made beside a stream."""

MIXED = (*(("linear", 2), ("linear", 3), ("ties", 2), ("ties", 3)) * 2, ("knots", 3), ("ties_svd", 3))
"""Strategies, and numbers of sources, of what each of several clients requests at once."""

DIGITS = 5
"""Decimals of the seconds of a stream's tokens, of which there are many."""

SLOW = 2.0
"""Seconds of a request from which it needs no round that warms up what it uses."""


@dataclass(frozen=True)
class Work:
    """How much is measured.

    requests: number of each kind of request.
    speeds: rounds in which the throughput is measured.
    concurrent, tokens: number of requests in such a round, and tokens of each.
    apart: tokens of a stream between two requests that arrive beside it.
    before: tokens of a stream before the one request that it is watched for.
    seconds, least: a new merge beside a stream gets no further round after so many seconds of requests and so
        many rounds, so that slow ones have fewer.
    parts: what is measured, of PARTS.
    """

    requests: int
    speeds: int = 6
    concurrent: int = 8
    tokens: int = 16
    apart: int = 4
    before: int = 12
    seconds: float = 30.0
    least: int = 2
    parts: tuple[str, ...] = PARTS


def work(requests: int, quick: bool, only: str | None) -> Work:
    """How much is measured.

    requests: number of each kind of request.
    quick: at most three of each, and slow merges once.
    only: the parts to measure, separated by commas; all if None.

    Raises MergeError if there is no such part.
    """
    parts = PARTS if only is None else tuple(only.split(","))
    if not set(parts) <= set(PARTS):
        raise MergeError(f"--only {only}: the parts are {','.join(PARTS)}")
    if quick:
        return Work(min(requests, 3), speeds=2, seconds=SLOW, least=1, parts=parts)
    return Work(requests, parts=parts)


def run(work: Work, file: Path | None) -> int:
    """Measure, print and return the exit code.

    file: gets every measured time as JSON, and if a request failed, all those before it.

    Raises MergeError if something is missing, a server dies, or a request fails.
    """
    serving.check()
    facts = machine.facts("vllm", "vllm-merged-lora")
    machine.show(facts)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        print("\nstarting two servers, one after the other ", end="", flush=True)
        on, off = (stack.enter_context(server) for server in _servers(Path(temporary)))
        print(f" ready\nmilliseconds: median (quartiles), {work.requests} of each kind, in turn", flush=True)
        bench = Bench(work, on, off, facts)
        about = {"work": asdict(work), "flags": _flags(), "environment": serving.threads()}
        try:
            bench.measure()
        except (APIError, MergeError) as error:
            write_report(file, **about, failed=str(error), **asdict(bench.report))
            tail = next((server.tail() for server in (on, off) if not server.running), "")
            raise MergeError(f"a request failed: {error}\n{tail}") from error
    print("\naims")
    for aim in bench.report.aims():
        print(aim.line())
    print("\nfor a page\n")
    print("\n".join(bench.report.markdown()))
    write_report(file, **about, **bench.report.as_json())
    return 0


def _flags() -> list[str]:
    return [*serving.FLAGS, "--max-loras", str(SLOTS), "--max-cpu-loras", str(SLOTS)]


def _servers(folder: Path) -> Iterator[VllmServer]:
    """A server with the plugin and one without it; all other flags are the same."""
    copies = {}
    for i in range(COPIES):
        name = serving.NAMES[i % len(serving.NAMES)]
        copies[f"copy{i}"] = Path(shutil.copytree(serving.ADAPTERS / name, folder / f"copy{i}"))
    small = {_small(name): folder / _small(name) for name in serving.NAMES}
    for name in serving.NAMES:
        _first_layer(Adapter.load(serving.ADAPTERS / name)).save(small[_small(name)])
    flags = [*_flags(), *serving.modules(serving.example_folders() | copies | small)]
    for name, flag in (("on", "--enable-merged-lora"), ("off", "--enable-lora")):
        log, environment = folder / f"{name}.log", serving.threads()
        yield VllmServer(serving.MODEL, *flags, flag, log=log, waiting=print_dot, environment=environment)


def _small(name: str) -> str:
    """The name of an adapter's first layer, which is an adapter too."""
    return f"{name}-first-layer"


def _first_layer(adapter: Adapter) -> Adapter:
    modules = {name: factors for name, factors in adapter.modules.items() if ".layers.0." in name}
    return Adapter(modules, adapter.header)


class Bench:
    """Everything that is timed, in order; the tables are printed as they are complete.

    on, off: the servers with and without the plugin.
    """

    def __init__(self, work: Work, on: VllmServer, off: VllmServer, facts: dict[str, object]) -> None:
        self.report = Report(facts)
        self._work = work
        self._log = on.log
        self._on, self._off = serving.connect(on), serving.connect(off)
        self._clients = {ON: self._on, OFF: self._off}
        self._serial = itertools.count(1)
        self._copy = itertools.cycle(f"copy{i}" for i in range(COPIES))

    def measure(self) -> None:
        """Time every part; the throughput first, before any merge is requested, and last what is hardest."""
        measures = {
            "speed": self._measure_speed,
            "first": self._measure_first,
            "gaps": self._measure_gaps,
            "clients": self.crowds,
        }
        for part in PARTS:
            if part in self._work.parts:
                measures[part]()
        if self.report.beside:
            print("\na stream beside which others request for the first time; speed over that before")
            print("\n".join(serve_beside.lines(self.report.beside)), flush=True)

    def _measure_speed(self) -> None:
        self.speeds()
        print(f"\n{self._work.concurrent} requests at a time for plain adapters, tokens per second")
        print(self.report.speed_line(), flush=True)

    def _measure_first(self) -> None:
        self.singles()
        print(f"\n  {'requested a second time':52}{'one token':28}over the plain adapter, to 95 %")
        print("\n".join(self.report.warm_lines()))
        print(f"\n  {'requested for the first time':52}{'one token':28}{'then':28}{'difference':28}merged in")
        for case, use in self.report.first.items():
            print(use.line(case), flush=True)

    def _measure_gaps(self) -> None:
        self.streams()
        for server, gaps in self.report.gaps.items():
            print(f"\ntime between two tokens of a stream, {server}")
            print("\n".join(gaps.lines()), flush=True)
        print(f"  merged in {statistics.median(self.report.gaps[ON].merged):.1f} ms, by the server's log")
        self.besides()

    def _new(self, strategy: str, sources: int) -> str:
        """A merge that no earlier request named."""
        weight = 0.3 + 1e-4 * next(self._serial)
        return canonical(f"{strategy}({', '.join(f'{weight:.4f}*{s}' for s in serving.NAMES[:sources])})")

    def _logged(self, specs: Sequence[str]) -> list[float]:
        """Milliseconds of these merges by the server's log."""
        merged = merge_milliseconds(self._log.read_text(errors="replace"))
        return [merged[spec] for spec in specs]

    def speeds(self) -> None:
        """Measure tokens per second of plain adapters on both servers; the first round does not count."""
        models = [serving.NAMES[i % SLOTS] for i in range(self._work.concurrent)]
        tokens = self._work.tokens
        self.report.speed = {name: [] for name in self._clients}
        with ThreadPoolExecutor(self._work.concurrent) as pool:
            for i in range(1 + self._work.speeds):
                for name, client in self._clients.items():
                    time.sleep(REST)
                    ask = partial(serving.complete, client, tokens=tokens)
                    seconds = once(lambda ask=ask: list(pool.map(ask, models)))  # type: ignore[misc]
                    if i > 0:
                        self.report.speed[name].append(tokens * len(models) / seconds)

    def singles(self) -> None:
        """Time single requests: warm ones, and the first and second for everything that is new."""
        self.report.warm = {WARM: [], AGAIN: [], MERGED: []}
        new: dict[str, list[str]] = {}
        for i in range(1 + self._work.requests):
            counts = i > 0
            self._warm(i, counts)
            for strategy, sources in itertools.product(STRATEGIES, (2, 3)):
                spec = self._new(strategy, sources)
                case = f"{strategy}, {sources} sources"
                self._first_use(case, self._on, spec, counts)
                if counts:
                    new.setdefault(case, []).append(spec)
            serving.complete(self._off, "sql")  # this server has been idle, unlike the other one
            self._first_use(COLD, self._off, next(self._copy), counts)
        for case, specs in new.items():
            self.report.first[case].merged = self._logged(specs)

    def _time(self, client: OpenAI, model: str) -> float:
        """Seconds of a request for one token."""
        time.sleep(REST)
        return once(partial(serving.complete, client, model))

    def _warm(self, turn: int, counts: bool) -> None:
        """Request each model that has a slot once, in a changing order."""
        models = {WARM: "sql", AGAIN: "sql", MERGED: WARM_MERGE}
        for model in models.values():
            serving.complete(self._on, model)
        for case in _rotated(list(models), turn):
            seconds = self._time(self._on, models[case])
            if counts:
                self.report.warm[case].append(seconds)

    def _first_use(self, case: str, client: OpenAI, model: str, counts: bool) -> None:
        use = self.report.first.setdefault(case, FirstUse())
        first, again = self._time(client, model), self._time(client, model)
        if counts:
            use.first.append(first)
            use.again.append(again)

    def streams(self) -> None:
        """Time one stream a round on each server, while requests arrive beside it in a changing order."""
        gaps = {
            ON: Gaps(largest={SEEN: [], LOST: [], MEMORY: [], NEW: []}),
            OFF: Gaps(largest={COLD: []}),
        }
        other = itertools.cycle(serving.NAMES[1:])
        new: list[str] = []

        def make_new() -> str:
            new.append(self._new("ties", 2))
            return new[-1]

        models: dict[str, dict[str, Callable[[], str]]] = {
            ON: {SEEN: lambda: WARM_MERGE, MEMORY: lambda: next(other), NEW: make_new},
            OFF: {COLD: lambda: next(self._copy)},
        }
        for i in range(1 + self._work.requests):
            for name, client in self._clients.items():
                requests = []
                for case in _rotated(list(models[name]), i):
                    model = models[name][case]()
                    # The requests before it have taken the slot of SEEN's merge, so it is requested twice.
                    requests += [(each, model) for each in ((LOST, SEEN) if case == SEEN else (case,))]
                times, arrivals = _stream(client, requests, self._work.apart)
                if i > 0:
                    gaps[name].add(times, arrivals)
        gaps[ON].merged = self._logged(new[1:])
        self.report.gaps = gaps

    def besides(self) -> None:
        """Watch a stream while a new merge of each strategy is made, and while a plain adapter is loaded."""
        self._warm_up(WATCHED)
        cases: dict[str, Callable[[], Watch]] = {COLD: self._watch_load, QUIET_LONG: self._watch_nothing}
        for strategy in WATCHED:
            cases[f"{strategy}, 3 sources"] = partial(self._watch_merges, [(strategy, 3)])
        self._rounds(cases)

    def crowds(self) -> None:
        """Watch a stream while several clients at once request new merges, and while an adapter is loaded."""
        self._warm_up(sorted({strategy for strategy, _ in MIXED}))
        self._rounds({COLD: self._watch_load, CROWD: partial(self._watch_merges, MIXED)})

    def _warm_up(self, strategies: Sequence[str]) -> None:
        """Have the server compile what these merges need, by small ones."""
        for strategy in strategies:
            serving.complete(self._on, f"{strategy}({', '.join(map(_small, serving.NAMES))})")

    def _rounds(self, cases: Mapping[str, Callable[[], Watch]]) -> None:
        """Watch each case once a round, in a changing order, until it has enough rounds.

        The first does not count, except of what is slow.
        """
        rounds, spent = dict.fromkeys(cases, 0), dict.fromkeys(cases, 0.0)
        for case in cases:
            self.report.beside.setdefault(case, [])
        for i in range(1 + self._work.requests):
            for case in _rotated(list(cases), i):
                enough = spent[case] >= self._work.seconds and rounds[case] >= self._work.least
                if enough or rounds[case] == self._work.requests:
                    continue
                watch = cases[case]()
                spent[case] += watch.end
                if i > 0 or watch.end > SLOW:
                    rounds[case] += 1
                    self.report.beside[case].append(watch)

    def _watch_load(self) -> Watch:
        """A stream of the server without the plugin, beside which an adapter is loaded."""
        return _watch(self._off, [next(self._copy)], self._work.before, self._work.apart)

    def _watch_nothing(self) -> Watch:
        """A stream of the server with the plugin, alone."""
        return _watch_nothing(self._on, QUIET_SECONDS, self._work.before, self._work.apart)

    def _watch_merges(self, merges: Sequence[tuple[str, int]]) -> Watch:
        """A stream of the server with the plugin, beside which merges of these strategies are new."""
        specs = [self._new(strategy, sources) for strategy, sources in merges]
        watch = _watch(self._on, specs, self._work.before, self._work.apart)
        watch.merged = self._logged([spec for spec in specs if spec not in watch.failed])
        return watch


def _rotated(cases: list[str], turn: int) -> list[str]:
    turn %= len(cases)
    return cases[turn:] + cases[:turn]


def _stream(
    client: OpenAI, requests: Sequence[tuple[str, str]], apart: int
) -> tuple[list[float], list[Arrival]]:
    """The times of a stream's tokens, and the requests that were served beside it.

    requests: pairs of a case and a model; each is sent ``apart`` tokens after the one before was served.

    Raises MergeError if the stream ends before all were served.
    """
    times: list[float] = []
    arrivals: list[Arrival] = []
    under_way: Future[Arrival] | None = None
    due = apart
    with (
        ThreadPoolExecutor(1) as pool,
        client.completions.create(
            model="sql",
            prompt=serving.PROMPT,
            max_tokens=400,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        ) as stream,
    ):
        for _ in stream:
            times.append(time.perf_counter())
            if under_way is not None and under_way.done():
                arrivals.append(under_way.result())
                under_way, due = None, len(times) + apart
            if under_way is None and len(times) >= due:
                if len(arrivals) == len(requests):
                    return times, arrivals
                under_way = pool.submit(_arrive, client, *requests[len(arrivals)])
    raise MergeError(f"a stream ended after {len(arrivals)} of {len(requests)} requests beside it")


def _watch(client: OpenAI, models: Sequence[str], before: int, after: int) -> Watch:
    """A stream beside which several clients request these models at once, each for one token.

    before, after: tokens of the stream before the requests, and after the last one was served.

    Raises MergeError if the stream fails, and APIError if the only request does.
    """
    time.sleep(REST)
    with ThreadPoolExecutor(len(models)) as pool, Chain(client, "sql") as chain:
        chain.wait(before)
        begin = time.perf_counter()

        def ask(model: str) -> tuple[float, APIError | None]:
            try:
                serving.complete(client, model)
            except APIError as error:
                return time.perf_counter() - begin, error
            return time.perf_counter() - begin, None

        answers = list(pool.map(ask, models))
        chain.wait(after)
        times = _since(begin, chain)
    failed = {model: error for model, (_, error) in zip(models, answers, strict=True) if error is not None}
    if len(failed) == len(models):
        raise failed[models[0]]
    return Watch(
        times,
        list(models),
        first_token=[round(seconds, DIGITS) for seconds, error in answers if error is None],
        end=max(seconds for seconds, _ in answers),
        failed={model: str(error) for model, error in failed.items()},
    )


def _watch_nothing(client: OpenAI, seconds: float, before: int, after: int) -> Watch:
    """A stream beside which nothing is requested for so many seconds."""
    time.sleep(REST)
    with Chain(client, "sql") as chain:
        chain.wait(before)
        begin = time.perf_counter()
        time.sleep(seconds)
        end = time.perf_counter() - begin
        chain.wait(after)
        return Watch(_since(begin, chain), [], [], end)


def _since(begin: float, chain: Chain) -> list[float]:
    """Seconds from then on at which a stream's tokens arrived."""
    return [round(token - begin, DIGITS) for token in chain.times()]


def _arrive(client: OpenAI, case: str, model: str) -> Arrival:
    begin = time.perf_counter()
    serving.complete(client, model)
    return Arrival(case, begin, time.perf_counter())
