"""Put random load on a real server from several clients, and watch for errors and growing memory.

python tests/serving/soak.py --minutes 30
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx
from openai import APIError, APIStatusError, AsyncOpenAI
from safetensors.torch import load_file, save_file

from merged_lora.bench import machine, serving
from merged_lora.bench.launcher import print_dot
from merged_lora.commands.running import terminated_cleanly
from merged_lora.errors import MergeError
from merged_lora.files.layout import WEIGHTS_NAME
from merged_lora.spec import MergeSpec, parse
from vllm_server import Server

CLIENTS = 6
TOKENS = 8
SEEN = 50
"""How many of the latest merges may be requested again."""
GUESTS = ("guest0", "guest1", "guest2")
"""Sources in the folder, whose weights change while the server runs."""
ALIASES = {"team": "0.5*sql + 0.5*json + 0.5*tone", "mix": "ties(0.5*sql, 0.5*tone)"}

WEIGHTS = {"plain": 20, "alias": 15, "seen": 20, "new": 25, "malformed": 12, "redefined": 6, "replaced": 2}
"""How often each kind of step is taken."""

MALFORMED = (
    "nobody",
    "ties(sql, nobody)",
    "ties(sql",
    "frob(sql, tone)",
    "ties(sql, tone, density=2)",
    "ties(sql, tone, dansity=0.5)",
    "slerp(sql, json, tone)",
    "sum(team, sql)",
    "cat(sql, json, tone, guest0, guest1)",
    "sql + ",
    f"sum({', '.join(f'{i}*s{i}' for i in range(20))})",
)
REFUSED = (400, 404)
"""Statuses that malformed specs get."""

WARM_UP, WARM_UP_SHARE = 120.0, 0.25
"""Seconds until memory is first read, at most, and as a share of the whole time."""
MINUTE = 60.0


@dataclass
class Counted:
    """What the clients saw.

    steps: how many of each kind were taken.
    refused: how many malformed requests were refused, as they must be.
    unexpected: every other error, in words.
    merges: distinct specs that were served.
    seconds: times of whole requests of TOKENS tokens, by kind.
    """

    steps: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    unexpected: list[str] = field(default_factory=list)
    merges: set[str] = field(default_factory=set)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The rows of the printed table."""
        steps = ", ".join(f"{count} {kind}" for kind, count in sorted(self.steps.items()))
        lines = [
            f"  requests        {sum(self.steps.values())}: {steps}",
            f"  distinct merges {len(self.merges)}",
            f"  errors          {self.refused} expected refusals, {len(self.unexpected)} unexpected",
        ]
        for kind, seconds in sorted(self.seconds.items()):
            p50, p99 = percentile(seconds, 50), percentile(seconds, 99)
            lines.append(f"  {kind:16}p50 {p50:.3f} s, p99 {p99:.3f} s of {len(seconds)}")
        return lines + [f"  UNEXPECTED {text}" for text in self.unexpected[:20]]


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least ``share`` per cent of all values do not exceed."""
    return sorted(values)[max(0, math.ceil(share / 100 * len(values)) - 1)]


def resident_bytes(session: int) -> int:
    """Resident bytes of all processes of a session; a shared page counts once for each process."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # After the name, which may hold spaces: state, parent, group, session.
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                total += int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:  # it has ended
            continue
    return total


def run(minutes: float, file: Path | None) -> int:
    """Load a server, print the counts, and return the exit code: 1 after an unexpected error.

    file: gets the counts as JSON.

    Raises MergeError if vLLM, the model or an adapter is missing.
    """
    serving.check()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for guest, name in zip(GUESTS, serving.NAMES, strict=True):
            shutil.copytree(serving.ADAPTERS / name, place / "sources" / guest)
        print("starting a server ", end="", flush=True)
        log, threads = place / "server.log", serving.threads()
        flags = _flags(place)
        server = Server(serving.MODEL, *flags, log=log, waiting=print_dot, environment=threads)
        with terminated_cleanly(), server:
            print(f" ready; {minutes:g} minutes of load from {CLIENTS} clients", flush=True)
            soak = Soak(server, place)
            asyncio.run(soak.load(minutes * MINUTE))
            soak.check()
            if soak.counted.unexpected:
                print(f"the end of the server's log:\n{server.tail()}")
    counted, resident = soak.counted, soak.resident
    print("\n".join(counted.lines()))
    shown = [f"{size / (1 << 20):.0f}" for _, size in resident]
    print(f"  resident MiB    {shown[0]} after warming up, {shown[-1]} at the end; {' '.join(shown)}")
    print(f"  held MiB        {', '.join(f'{size / (1 << 20):.1f}' for size in soak.held)}")
    if file is not None:
        report = {
            "date": date.today().isoformat(),
            "machine": machine.facts(),
            "minutes": minutes,
            "counted": asdict(counted) | {"merges": len(counted.merges)},
            "resident": resident,
        }
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: {file}")
    return 1 if counted.unexpected else 0


