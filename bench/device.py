"""A GPU's own clock, what the GPU is, and how fast it copies. Knows nothing of merging."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton

from .machine import installed

Call = Callable[[], object]

CYCLES = 2.0e9  # of a GPU's clock per second, about; a wrong guess is noticed, see CudaTimer.on_device
FIRST_HOLD = 0.02  # seconds
TRIES = 5


@dataclass(frozen=True)
class DeviceTimes:
    """Seconds of each of several functions on the device.  gapless: the device never waited for the host."""

    seconds: list[float]
    gapless: bool


@dataclass(frozen=True)
class KernelTimes:
    """For each of several functions the seconds of its Triton kernels by name, all launches together.

    gapless: as in DeviceTimes.
    """

    seconds: list[dict[str, float]]
    gapless: bool


class Timer(Protocol):
    """What the benchmark asks of a clock; tests have one for machines without a GPU."""

    device: torch.device

    def on_device(self, functions: Sequence[Call], held: bool = True) -> DeviceTimes:
        """How long the device works for each function; they are called in their order, none waits.

        held: queue everything before the device starts.  Not for functions that wait for the device.
        """
        ...

    def in_kernels(self, functions: Sequence[Call], held: bool = True) -> KernelTimes:
        """As :meth:`on_device`, but of the Triton kernels that they launch alone."""
        ...

    def until_done(self, function: Call) -> tuple[float, float]:
        """Seconds by the host's clock until the function returns, and until the device has finished too."""
        ...

    def facts(self) -> dict[str, object]:
        """Name and value of everything about the device that a time depends on."""
        ...


class CudaTimer:
    """Times by events on the current stream of a CUDA or ROCm device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._hold = FIRST_HOLD

    def on_device(self, functions: Sequence[Call], held: bool = True) -> DeviceTimes:
        """See :class:`Timer`.

        An event pair around a call measures the device alone only while the device is behind the host, so a
        kernel that spins is queued first.  Whether it still ran when all was queued is looked at afterwards;
        where it did not, the same is measured again behind a longer one.
        """
        if not held:
            return DeviceTimes(self._queue(functions, 0.0)[0], False)
        for _ in range(TRIES):
            seconds, gapless, queueing = self._queue(functions, self._hold)
            self._hold = max(FIRST_HOLD, 2 * queueing)
            if gapless:
                break
        return DeviceTimes(seconds, gapless)

    def in_kernels(self, functions: Sequence[Call], held: bool = True) -> KernelTimes:
        """See :class:`Timer`."""
        watched = [Watched(function) for function in functions]
        gapless = self.on_device(watched, held).gapless
        return KernelTimes([one.seconds() for one in watched], gapless)

    def _queue(self, functions: Sequence[Call], hold: float) -> tuple[list[float], bool, float]:
        """Seconds of each, whether the device was held back long enough, and how long queueing took."""
        pairs = [(_event(), _event()) for _ in functions]
        torch.cuda.synchronize(self.device)
        if hold:
            torch.cuda._sleep(int(hold * CYCLES))  # type: ignore[no-untyped-call]
        begin = time.perf_counter()
        for function, (start, end) in zip(functions, pairs, strict=True):
            start.record()
            function()
            end.record()
        gapless = not pairs[0][0].query()  # type: ignore[no-untyped-call]
        queueing = time.perf_counter() - begin
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs], gapless, queueing

    def until_done(self, function: Call) -> tuple[float, float]:
        """See :class:`Timer`."""
        torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        function()
        queued = time.perf_counter() - begin
        torch.cuda.synchronize(self.device)
        return queued, time.perf_counter() - begin

    def facts(self) -> dict[str, object]:
        """See :class:`Timer`."""
        gpu = torch.cuda.get_device_properties(self.device)
        return {
            "gpu": gpu.name,
            "multiprocessors": gpu.multi_processor_count,
            "memory GiB": round(gpu.total_memory / 2**30, 1),
            "L2 MB": round(gpu.L2_cache_size / 1e6, 1),
            "driver": _driver(),
            "cuda": torch.version.cuda or "none",
            "rocm": torch.version.hip or "none",
            "python": platform.python_version(),
        } | {name: installed(name) for name in ("torch", "triton", "numpy", "peft")}


class Watched:
    """A function whose Triton kernels are timed, by an event before and one behind each launch.

    Triton calls the hooks; torch's current stream is the one that it launches on.
    """

    def __init__(self, function: Call) -> None:
        self._function = function
        self._launches: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self) -> None:
        """Call it; what an earlier call launched is forgotten."""
        self._launches = []
        before, behind = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
        before.add(self._enter)
        behind.add(self._leave)
        try:
            self._function()
        finally:
            before.remove(self._enter)
            behind.remove(self._leave)

    def _enter(self, metadata: Any) -> None:
        self._launches.append((metadata.get()["name"], _event(), _event()))
        self._launches[-1][1].record()

    def _leave(self, metadata: Any) -> None:
        self._launches[-1][2].record()

    def seconds(self) -> dict[str, float]:
        """By the name of the kernel; the device must have finished."""
        found: dict[str, float] = {}
        for name, start, end in self._launches:
            found[name] = found.get(name, 0.0) + start.elapsed_time(end) / 1e3
        return found


class Copies:
    """Copies of ``nbytes // 2`` bytes each from place to place on the device: they read and write ``nbytes``.

    turns: how many places to take in turn, so that none is found in a cache.
    """

    def __init__(self, device: torch.device, nbytes: int, turns: int) -> None:
        shape = (turns, max(1, nbytes // 1024), 512)
        self._source = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)

    def __call__(self, turn: int) -> None:
        """Copy the next."""
        turn %= len(self._source)
        self._target[turn].copy_(self._source[turn])


def copy_speed(timer: Timer, nbytes: int, rounds: int) -> float:
    """Bytes read and written per second by large copies, median."""
    copies = Copies(timer.device, nbytes, 1)
    seconds = timer.on_device([lambda: copies(0)] * (1 + rounds)).seconds[1:]
    return nbytes // 1024 * 1024 / statistics.median(seconds)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _driver() -> str:
    """The driver's version, as its own tool tells it."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.stdout.split("\n")[0].strip()
