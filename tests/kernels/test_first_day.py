"""A GPU's first day brings home all that it can: what fails is named, and what depends on it is not timed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from merged_lora.bench import first_day, first_day_worker, recording
from merged_lora.bench.__main__ import main
from merged_lora.bench.first_day import Limits
from merged_lora.bench.first_day_worker import Item

FIRST_ROWS = ["linear", "ties", "ties, cold", "linear, planned anew", "svd", "core_ties"]


def worker(faulty: str) -> list[str]:
    return [sys.executable, "-m", "tests.kernels.rehearsing", faulty]


def rehearsed(folder: Path, faulty: str = "none", row_seconds: float = 75.0) -> tuple[int, dict[str, Any]]:
    """The exit code and the results of a first day with these faults."""
    code = first_day.run(folder, 5, 1, worker(faulty), Limits(row=row_seconds))
    read: dict[str, Any] = json.loads((folder / first_day.FILE).read_text())
    return code, read


def row_names(results: dict[str, Any]) -> list[str]:
    return [row["case"] for row in results["rows"]]


@pytest.fixture
def sanitizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A compute-sanitizer that runs what it is given; its body may be changed."""
    file = tmp_path / "bin" / "compute-sanitizer"
    file.parent.mkdir()
    file.write_text('#!/bin/sh\necho "========= COMPUTE-SANITIZER"\nshift 6\nexec "$@"\n')
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(file.parent), prepend=os.pathsep)
    return file


@pytest.mark.slow
def test_what_a_failed_check_is_about_is_not_timed_and_everything_else_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sanitizer: Path
) -> None:
    code, results = rehearsed(tmp_path / "out")
    assert code == 1
    assert results["state"] == "finished"
    assert row_names(results) == FIRST_ROWS
    assert results["withheld"] == ["dare_ties: a check of dare_ties bfloat16 failed"]
    assert [c["wrong"] for c in results["checks"] if c["wrong"]] == ["it differs"]
    assert results["sanitizer"]["state"] == "clean"
    assert len(results["sanitizer"]["merged"]) == 2
    assert "COMPUTE-SANITIZER" in results["sanitizer"]["output"]
    assert results["environment"]["commit"] != ""
    out = capsys.readouterr().out
    assert "FAILED:" in out
    assert "WRONG made up: of dare_ties: it differs" in out


@pytest.mark.soak
def test_rows_that_fail_take_no_other_with_them(tmp_path: Path) -> None:
    code, results = rehearsed(tmp_path, "all", row_seconds=12.0)
    assert code == 1
    assert row_names(results) == ["linear", "linear, planned anew", "core_ties"]
    reasons = {failure["item"]: failure["text"] for failure in results["failed"]}
    assert list(reasons) == ["ties", "ties, cold", "svd"]
    assert "RuntimeError: CUDA error: an illegal memory access" in reasons["ties"]
    assert f"the process ended with {-signal.SIGSEGV}" in reasons["ties, cold"]
    assert "ended after 12 s without a result" in reasons["svd"]
    assert results["not_reached"] == []


