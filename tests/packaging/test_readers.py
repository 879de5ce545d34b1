"""tools/readers.py: what it asks of pip, and which folders it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

import readers
from readers import RELEASES, folder_of


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    return tmp_path


def asked(venv: Path, monkeypatch: pytest.MonkeyPatch, works: bool = True) -> list[tuple[str, ...]]:
    """What pip is asked for; it makes the folder as far as it gets."""
    calls: list[tuple[str, ...]] = []

    def run_pip(_: Path, *arguments: str) -> bool:
        calls.append(arguments)
        Path(arguments[arguments.index("--target") + 1]).mkdir()
        return works

    monkeypatch.setattr(readers, "run_pip", run_pip)
    assert readers.main(["--venv", str(venv)]) == (0 if works else 1)
    return calls


def test_each_release_comes_without_dependencies_into_a_folder_of_its_own_once(
    venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = asked(venv, monkeypatch)
    assert {call[:2] for call in calls} == {("install", "--no-deps")}
    assert [call[-1] for call in calls] == [f"{name}=={release}" for name, release in RELEASES]
    assert all(folder_of(venv, *release).is_dir() for release in RELEASES)
    assert asked(venv, monkeypatch) == []


def test_what_pip_did_not_finish_is_not_taken_for_a_release(
    venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(asked(venv, monkeypatch, works=False)) == 1
    assert not folder_of(venv, *RELEASES[0]).exists()
    assert len(asked(venv, monkeypatch)) == len(RELEASES)


def test_a_release_that_is_no_longer_tested_goes(venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("peft-0.11.0", "vllm-0.30.0"):
        (venv / name).mkdir()
    asked(venv, monkeypatch)
    assert not (venv / "peft-0.11.0").exists()
    assert (venv / "vllm-0.30.0").exists()


def test_without_an_environment_the_way_to_one_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert readers.main(["--venv", str(tmp_path / "none")]) == 1
    assert "is no environment: `make install` makes it" in capsys.readouterr().err
