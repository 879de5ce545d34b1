"""tools/tritons.py: what it asks of pip, and which folders it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

import tritons
from tritons import RELEASES, folder_of


class Pip:
    """A stand-in that notes how it was called, and makes the folder as far as it gets."""

    def __init__(self, works: bool = True) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.works = works

    def __call__(self, venv: Path, *arguments: str) -> bool:
        self.calls.append(arguments)
        Path(arguments[arguments.index("--target") + 1], "triton").mkdir(parents=True)
        return self.works


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    return tmp_path


def installed(venv: Path, monkeypatch: pytest.MonkeyPatch, *options: str, pip: Pip | None = None) -> Pip:
    pip = pip or Pip()
    monkeypatch.setattr(tritons, "run_pip", pip)
    status = tritons.main(["--venv", str(venv), *options])
    assert status == (0 if pip.works else 1)
    return pip


def test_each_release_comes_without_dependencies_into_a_folder_of_its_own_once(
    venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (oldest,) = installed(venv, monkeypatch, "--oldest").calls
    assert oldest[:2] == ("install", "--no-deps")
    assert oldest[-1] == f"triton=={RELEASES[0]}"
    others = installed(venv, monkeypatch).calls
    assert [call[-1] for call in others] == [f"triton=={release}" for release in RELEASES[1:]]
    assert installed(venv, monkeypatch).calls == []
    assert {path.parent for path in venv.glob("*/triton")} == {folder_of(venv, r) for r in RELEASES}


def test_what_pip_did_not_finish_is_not_taken_for_a_release(
    venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(venv, monkeypatch, "--oldest", pip=Pip(works=False))
    assert not folder_of(venv, RELEASES[0]).exists()
    assert installed(venv, monkeypatch, "--oldest").calls != []
    assert [path.name for path in venv.glob("triton-*")] == [f"triton-{RELEASES[0]}"]


def test_a_release_that_is_no_longer_tested_goes(venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (venv / "triton-3.5.0").mkdir()
    (venv / "vllm-0.30.0").mkdir()
    installed(venv, monkeypatch, "--oldest")
    assert not (venv / "triton-3.5.0").exists()
    assert (venv / "vllm-0.30.0").exists()


def test_without_an_environment_the_way_to_one_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tritons.main(["--venv", str(tmp_path / "none")]) == 1
    assert "is no environment: `make install` makes it" in capsys.readouterr().err
