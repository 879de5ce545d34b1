"""What the measured machine is, and what a process takes of its memory.  Importing this imports no torch."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from merged_lora.cores import usable_cores

from .timing import once

COPIED = 128 << 20
"""Bytes of the copy whose speed is measured: several times the size of a cache."""


def facts(*packages: str) -> dict[str, object]:
    """Name and value of everything about this machine's cores that a time depends on.

    packages: distributions whose versions are included beside the usual ones.
    """
    import torch

    return {
        "cpu": _cpu(),
        "cores": usable_cores(),
        "load average": round(os.getloadavg()[0], 2),
        "copy GB/s": round(_copy_speed() / 1e9, 1),
        "python": platform.python_version(),
        "torch threads": torch.get_num_threads(),
    } | {name: installed(name) for name in ("torch", "numpy", "numba", "peft", *packages)}


def environment() -> dict[str, object]:
    """The tree, the machine, its GPU and every version, found without torch."""
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
    names = ("torch", "triton", "numpy", "peft", "transformers", "safetensors", "vllm")
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "gpu": output_of("nvidia-smi", query, "--format=csv,noheader"),
        "commit": output_of("git", "rev-parse", "HEAD"),
        "changed": output_of("git", "status", "--porcelain").splitlines(),
        "python": platform.python_version(),
        "cores": usable_cores(),
        "interpreter": os.environ.get("TRITON_INTERPRET", ""),
        "nvidia-smi": output_of("nvidia-smi"),
    } | {name: installed(name) for name in names}


def show(facts: Mapping[str, object]) -> None:
    """Print facts."""
    print("\nmachine")
    for name, value in facts.items():
        print(f"  {name:24}{value}")


def installed(name: str) -> str:
    """The version of a distribution, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def output_of(*command: str) -> str:
    """What a tool prints, or "unknown" with the reason if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return done.stdout.strip() if done.returncode == 0 else f"unknown: {done.stderr.strip()}"


def peak_memory(function: Callable[[], object]) -> int:
    """The most bytes that a call takes on top of what the process has before it; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _copy_speed() -> float:
    """Bytes read and written per second by the fastest of a few large copies on torch's threads."""
    import torch

    source = torch.ones(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPIED / min(once(lambda: target.copy_(source)) for _ in range(3))