def _flags(place: Path) -> list[str]:
    return [
        *(*serving.FLAGS, "--max-loras", "2", "--max-cpu-loras", "3"),
        *("--enable-merged-lora", "--merged-lora-runtime-aliases"),
        *("--merged-lora-source-dir", str(place / "sources")),
        *serving.modules(serving.example_folders()),
        *("--merged-lora-modules", *(f"{alias}={spec}" for alias, spec in ALIASES.items())),
    ]


class Soak:
    """The clients and their steps.

    counted: what the clients saw.
    resident: pairs of seconds since the start and resident bytes of the server's processes, taken after the
        warm-up, every minute and at the end.
    held: bytes of the server's copies of adapters, at the same times.
    """

    def __init__(self, server: Server, place: Path) -> None:
        self.counted = Counted()
        self.resident: list[tuple[float, int]] = []
        self.held: list[int] = []
        self._server = server
        self._place = place
        self._random = random.Random()
        self._seen: list[str] = []
        self._steps: dict[str, Callable[[], Awaitable[None]]] = {
            "plain": self._plain,
            "alias": self._alias,
            "seen": self._ask_again,
            "new": self._new,
            "malformed": self._malformed,
            "redefined": self._redefine,
            "replaced": self._replace,
        }

    async def load(self, seconds: float) -> None:
        """Load the server for that many seconds."""
        begin = time.monotonic()
        end = begin + seconds
        url = f"{self._server.url}/v1"
        async with AsyncOpenAI(base_url=url, api_key="none", timeout=300, max_retries=0) as self._client:
            clients = [asyncio.create_task(self._steps_until(end)) for _ in range(CLIENTS)]
            await asyncio.sleep(min(WARM_UP, WARM_UP_SHARE * seconds))
            while time.monotonic() < end and self._server.running:
                await self._measure(begin)
                await asyncio.sleep(max(0.0, min(MINUTE, end - time.monotonic())))
            await asyncio.gather(*clients)
            await self._measure(begin)

    def check(self) -> None:
        """Count it as an error if the server has ended or no longer merges."""
        if not self._server.running:
            self.counted.unexpected.append("the server ended")
            return
        body = {"model": f"ties({self._random.random():.6f}*sql, tone)", "prompt": serving.PROMPT}
        try:
            status, reply = self._server.post("/v1/completions", body)
        except httpx.HTTPError as error:
            self.counted.unexpected.append(f"at the end: {error}")
        else:
            if status != 200:
                self.counted.unexpected.append(f"at the end: status {status}: {reply}")

    async def _measure(self, begin: float) -> None:
        self.resident.append((time.monotonic() - begin, resident_bytes(self._server.pid)))
        try:
            _, report = await asyncio.to_thread(self._server.get, "/v1/merged_lora")
            self.held.append(report["bytes_held"])
        except httpx.HTTPError as error:
            self.counted.unexpected.append(f"GET /v1/merged_lora: {error}")

    async def _steps_until(self, end: float) -> None:
        while time.monotonic() < end and self._server.running:
            (kind,) = self._random.choices(list(WEIGHTS), list(WEIGHTS.values()))
            self.counted.steps[kind] += 1
            try:
                await self._steps[kind]()
            except APIError as error:
                self.counted.unexpected.append(f"{kind}: {type(error).__name__}: {str(error)[:300]}")
                await asyncio.sleep(1)

    async def _plain(self) -> None:
        await self._ask("plain", self._random.choice(serving.NAMES))

    async def _alias(self) -> None:
        await self._ask("alias", self._random.choice(list(ALIASES)))

    async def _ask_again(self) -> None:
        if self._seen:
            await self._ask("seen", self._random.choice(self._seen))

    async def _new(self) -> None:
        spec = self._spec()
        if self._random.random() < 0.2:
            await self._ask("new", "base", {"merged_adapters": spec.to_json()})
        else:
            await self._ask("new", str(spec))
        self.counted.merges.add(str(spec))
        if not set(spec.names) & set(GUESTS):  # another merge as soon as its source has changed
            self._seen = [*self._seen, str(spec)][-SEEN:]

    async def _malformed(self) -> None:
        spec = self._random.choice(MALFORMED)
        try:
            await self._ask("malformed", spec)
        except APIStatusError as error:
            if error.status_code not in REFUSED:
                raise
            self.counted.refused += 1
        else:
            self.counted.unexpected.append(f"malformed: {spec!r} was served")

    async def _redefine(self) -> None:
        alias = self._random.choice(list(ALIASES))
        spec = str(self._spec())
        await self._client.post(f"/merged_lora/{alias}", body={"spec": spec}, cast_to=object)
        self.counted.merges.add(spec)

    async def _replace(self) -> None:
        """Give a source in the folder other weights, replacing its file atomically."""
        guest, name = self._random.choice(GUESTS), self._random.choice(serving.NAMES)
        factor = self._random.uniform(0.5, 1)
        await asyncio.to_thread(self._write, guest, name, factor)

    def _write(self, guest: str, name: str, factor: float) -> None:
        tensors = load_file(serving.ADAPTERS / name / WEIGHTS_NAME)
        first = next(iter(tensors))
        tensors[first] = tensors[first] * factor
        handle, new = tempfile.mkstemp(dir=self._place)
        os.close(handle)
        save_file(tensors, new, metadata={"format": "pt"})
        Path(new).replace(self._place / "sources" / guest / WEIGHTS_NAME)

    def _spec(self) -> MergeSpec:
        """A merge with weights that no earlier request had."""
        strategy = self._random.choice(
            ("sum", "cat", "svd", "slerp", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
        )
        count = 2 if strategy == "slerp" else self._random.choice((2, 3))
        names = self._random.sample([*serving.NAMES, *GUESTS], count)
        weights = [f"{self._random.uniform(0.1, 0.6):.6f}" for _ in names]
        terms = ", ".join(f"{weight}*{name}" for weight, name in zip(weights, names, strict=True))
        return parse(f"{strategy}({terms})")

    async def _ask(self, kind: str, model: str, more: dict[str, Any] | None = None) -> None:
        """Request a chat or a completion, whole or as a stream, which is sometimes left early."""
        chat, stream = self._random.random() < 0.5, self._random.random() < 0.5
        leaves = stream and self._random.random() < 0.2
        route: Any = self._client.chat.completions if chat else self._client.completions
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": serving.PROMPT}]}
        if not chat:
            asked = {"prompt": serving.PROMPT}
        extra = {"ignore_eos": True} | (more or {})
        begin = time.perf_counter()
        reply = await route.create(model=model, max_tokens=TOKENS, stream=stream, extra_body=extra, **asked)
        answered = reply.model if not stream else model
        if stream:
            async with reply:
                async for part in reply:
                    answered = part.model
                    if leaves:
                        break
        if answered != model:
            self.counted.unexpected.append(f"{kind}: {model!r} was answered by {answered!r}")
        if not leaves:
            self.counted.seconds.setdefault(kind, []).append(time.perf_counter() - begin)


def main(arguments: Sequence[str]) -> int:
    """Parse the command line, run the load and return the exit code: 2 if something is missing."""
    parser = argparse.ArgumentParser(prog="soak.py", description="Random load on a real server.")
    parser.add_argument("--minutes", type=float, default=30, metavar="M", help="30 by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there")
    options = parser.parse_args(arguments)
    if not 0 < options.minutes < math.inf:
        parser.error("--minutes must be above 0")
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        parser.error(f"{options.json} is not a file in a folder that exists")
    try:
        return run(options.minutes, options.json)
    except MergeError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
