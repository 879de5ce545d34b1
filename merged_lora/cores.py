"""The cores that a process may keep busy, and threads that leave them to others.  Imports no torch."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath


def usable_cores(allowed: Collection[int] | None = None, root: Path = Path("/")) -> int:
    """Number of cores that this process can keep busy: those it may run on, within the quota of its cgroups.

    allowed: numbers of the cores that it may run on; by default those of the calling thread.
    root:    where ``proc`` and ``sys`` are.
    """
    if allowed is None:
        known = hasattr(os, "sched_getaffinity")  # Linux
        allowed = os.sched_getaffinity(0) if known else range(os.cpu_count() or 1)
    return min([max(1, len(allowed)), *map(math.ceil, _quotas(root))])


def raise_nice(nice: int) -> None:
    """Give the calling thread at least this nice value.

    Only root may lower one, so a thread that is nicer already, as in a server started by ``nice``, stays so.
    """
    own = threading.get_native_id()  # Linux knows the nice value of a single thread, as if it were a process
    if os.getpriority(os.PRIO_PROCESS, own) < nice:
        os.setpriority(os.PRIO_PROCESS, own, nice)


def _quotas(root: Path) -> Iterator[float]:
    """The time that each cgroup of this process may take of all cores together, in cores.

    In a container the uppermost folder may be that of its own group, though the group's name is the host's.
    So a folder that does not exist counts as a group without a quota.
    """
    for folder, one_file in _groups(root):
        with contextlib.suppress(OSError, ValueError):  # or "max"
            if one_file:
                quota, period = (float(word) for word in (folder / "cpu.max").read_text().split())
            else:
                quota, period = (float((folder / f"cpu.cfs_{x}_us").read_text()) for x in ("quota", "period"))
            if quota > 0:
                yield quota / period


def _groups(root: Path) -> Iterator[tuple[Path, bool]]:
    """Folders of the cgroups of this process that may have a quota, and whether they are of version 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):  # not Linux, or a name that cannot be decoded
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = PurePosixPath(name)
        for each in (group, *group.parents):
            yield top / each.relative_to("/"), not controllers
