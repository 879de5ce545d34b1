"""A GPU's first day: is what the kernels make right, and how fast are they, in so many minutes, by worth.

What is measured happens in worker processes, because a fault on a CUDA device ends the process that meets
it: where one dies or hangs, that item has failed, and the next process goes on behind it.  A process takes
long to start (torch, Triton, a CUDA context, sources), so each works off a whole list of items.  Checks are
shared out to several at a time; times are taken by one that has the device to itself.

Workers (``first_day_worker.py``) print a line of JSON for everything that begins or ends; each line changes
the one file of results.  This process imports no torch.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import recording
from .gpu_report import HEADER, Row

MINUTES = 9.5
FILE = "first-day.json"
WORKER = (sys.executable, "-m", "merged_lora.bench.first_day_worker")
SHARE = 0.45
"""Of the minutes: what the checks may take at most."""
WORKERS = 8
"""That check at a time, at most, and at most one for two cores."""
PATIENCE = 10.0
"""Seconds that a process gets to end."""
CUDA = "/usr/local/cuda/bin"
"""Where CUDA's tools lie if they are not on the path."""


@dataclass(frozen=True)
class Limits:
    """Seconds that a worker may take to start, for one check, for one row, and for the sanitizer."""

    start: float = 150.0
    check: float = 120.0
    row: float = 120.0
    sanitizer: float = 150.0


class Results:
    """Everything found so far, in a file that is whole at any moment."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.data: dict[str, Any] = {
            "state": "running",
            "environment": {},
            "checks": [],
            "sanitizer": {},
            "device": {},
            "rows": [],
            "withheld": [],
            "left out": [],
            "failed": [],
            "not reached": [],
        }
        self._lock = threading.Lock()

    def set(self, name: str, value: object) -> None:
        """Put something in its place."""
        with self._lock:
            self.data[name] = value
            recording.write(self.file, self.data)

    def add(self, name: str, *values: object) -> None:
        """Put something at the end of its list."""
        with self._lock:
            self.data[name].extend(values)
            recording.write(self.file, self.data)

    @property
    def failed(self) -> bool:
        """Whether anything went wrong; an aim that is missed, or time that ran out, is not wrong."""
        sanitizer = self.data["sanitizer"].get("state", "")
        wrong = any(check["wrong"] for check in self.data["checks"])
        return wrong or bool(self.data["failed"]) or sanitizer in (recording.FAILED, recording.WRONG)


def run(
    folder: Path,
    minutes: float = MINUTES,
    layers: int = 32,
    worker: Sequence[str] = WORKER,
    limits: Limits = Limits(),
) -> int:
    """Check and measure what the minutes allow; the exit code, 1 where anything failed.

    folder: gets ``first-day.json`` and the workers' output.  layers: of Llama-3-8B.  worker: the command that
    is handed a role and its arguments.
    """
    end = time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / FILE)
    crew = Crew(folder, worker, results, limits)
    recording.end_on_terminate()
    try:
        results.set("environment", environment() | {"minutes": minutes, "layers": layers})
        print(f"agreement, and compute-sanitizer beside it; results in {results.file}", flush=True)
        _check(crew, results, time.monotonic() + SHARE * 60 * minutes, limits)
        checks = results.data["checks"]
        print(
            f"  {sum(not c['wrong'] for c in checks)} of {len(checks)} checks agree\n\n{HEADER}", flush=True
        )
        arguments = {"layers": layers, "withheld": withheld(checks), "vouched": vouched(checks)}
        with _told(results, "rows"):
            crew.follow("rows", "rows", arguments, end, limits.row)
        results.set("state", "finished")
    except KeyboardInterrupt:
        crew.stop()
        results.set("state", "interrupted")
        _show(results)
        return recording.interrupted()
    _show(results)
    return 1 if results.failed else 0


@contextmanager
def _told(results: Results, step: str) -> Iterator[None]:
    """Note what a step raises; the next one is done."""
    try:
        yield
    except Exception:
        results.add("failed", {"step": step, "item": "all of it", "text": traceback.format_exc()})


def _check(crew: Crew, results: Results, end: float, limits: Limits) -> None:
    """All that can be done beside each other, because nothing of it is timed."""
    workers = max(1, min(WORKERS, len(os.sched_getaffinity(0)) // 2))
    pool = ThreadPoolExecutor(workers + 1)
    try:
        watched_until = min(end, time.monotonic() + limits.sanitizer)
        waiting = {"sanitizer": pool.submit(_sanitize, crew, results, watched_until)}
        for i in range(workers):
            step, arguments = f"checks-{i}", {"part": i, "parts": workers}
            waiting[step] = pool.submit(crew.follow, step, "checks", arguments, end, limits.check)
        for step, one in waiting.items():
            with _told(results, step):
                one.result()
    except KeyboardInterrupt:
        crew.stop()
        raise
    finally:
        pool.shutdown()


def vouched(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that a check vouches for."""
    return sorted({key for check in checks if not check["wrong"] for key in check["keys"]})


