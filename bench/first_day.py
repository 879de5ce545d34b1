"""Check and measure what some minutes on a new GPU allow, the most valuable first.

Everything is measured in worker processes, because a fault on a CUDA device ends the process that meets it:
if one dies or hangs, its item has failed, and the next process continues with the following item.  A process
takes long to start (torch, Triton, a CUDA context, sources), so each works off a whole list of items.  Checks
are shared among several processes; times are taken by one that has the device to itself.

Workers (``first_day_worker.py``) print a line of JSON for everything that begins or ends, and each line
changes the one file of results.  This process imports no torch.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from merged_lora.cores import usable_cores

from . import machine
from .gpu_report import HEADER, Row
from .recording import FAILED, WRONG, Record

MINUTES = 9.5
FILE = "first-day.json"
WORKER = (sys.executable, "-m", "merged_lora.bench.first_day_worker")
SHARE = 0.45
"""The largest share of the minutes for the checks."""
WORKERS = 8
"""The most processes that check at a time; there is at most one for two cores."""
PATIENCE = 10.0
"""Seconds that a process gets to end."""
DEVICE_LOST = 3
"""A worker's exit code if its device is of no more use."""
CUDA = "/usr/local/cuda/bin"
"""The folder of CUDA's tools if they are not on the path."""


@dataclass(frozen=True)
class Limits:
    """Seconds that a worker may take to start, for one check, for one row, and for the sanitizer."""

    start: float = 150.0
    check: float = 120.0
    row: float = 120.0
    sanitizer: float = 150.0


def new_record(file: Path) -> Record:
    """An empty record of a first day."""
    lists = ("checks", "rows", "withheld", "left_out", "failed", "not_reached")
    return Record(file, environment={}, sanitizer={}, device={}, **{name: [] for name in lists})


def has_failed(data: Mapping[str, Any]) -> bool:
    """Whether anything went wrong; a missed aim, or time that ran out, is not wrong."""
    wrong = any(check["wrong"] for check in data["checks"])
    return wrong or bool(data["failed"]) or data["sanitizer"].get("state") in (FAILED, WRONG)


def run(
    folder: Path,
    minutes: float = MINUTES,
    layers: int = 32,
    worker: Sequence[str] = WORKER,
    limits: Limits = Limits(),
) -> int:
    """Check and measure what the minutes allow and return the exit code, 1 if anything failed.

    folder: gets ``first-day.json`` and the workers' output.
    layers: number of layers of Llama-3-8B.
    worker: the command that gets a role and its arguments.
    """
    end = time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    record = new_record(folder / FILE)

    def work() -> None:
        record.set("environment", machine.environment() | {"minutes": minutes, "layers": layers})
        print(f"agreement, and compute-sanitizer beside it; results in {record.file}", flush=True)
        _check(Crew(folder, worker, record, limits), time.monotonic() + SHARE * 60 * minutes)
        checks = record.data["checks"]
        wrong = {key for check in checks if check["wrong"] for key in check["keys"]}
        right = {key for check in checks if not check["wrong"] for key in check["keys"]}
        agreed = sum(not check["wrong"] for check in checks)
        print(f"  {agreed} of {len(checks)} checks agree\n\n{HEADER}", flush=True)
        given = {"layers": layers, "wrong": sorted(wrong), "right": sorted(right)}
        with Crew(folder, worker, record, limits) as crew:
            crew.attempt("rows", partial(crew.follow, "rows", "rows", given, end, limits.row))

    return record.run(work, partial(has_failed, record.data), partial(_show, record.data))


