"""How long a GPU works, what the GPU is, and how fast it copies.  It knows nothing of merging."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from .machine import installed, output_of

Call = Callable[[], object]


class Timer(Protocol):
    """The clocks that the benchmark needs; tests have one for machines without a GPU."""

    device: torch.device

    def on_device(self, functions: Sequence[Call]) -> Mapping[str, float]:
        """Seconds that the device works for one of these functions, by the name of a kernel or a copy.

        The functions are called in their order; the times are means over them.
        """
        ...

    def until_done(self, function: Call) -> tuple[float, float]:
        """Seconds on the host until the function returns, and until the device has finished too."""
        ...

    def facts(self) -> dict[str, object]:
        """Name and value of everything about the device that a time depends on."""
        ...


class CudaTimer:
    """The times of a CUDA or ROCm device, by the activities that torch's profiler records.

    An activity has the device's own timestamps, so the times hold no wait for the host, however slow it is.
    ``triton.testing.do_bench`` would time such waits, and a merge that uploads tables can not be captured in
    a CUDA graph.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def on_device(self, functions: Sequence[Call]) -> dict[str, float]:
        """See :class:`Timer`.  Raises RuntimeError if the profiler records nothing."""
        torch.cuda.synchronize(self.device)
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            for function in functions:
                function()
            torch.cuda.synchronize(self.device)
        seconds: dict[str, float] = {}
        for event in recorded.events():
            if event.device_type.name == "CUDA":
                took = event.time_range.elapsed_us() / 1e6 / len(functions)
                seconds[event.name] = seconds.get(event.name, 0.0) + took
        if not seconds:
            raise RuntimeError("torch's profiler recorded no work of the device")
        return seconds

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
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return {
            "gpu": gpu.name,
            "multiprocessors": gpu.multi_processor_count,
            "memory GiB": round(gpu.total_memory / 2**30, 1),
            "L2 MB": round(gpu.L2_cache_size / 1e6, 1),
            "driver": driver.partition("\n")[0],
            "cuda": torch.version.cuda or "none",
            "rocm": torch.version.hip or "none",
            "python": platform.python_version(),
        } | {name: installed(name) for name in ("torch", "triton", "numpy", "peft")}


class Copies:
    """Copies of ``nbytes // 2`` bytes each from place to place on the device: they read and write ``nbytes``.

    turns: number of places that are copied in turn, so that none is found in a cache.
    """

    def __init__(self, device: torch.device, nbytes: int, turns: int) -> None:
        shape = (turns, max(1, nbytes // 1024), 512)
        self._source = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)

    def __call__(self, turn: int) -> None:
        """Copy the place of that number."""
        self._target[turn].copy_(self._source[turn])


def copy_speed(timer: Timer, nbytes: int, rounds: int) -> float:
    """Bytes read and written per second by large copies, median."""
    copies = Copies(timer.device, nbytes, 1)
    seconds = [sum(timer.on_device([lambda: copies(0)]).values()) for _ in range(1 + rounds)]
    return nbytes // 1024 * 1024 / statistics.median(seconds[1:])