def withheld(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of checks that failed: what stands on them is not timed."""
    return sorted({key for check in checks if check["wrong"] for key in check["keys"]})


class Crew:
    """Starts workers, hears what they tell, and ends them when they take too long."""

    def __init__(self, folder: Path, worker: Sequence[str], results: Results, limits: Limits) -> None:
        self._folder = folder
        self.worker = worker
        self._results = results
        self._limits = limits
        self._running: set[subprocess.Popen[str]] = set()
        self._stopping = False

    def follow(
        self, step: str, role: str, arguments: Mapping[str, Any], end: float, item_seconds: float
    ) -> None:
        """Have all items of a role worked off until ``end``, by one process after the other."""
        planned: list[dict[str, Any]] | None = None
        done = 0
        while (left := end - time.monotonic()) > 0 and not self._stopping:
            given = {**arguments, "skip": done, "seconds": left}
            begun, why = False, ""
            with self.started(step, [*self.worker, role, json.dumps(given)]) as (process, messages):
                while True:
                    limit = item_seconds if begun else self._limits.start
                    left = end - time.monotonic()
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
                        self._take(step, planned[done - 1], message)
                    else:
                        self._take(step, {"name": step, "keys": []}, message)
            over = planned is not None and (done == len(planned) or process.returncode == 0)
            if over or not why or self._stopping:
                break
            if begun and planned is not None:
                done += 1
                self._take(step, planned[done - 1], {"failed": why})
            elif process.returncode != recording.LOST:
                self._results.add("failed", {"step": step, "item": "start", "text": why})
                break
        if planned is None:
            self._results.add("not reached", f"{step}: all of it")
        else:
            self._results.add("not reached", *(f"{step}: {item['name']}" for item in planned[done:]))

    def _take(self, step: str, item: Mapping[str, Any], message: Mapping[str, Any]) -> None:
        """Note what a worker told of an item."""
        if "failed" in message:
            print(f"  {recording.FAILED} {item['name']}", flush=True)
            self._results.add("failed", {"step": step, "item": item["name"], "text": message["failed"]})
        if step.startswith("checks"):
            wrong = message.get("failed", message.get("wrong"))
            self._results.add("checks", {**item, "wrong": wrong})
        elif "device" in message:
            self._results.set("device", message["device"])
        elif "row" in message:
            self._results.add("rows", message["row"])
            print(Row.read(message["row"]).line(), flush=True)
        elif "withheld" in message:
            self._results.add("withheld", f"{item['name']}: {message['withheld']}")
        elif "left out" in message:
            self._results.add("left out", message["left out"])

    @contextmanager
    def started(
        self, step: str, command: Sequence[str]
    ) -> Iterator[tuple[subprocess.Popen[str], queue.Queue[dict[str, Any] | None]]]:
        """A process and what it tells, None at the end; leaving ends it and all that it started.

        Its standard input stays open as long as this process lives, its errors go to a file.
        """
        with self._log(step).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._running.add(process)
        messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process, messages, self._log(step)), daemon=True)
        reader.start()
        if self._stopping:  # since this was asked for
            _end(process)
        try:
            yield process, messages
        finally:
            _end(process)
            self._running.discard(process)
            reader.join(PATIENCE)

    def stop(self) -> None:
        """End all that runs."""
        self._stopping = True
        for process in list(self._running):
            _end(process)

    def _log(self, step: str) -> Path:
        return self._folder / f"{step}.log"

    def tail(self, step: str) -> str:
        """The end of what a step's processes had to say."""
        return recording.last_lines(self._log(step).read_text(errors="replace"))


def _read(process: subprocess.Popen[str], messages: queue.Queue[dict[str, Any] | None], log: Path) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            messages.put(json.loads(line))
        else:  # what a tool around the worker has to say
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


# What is found without a worker


def environment() -> dict[str, Any]:
    """The machine, the tree and the versions."""
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
    found: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "gpu": _said("nvidia-smi", query, "--format=csv,noheader"),
        "commit": _said("git", "rev-parse", "HEAD"),
        "changed": _said("git", "status", "--porcelain").splitlines(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "interpreter": os.environ.get("TRITON_INTERPRET", ""),
    }
    for name in ("torch", "triton", "numpy", "peft", "transformers", "safetensors", "vllm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found | {"nvidia-smi": _said("nvidia-smi")}


def _said(*command: str) -> str:
    """What a tool prints; why it does not, where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return done.stdout.strip() if done.returncode == 0 else f"unknown: {done.stderr.strip()}"


def _sanitize(crew: Crew, results: Results, end: float) -> None:
    """Small merges under compute-sanitizer's memcheck, where the machine has it."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=CUDA)
    if tool is None:
        results.set("sanitizer", {"state": "not available"})
        return
    step = "sanitizer"
    # Without torch's own allocator, whose blocks are larger than what is asked for, an overrun is seen.
    memcheck = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--tool", "memcheck"]
    memcheck += ["--error-exitcode", "9", "--print-limit", "20"]
    told: list[str] = []
    code: int | None = None
    with crew.started(step, [*memcheck, *crew.worker, "sanitized", "{}"]) as (process, messages):
        try:
            while (message := messages.get(timeout=max(0.0, end - time.monotonic()))) is not None:
                told += message.get("merged", [])
        except queue.Empty:
            state = "out of time"
        else:
            _end(process, PATIENCE)
            code = process.returncode
            state = {0: "clean", 9: recording.WRONG}.get(code or 0, recording.FAILED)
    results.set("sanitizer", {"state": state, "code": code, "merged": told, "output": crew.tail(step)})


def _show(results: Results) -> None:
    """The short table at the end."""
    data = results.data
    about = data["environment"]
    wrong = [check for check in data["checks"] if check["wrong"]]
    verdict = recording.FAILED if results.failed else data["state"]
    print(f"\n{verdict}: {about.get('gpu', '')}, torch {about.get('torch')}, Triton {about.get('triton')}")
    print(f"  commit {about.get('commit')}, {len(about.get('changed', ()))} changed files")
    print(f"  {'checks':12}{len(data['checks']) - len(wrong)} of {len(data['checks'])} agree")
    for check in wrong:
        print(f"    {recording.WRONG} {check['name']}: {check['wrong'].strip().splitlines()[-1]}")
    print(f"  {'sanitizer':12}{data['sanitizer'].get('state', 'not reached')}")
    if "copy bytes per second" in data["device"]:
        copied = data["device"]["copy bytes per second"] / 1e9
        print(f"  {'copy':12}{copied:.0f} GB/s on {data['device'].get('gpu')}")
    print(f"  {'rows':12}{len(data['rows'])}")
    for row in map(Row.read, data["rows"]):
        for aim in row.aims:
            print(f"  {aim.line()}")
    for failure in data["failed"]:
        last = failure["text"].strip().splitlines()[-1:]
        print(f"  {recording.FAILED} {failure['step']}, {failure['item']}: {''.join(last)}")
    for title in ("withheld", "left out", "not reached"):
        for text in data[title][:20]:
            print(f"  {title}: {text}")
        if len(data[title]) > 20:
            print(f"  {title}: {len(data[title]) - 20} more")
    print(f"written: {results.file}", flush=True)
