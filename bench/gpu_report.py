"""What is reported of a measurement on a GPU: its times, its row in the table, and its aims.

It knows nothing of devices, and importing it imports no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .timing import Aim, extremes, ratio


@dataclass
class Row:
    """A case and every time of it, in seconds.

    bytes: of everything that is read and of everything that is written.
    slot_rank: rank of the slots; None if there are none.
    seconds: lists of times by what was timed.  On the device: ``copy`` of as many bytes, our ``kernels``,
        and all work of a ``write``.  On the host: a ``call`` until the device has finished, the same until it
        returns (``queued``), and ``peft``'s call.
    work: lists of the device's times by the name of a kernel or a copy, all launches in a write together.
    """

    case: str
    spec: str
    dtype: str
    sources: int
    slot_rank: int | None
    bytes: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    work: dict[str, list[float]] = field(default_factory=dict)
    aims: list[Aim] = field(default_factory=list)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Row:
        """The row that ``dataclasses.asdict`` made this of."""
        return cls(**{**saved, "aims": [Aim(**aim) for aim in saved["aims"]]})

    def add(self, **seconds: float) -> None:
        """Append times by what was timed."""
        for name, value in seconds.items():
            self.seconds.setdefault(name, []).append(value)

    def add_work(self, seconds: Mapping[str, float]) -> None:
        """Append the device's times for a write, by the name of a kernel or a copy."""
        for name, value in seconds.items():
            self.work.setdefault(name, []).append(value)
        # Our kernels are named _verb_noun_kernel; names of torch's begin otherwise.
        ours = sum(value for name, value in seconds.items() if name.startswith("_"))
        self.add(kernels=ours, write=sum(seconds.values()))

    def aim(self, what: str, measured: float, limit: float, at_most: bool = True) -> None:
        """Give a number of this row a limit."""
        self.aims.append(Aim(what, measured, limit, at_most))

    def times_copy(self, name: str) -> float:
        """How many times as long as the copy something takes, by medians."""
        return ratio(self.seconds[name], self.seconds["copy"])

    def line(self) -> str:
        """The row of the table."""
        cells = {name: extremes(seconds, 1e6, 0) for name, seconds in self.seconds.items()}
        times, speed, peft = {}, "", ""
        if "copy" in cells:
            times = {name: f"{self.times_copy(name):.2f}" for name in ("kernels", "write")}
            speed = f"{self.bytes / statistics.median(self.seconds['kernels']) / 1e9:.0f}"
        if "peft" in cells:
            peft = f"  PEFT {cells['peft']}: {ratio(self.seconds['peft'], self.seconds['call']):.0f} times"
        return (
            f"  {self.case:30} {self.dtype:8} {self.sources or '':>2} {self.slot_rank or '':>5} "
            f"{self.bytes / 1e6:>5.0f}  {cells.get('copy', ''):17} {cells.get('kernels', ''):17} "
            f"{times.get('kernels', ''):>6} {speed:>5}  {cells.get('write', ''):20} "
            f"{times.get('write', ''):>6} {cells.get('call', ''):22} {cells.get('queued', '')}{peft}"
        ).rstrip()


HEADER = (
    "microseconds, median (fastest-slowest)\n"
    f"  {'case':30} {'dtype':8} {'N':>2} {'slots':>5} {'MB':>5}  {'copy':17} {'kernels':17} {'x copy':>6} "
    f"{'GB/s':>5}  {'write':20} {'x copy':>6} {'call':22} queued"
)
