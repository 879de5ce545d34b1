"""How many cores a process can keep busy, and how its threads give way."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from merged_lora.cores import raise_nice, usable_cores
from merged_lora.cpu_kernels.pool import Pool

ALLOWED = range(64)


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A folder with what Linux says of a process and of its cgroups.

    groups: content of ``/proc/self/cgroup``.
    files:  content by path in ``/sys/fs/cgroup``.
    """
    for name, text in {
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{n}": t for n, t in files.items()},
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        pytest.param("0::/\n", {"cpu.max": "800000 100000\n"}, 8, id="a container"),
        pytest.param("0::/\n", {"cpu.max": "250000 100000\n"}, 3, id="a part of a core"),
        pytest.param("0::/\n", {"cpu.max": "max 100000\n"}, 64, id="no quota"),
        pytest.param("0::/\n", {}, 64, id="the uppermost group has no file"),
        pytest.param("0::/\n", {"cpu.max": "9900000 100000\n"}, 64, id="a quota of more than there are"),
        pytest.param(
            "0::/a/b\n",
            {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "600000 100000\n"},
            4,
            id="a group of a group",
        ),
        pytest.param(
            "4:memory:/x\n1:cpu,cpuacct:/x\n0::/\n",
            {"cpu/x/cpu.cfs_quota_us": "150000\n", "cpu/x/cpu.cfs_period_us": "50000\n"},
            3,
            id="version 1",
        ),
        pytest.param(
            "1:cpu:/docker/abc\n",
            {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            2,
            id="version 1 in a container that knows the host's name of its group",
        ),
        pytest.param(
            "1:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            64,
            id="version 1 without a quota",
        ),
    ],
)
def test_a_quota_of_a_cgroup_bounds_the_cores(
    tmp_path: Path, groups: str, files: dict[str, str], cores: int
) -> None:
    assert usable_cores(ALLOWED, machine(tmp_path, groups, files)) == cores


def test_without_cgroups_the_cores_are_those_that_the_thread_may_run_on(tmp_path: Path) -> None:
    assert usable_cores(root=tmp_path) == len(os.sched_getaffinity(0))
    assert usable_cores({3, 5, 7}, tmp_path) == 3


class Kernel:
    """What Linux does about nice values for an ordinary user.

    nice: of every thread at first.
    """

    def __init__(self, nice: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nice = nice
        self.values: dict[int, int] = {}
        monkeypatch.setattr(os, "getpriority", self.get)
        monkeypatch.setattr(os, "setpriority", self.set)

    def get(self, which: int, who: int) -> int:
        assert which == os.PRIO_PROCESS
        return self.values.get(who, self.nice)

    def set(self, which: int, who: int, nice: int) -> None:
        if nice < self.get(which, who):
            raise PermissionError(13, "Permission denied")
        self.values[who] = nice


@pytest.mark.parametrize(("before", "after"), [(0, 10), (10, 10), (15, 15)])
def test_a_thread_becomes_nicer_and_never_less_nice(
    before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(before, monkeypatch)
    raise_nice(10)
    assert kernel.get(os.PRIO_PROCESS, threading.get_native_id()) == after


def test_threads_start_in_a_process_that_is_nicer_than_they_have_to_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = Kernel(15, monkeypatch)
    own = Pool(2, nice=10).each(lambda _: threading.get_native_id(), range(8))
    assert {kernel.get(os.PRIO_PROCESS, each) for each in own} == {15}
