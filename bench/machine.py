"""What the measured machine is."""

import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .timing import once

COPIED = 128 << 20  # bytes; several times what a cache holds


def facts() -> dict[str, object]:
    """Name and value of everything that a time depends on."""
    measured: dict[str, object] = {
        "cpu": _cpu(),
        "cores": cores(),
        "load average": round(os.getloadavg()[0], 2),
        "copy GB/s": round(_copy_speed() / 1e9, 1),
        "python": platform.python_version(),
        "torch threads": torch.get_num_threads(),
    }
    return measured | {name: installed(name) for name in ("torch", "numpy", "numba", "peft")}


def show(facts: Mapping[str, object]) -> None:
    """Print them."""
    print("\nmachine")
    for name, value in facts.items():
        print(f"  {name:14}{value}")


def peak_memory(function: Callable[[], object]) -> int:
    """The most bytes of memory that a call takes beyond what the process has before; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def cores() -> int:
    """The number that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _copy_speed() -> float:
    """Bytes read and written per second by the fastest of a few large copies, on torch's threads."""
    source = torch.ones(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPIED / min(once(lambda: target.copy_(source)) for _ in range(3))


def installed(name: str) -> str:
    """The version of a distribution, in words where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
