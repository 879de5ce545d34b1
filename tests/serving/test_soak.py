"""The random load of ``make soak`` notices whether a server fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import soak
from merged_lora.bench import serving


def sessions_below(parent: int) -> list[int]:
    """Ids of the processes of the sessions that children of a process lead."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if (folder / "stat").read_text().rpartition(")")[2].split()[3] in children
    ]


def engine_below(parent: int) -> int:
    """Id of the one engine process."""
    (engine,) = (
        pid for pid in sessions_below(parent) if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text()
    )
    return engine


def test_the_memory_of_a_session_is_that_of_its_processes() -> None:
    own = soak.resident_bytes(os.getsid(0))
    assert own > 50 << 20  # torch alone takes more
    assert soak.resident_bytes(1 << 30) == 0


@pytest.mark.soak
@pytest.mark.engine
@pytest.mark.timeout(900)
def test_an_engine_that_dies_under_load_is_an_error() -> None:
    command = [sys.executable, "-u", soak.__file__, "--minutes", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        starting, loading = process.stdout.readline(), ""
        if "ready" in starting:
            os.kill(engine_below(process.pid), signal.SIGKILL)
        loading = process.stdout.read()
    assert "ready" in starting, starting
    assert process.returncode == 1, loading
    assert "UNEXPECTED" in loading


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [float(i) for i in range(100, 0, -1)]
    assert (soak.percentile(values, 50), soak.percentile(values, 99)) == (50.0, 99.0)
    assert soak.percentile([7.0], 99) == 7.0


def test_counts_are_printed_and_unexpected_errors_in_full() -> None:
    counted = soak.Counted(refused=2, unexpected=["new: it broke"], merges={"a", "b", "c"})
    counted.steps.update(plain=4, new=3)
    counted.seconds["new"] = [0.5, 0.25]
    text = "\n".join(counted.lines())
    assert "7: 3 new, 4 plain" in text
    assert "distinct merges 3" in text
    assert "2 expected refusals, 1 unexpected" in text
    assert "p50 0.250 s, p99 0.500 s of 2" in text
    assert "UNEXPECTED new: it broke" in text


def test_without_the_model_the_error_says_how_to_make_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(serving, "MODEL", tmp_path)
    with pytest.raises(SystemExit) as caught:
        soak.main([])
    assert caught.value.code == 2
    assert "`make model` makes it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--minutes", "0"], ["--minutes", "nan"], ["--json", "/"]], ids=" ".join
)
def test_a_load_that_reports_nothing_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        soak.main(arguments)
    assert caught.value.code == 2
