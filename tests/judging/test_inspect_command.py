"""What ``merged-lora inspect`` does if it is interrupted, cannot print, or is asked for what is not there."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from making import SMALL, random_adapter
from merged_lora.files.layout import Header
from running import Run, command, environment, started


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    for seed, name in enumerate("ab", 1):
        random_adapter(SMALL, seed=seed, header=Header(base_model=f"org/{name}")).save(tmp_path / name)
    return [f"{name}={tmp_path / name}" for name in "ab"]


def test_no_adapter_is_one_line(run: Run) -> None:
    code, out, err = run("inspect")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "NAME=LOCATION" in err


def test_one_adapter_has_its_facts_and_nothing_to_compare(run: Run, two: list[str]) -> None:
    code, out, err = run("inspect", two[0])
    assert (code, err) == (0, "")
    assert "sources\n" in out
    assert "pairs" not in out


def test_a_folder_that_is_no_adapter_is_named(run: Run, two: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, out, _ = run("inspect", *two, f"c={tmp_path / 'empty'}")
    assert code == 3
    assert "c cannot be merged: " in out
    assert "adapter_config.json: missing" in out


def test_different_base_models_are_named(run: Run, two: list[str]) -> None:
    code, out, _ = run("inspect", *two)
    assert code == 0
    assert "The sources name different base models: org/a, org/b" in out


def test_a_word_that_drops_nothing_is_one_line(run: Run, two: list[str]) -> None:
    code, out, err = run("inspect", *two, "--drop", "no such part")
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.slow
def test_json_in_a_pipe_is_json_alone(two: list[str]) -> None:
    done = subprocess.run(
        command("inspect", *two, "--json"), capture_output=True, text=True, env=environment()
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["sources"][0]["name"] == "a"


@pytest.mark.slow
def test_a_full_disk_is_one_line(two: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command("inspect", *two), stdout=full, stderr=subprocess.PIPE, text=True, env=environment()
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No space left on device" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_it_without_a_traceback(two: list[str], number: int, code: int) -> None:
    waiting = (
        "import time\nimport merged_lora.judging.inspecting as inspecting\n"
        "def wait(*_):\n    print('comparing', flush=True)\n    time.sleep(600)\n"
        "inspecting.compare = wait"
    )
    process = started(waiting, "inspect", *two)
    assert process.stdout is not None
    assert process.stdout.readline() == "comparing\n"
    process.send_signal(number)
    _, err = process.communicate()
    assert (process.returncode, err) == (code, "")