def started(folder: Path, minutes: float = 5.0) -> subprocess.Popen[str]:
    """A first day in a process of its own, which hangs at the svd."""
    code = (
        "import sys; from pathlib import Path; from merged_lora.bench import first_day;"
        f"sys.exit(first_day.run(Path({str(folder)!r}), {minutes}, 1, {worker('svd')!r}))"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def wait_for_a_row(file: Path) -> dict[str, Any]:
    """What the file holds as soon as it holds a row; whenever it is read it is whole."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        read: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
        if read["rows"]:
            return read
        time.sleep(0.01)
    raise AssertionError("no row came")


def workers_of(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@pytest.mark.slow
def test_a_day_that_is_ended_leaves_what_it_found_and_no_process(tmp_path: Path) -> None:
    with started(tmp_path) as day:
        wait_for_a_row(tmp_path / first_day.FILE)
        workers = workers_of(day.pid)
        day.terminate()
        out, _ = day.communicate(timeout=60)
    assert day.returncode == 1
    assert "written: " in out
    results = json.loads((tmp_path / first_day.FILE).read_text())
    assert results["state"] == "interrupted"
    assert row_names(results)[:1] == ["linear"]
    assert workers
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.soak
def test_a_day_that_is_killed_leaves_what_it_found_and_no_process(tmp_path: Path) -> None:
    with started(tmp_path) as day:
        wait_for_a_row(tmp_path / first_day.FILE)
        workers = workers_of(day.pid)
        day.kill()
    results = json.loads((tmp_path / first_day.FILE).read_text())
    assert results["state"] == "running"
    assert row_names(results)[:1] == ["linear"]
    end = time.monotonic() + 30
    while time.monotonic() < end and any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.1)
    assert workers
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.soak
def test_what_the_minutes_do_not_allow_is_named(tmp_path: Path) -> None:
    with started(tmp_path, minutes=1.0) as day:
        day.communicate(timeout=120)
    results = json.loads((tmp_path / first_day.FILE).read_text())
    assert results["state"] == "finished"
    assert row_names(results) == [name for name in FIRST_ROWS if name not in ("svd", "core_ties")]
    assert results["failed"] == []
    assert results["not_reached"] == ["rows: svd", "rows: core_ties"]


def test_a_worker_that_cannot_start_is_reported_with_its_reason(tmp_path: Path) -> None:
    code = first_day.run(tmp_path, 1, 1, [sys.executable, "-c", "raise SystemExit('no GPU here')"])
    results = json.loads((tmp_path / first_day.FILE).read_text())
    assert code == 1
    assert {failure["item"] for failure in results["failed"]} == {"start"}
    assert all("no GPU here" in failure["text"] for failure in results["failed"])
    assert "rows: all of it" in results["not_reached"]


@pytest.mark.parametrize(
    ("body", "state"),
    [
        ("echo '========= Invalid __global__ read' && exit 9", recording.WRONG),
        ("echo 'device not supported' && exit 1", recording.FAILED),
        ("sleep 600", "out of time"),
    ],
)
def test_the_sanitizers_verdict_is_noted(body: str, state: str, tmp_path: Path, sanitizer: Path) -> None:
    sanitizer.write_text(f"#!/bin/sh\n{body}\n")
    record = first_day.new_record(tmp_path / first_day.FILE)
    first_day.sanitize(first_day.Crew(tmp_path, worker("none"), record, Limits()), time.monotonic() + 2)
    assert record.data["sanitizer"]["state"] == state
    assert first_day.has_failed(record.data) == (state != "out of time")


def run_worker(
    items: list[Item], skip: int = 0, seconds: float = 60.0, lost: bool = False
) -> tuple[int, list[Any]]:
    messages: list[Any] = []
    code = first_day_worker.work_off(items, skip, seconds, messages.append, lambda: lost)
    return code, messages[1:]


def test_a_worker_begins_behind_what_is_done() -> None:
    items = [Item(name, (), lambda: {"wrong": None}) for name in "abc"]
    code, messages = run_worker(items, skip=1)
    assert code == 0
    assert [m["begin"] for m in messages if "begin" in m] == ["b", "c"]


def test_a_worker_whose_device_is_lost_ends_behind_the_item_that_lost_it() -> None:
    def fault() -> dict[str, Any]:
        raise RuntimeError("illegal address")

    items = [Item("a", (), fault), Item("b", (), lambda: {"wrong": None})]
    code, messages = run_worker(items, lost=True)
    assert code == first_day.DEVICE_LOST
    assert "illegal address" in messages[-1]["failed"]
    assert [m["end"] for m in messages if "end" in m] == ["a"]
    assert run_worker(items)[0] == 0


def test_a_worker_begins_nothing_behind_its_time() -> None:
    assert run_worker([Item("a", (), lambda: {"wrong": None})], seconds=-1.0) == (0, [])


def test_a_row_that_no_check_vouches_for_is_not_timed() -> None:
    class Bench:
        def cases(self) -> list[Any]:
            from merged_lora.bench.gpu import Case

            return [Case("ties", "ties", "bfloat16", lambda: pytest.fail("timed"))]

    (item,) = first_day_worker.row_items(Bench(), wrong=[], right=["linear bfloat16"])
    assert item.run() == {"withheld": "no check of ties bfloat16 was made"}


def test_a_file_is_whole_while_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.json"
    recording.write(file, {"a": 1})
    with pytest.raises(TypeError):
        recording.write(file, {"a": "x" * 100_000, "b": object()})
    assert json.loads(file.read_text()) == {"a": 1}


def test_neither_torch_nor_numba_is_needed_to_hear_of_the_workers() -> None:
    code = "import sys; import merged_lora.bench.first_day; print({'torch', 'numba'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_first_day_needs_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def run(*given: Any) -> int:
        asked.append(given)
        return 0

    monkeypatch.setattr(first_day, "run", run)
    assert main(["gpu", "--first-day", "--json", str(tmp_path / "new"), "--layers", "2"]) == 0
    assert asked == [(tmp_path / "new", first_day.MINUTES, 2)]
    (tmp_path / "file").touch()
    for wrong in (["--json", str(tmp_path / "file")], []):
        with pytest.raises(SystemExit) as caught:
            main(["gpu", "--first-day", *wrong])
        assert caught.value.code == 2