def _check(crew: Crew, end: float) -> None:
    """Make all checks, several at a time because none is timed, and run the sanitizer beside them."""
    workers = max(1, min(WORKERS, usable_cores() // 2))
    watched_until = min(end, time.monotonic() + crew.limits.sanitizer)
    # The crew is left first, and ends what the threads of the pool wait for.
    with ThreadPoolExecutor(workers + 1) as pool, crew:
        steps = [pool.submit(crew.attempt, "sanitizer", partial(sanitize, crew, watched_until))]
        for i in range(workers):
            step, given = f"checks-{i}", {"part": i, "parts": workers}
            follow = partial(crew.follow, step, "checks", given, end, crew.limits.check)
            steps.append(pool.submit(crew.attempt, step, follow))
        for future in steps:
            future.result()


class Crew:
    """Starts workers and records their results; leaving the ``with`` statement ends all that run."""

    def __init__(self, folder: Path, worker: Sequence[str], record: Record, limits: Limits) -> None:
        self.worker = worker
        self.record = record
        self.limits = limits
        self._folder = folder
        self._running: set[subprocess.Popen[str]] = set()
        self._stopping = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        for process in list(self._running):
            _end(process)

    def attempt(self, step: str, do: Callable[[], None]) -> None:
        """Do a step; if it raises, record that it has failed."""
        try:
            do()
        except Exception:
            text = traceback.format_exc()
            self.record.add("failed", {"step": step, "item": "all of it", "text": text})

    def follow(self, step: str, role: str, given: Mapping[str, Any], end: float, item_seconds: float) -> None:
        """Have all items of a role worked off until ``end``, by one process after the other."""
        planned: list[dict[str, Any]] | None = None
        done = 0
        while (left := end - time.monotonic()) > 0 and not self._stopping:
            begun, why = False, ""
            arguments = json.dumps({**given, "skip": done, "seconds": left})
            with self.started(step, [*self.worker, role, arguments]) as (process, messages):
                while True:
                    limit, left = item_seconds if begun else self.limits.start, end - time.monotonic()
                    try:
                        message = messages.get(timeout=max(0.0, min(limit, left)))
                    except queue.Empty:
                        why = f"ended after {limit:.0f} s without a result" if left > limit else ""
                        break
                    if message is None:
                        _end(process, PATIENCE)
                        why = f"the process ended with {process.returncode}: {self.tail(step)}"
                        break
                    if "planned" in message:
                        planned = message["planned"]
                    elif "begin" in message:
                        begun = True
                    elif planned is not None and "end" in message:
                        begun, done = False, done + 1
                        self._record(step, planned[done - 1], message)
                    else:
                        self._record(step, {"name": step, "keys": []}, message)
            complete = planned is not None and (done == len(planned) or process.returncode == 0)
            if complete or not why or self._stopping:
                break
            if begun and planned is not None:
                done += 1
                self._record(step, planned[done - 1], {"failed": why})
            elif process.returncode != DEVICE_LOST:
                self.record.add("failed", {"step": step, "item": "start", "text": why})
                break
        if planned is None:
            self.record.add("not_reached", f"{step}: all of it")
        else:
            self.record.add("not_reached", *(f"{step}: {item['name']}" for item in planned[done:]))

    def _record(self, step: str, item: Mapping[str, Any], message: Mapping[str, Any]) -> None:
        """Record a worker's message about an item."""
        if "failed" in message:
            print(f"  {FAILED} {item['name']}", flush=True)
            self.record.add("failed", {"step": step, "item": item["name"], "text": message["failed"]})
        if step.startswith("checks"):
            self.record.add("checks", {**item, "wrong": message.get("failed", message.get("wrong"))})
        elif "device" in message:
            self.record.set("device", message["device"])
        elif "row" in message:
            self.record.add("rows", message["row"])
            print(Row.from_json(message["row"]).line(), flush=True)
        for name in ("withheld", "left_out"):
            if name in message:
                self.record.add(name, f"{item['name']}: {message[name]}")

    @contextmanager
    def started(
        self, step: str, command: Sequence[str]
    ) -> Iterator[tuple[subprocess.Popen[str], queue.Queue[dict[str, Any] | None]]]:
        """A process and its messages, None at the end; leaving ends it and all that it started.

        Its standard input stays open as long as this process lives, and its errors go to a file.
        """
        log = self._folder / f"{step}.log"
        with log.open("ab") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self._running.add(process)
        messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process, messages, log), daemon=True)
        reader.start()
        if self._stopping:  # since this was asked for
            _end(process)
        try:
            yield process, messages
        finally:
            _end(process)
            self._running.discard(process)
            reader.join(PATIENCE)

    def tail(self, step: str) -> str:
        """The last lines that a step's processes wrote."""
        text = (self._folder / f"{step}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-12:])


def _read(process: subprocess.Popen[str], messages: queue.Queue[dict[str, Any] | None], log: Path) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            messages.put(json.loads(line))
        else:  # from a tool around the worker
            with log.open("a") as out:
                out.write(line)
    messages.put(None)


def _end(process: subprocess.Popen[str], seconds: float = 0.0) -> None:
    """End a process and all that it started; it has some seconds to end by itself."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    with suppress(ProcessLookupError):  # the usual case: all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a process that waits for its device cannot be ended at once
        process.wait(PATIENCE)


def sanitize(crew: Crew, end: float) -> None:
    """Run small merges under compute-sanitizer's memcheck, if the machine has it."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=CUDA)
    if tool is None:
        crew.record.set("sanitizer", {"state": "not available"})
        return
    step = "sanitizer"
    # Without torch's own allocator, whose blocks are larger than what is asked for, an overrun is seen.
    memcheck = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--tool", "memcheck"]
    memcheck += ["--error-exitcode", "9", "--print-limit", "20"]
    merged: list[str] = []
    state, code = "out of time", None
    with crew.started(step, [*memcheck, *crew.worker, "sanitized", "{}"]) as (process, messages):
        try:
            while (message := messages.get(timeout=max(0.0, end - time.monotonic()))) is not None:
                merged += message.get("merged", [])
        except queue.Empty:
            pass  # out of time
        else:
            _end(process, PATIENCE)
            code = process.returncode
            state = {0: "clean", 9: WRONG}.get(code, FAILED)
    found = {"state": state, "code": code, "merged": merged, "output": crew.tail(step)}
    crew.record.set("sanitizer", found)


def _show(data: Mapping[str, Any]) -> None:
    """Print the short table at the end."""
    about = data["environment"]
    wrong = [check for check in data["checks"] if check["wrong"]]
    verdict = FAILED if has_failed(data) else data["state"]
    print(f"\n{verdict}: {about.get('gpu', '')}, torch {about.get('torch')}, Triton {about.get('triton')}")
    print(f"  commit {about.get('commit')}, {len(about.get('changed', ()))} changed files")
    print(f"  {'checks':12}{len(data['checks']) - len(wrong)} of {len(data['checks'])} agree")
    for check in wrong:
        print(f"    {WRONG} {check['name']}: {check['wrong'].strip().splitlines()[-1]}")
    print(f"  {'sanitizer':12}{data['sanitizer'].get('state', 'not reached')}")
    if "copy bytes per second" in data["device"]:
        copied = data["device"]["copy bytes per second"] / 1e9
        print(f"  {'copy':12}{copied:.0f} GB/s on {data['device'].get('gpu')}")
    print(f"  {'rows':12}{len(data['rows'])}")
    for aim in (aim for row in map(Row.from_json, data["rows"]) for aim in row.aims):
        print(f"  {aim.line()}")
    for failure in data["failed"]:
        last = failure["text"].strip().splitlines()[-1:]
        print(f"  {FAILED} {failure['step']}, {failure['item']}: {''.join(last)}")
    for name in ("withheld", "left_out", "not_reached"):
        for text in data[name][:20]:
            print(f"  {name.replace('_', ' ')}: {text}")
        if len(data[name]) > 20:
            print(f"  {name.replace('_', ' ')}: {len(data[name]) - 20} more")
