"""What is told of a measurement on a GPU: its times, their row in the table, and the aims they are held to.

Knows nothing of devices.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .timing import Aim, ratio, shown


@dataclass
class Row:
    """A case and every time of it.

    bytes: of all sources and of all that is written.  slot_rank: None where nothing is written.
    seconds: by what was timed: ``copy``, ``kernels``, ``write`` (by device events), ``call`` and ``queued``
    (by the host's clock, until the device has finished and until the call returns), ``peft``.
    kernels: seconds by the name of a Triton kernel, all its launches in one call together.
    gapless: the device never waited for the host while ``copy``, ``kernels`` and ``write`` were timed.
    """

    case: str
    spec: str
    dtype: str
    sources: int
    slot_rank: int | None
    bytes: int
    gapless: bool = True
    seconds: dict[str, list[float]] = field(default_factory=dict)
    kernels: dict[str, list[float]] = field(default_factory=dict)
    aims: list[Aim] = field(default_factory=list)

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> Row:
        """The row that ``dataclasses.asdict`` made this of."""
        return cls(**{**saved, "aims": [Aim(**aim) for aim in saved["aims"]]})

    def add(self, name: str, seconds: float) -> None:
        """Keep a time."""
        self.seconds.setdefault(name, []).append(seconds)

    def add_kernels(self, by_name: Mapping[str, float]) -> None:
        """Keep the times of the kernels of one call."""
        for name, seconds in by_name.items():
            self.kernels.setdefault(name, []).append(seconds)
        self.add("kernels", sum(by_name.values()))

    def aim(self, what: str, measured: float, limit: float, at_most: bool = True) -> None:
        """Hold the row to a limit."""
        self.aims.append(Aim(what, measured, limit, at_most))

    def times_copy(self, name: str) -> float:
        """How many times the copy's time, by medians."""
        return ratio(self.seconds[name], self.seconds["copy"])

    def line(self) -> str:
        """The row of the table."""
        cells = {name: shown(seconds, 1e6, 0) for name, seconds in self.seconds.items()}
        copied = "copy" in cells
        times = {n: f"{self.times_copy(n):.2f}" for n in ("kernels", "write") if copied and n in cells}
        fastest = self.seconds.get("kernels") or self.seconds.get("write")
        speed = f"{self.bytes / statistics.median(fastest) / 1e9:.0f}" if copied and fastest else ""
        peft = ""
        if "peft" in cells:
            peft = f"  PEFT {cells['peft']}: {ratio(self.seconds['peft'], self.seconds['call']):.0f} times"
        return (
            f"  {self.case:30} {self.dtype:8} {self.sources or '':>2} {self.slot_rank or '':>5} "
            f"{self.bytes / 1e6:>5.0f}  {cells.get('copy', ''):17} {cells.get('kernels', ''):17} "
            f"{times.get('kernels', ''):>6} {speed:>5}  {cells.get('write', ''):20} "
            f"{times.get('write', ''):>6}{' ' if self.gapless else '*'} {cells.get('call', ''):22} "
            f"{cells.get('queued', '')}{peft}"
        ).rstrip()


HEADER = (
    "microseconds, median (fastest-slowest); *: the device waited for the host\n"
    f"  {'case':30} {'dtype':8} {'N':>2} {'slots':>5} {'MB':>5}  {'copy':17} {'kernels':17} {'x copy':>6} "
    f"{'GB/s':>5}  {'write':20} {'x copy':>6}  {'call':22} queued"
)
