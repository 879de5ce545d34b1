"""tools/other_releases.py: what it asks of pip, and which folders it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

import other_releases
from other_releases import RELEASES, folder_of


class Pip:
    """A stand-in that notes how it was called, and makes the folder as far as it gets."""

    def __init__(self, works: bool = True) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.works = works

    def __call__(self, venv: Path, *arguments: str) -> bool:
        self.calls.append(arguments)
        Path(arguments[arguments.index("--target") + 1]).mkdir(parents=True)
        return self.works


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    return tmp_path


def installed(venv: Path, monkeypatch: pytest.MonkeyPatch, *options: str, pip: Pip | None = None) -> Pip:
    pip = pip or Pip()
    monkeypatch.setattr(other_releases, "run_pip", pip)
    status = other_releases.main([*options, "--venv", str(venv)])
    assert status == (0 if pip.works else 1)
    return pip


def folders(venv: Path) -> set[Path]:
    return set(venv.iterdir()) - {venv / "bin"}


def test_each_release_comes_without_dependencies_into_a_folder_of_its_own_once(
    venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (oldest,) = installed(venv, monkeypatch, "triton", "--oldest").calls
    assert oldest[:2] == ("install", "--no-deps")
    assert oldest[-1] == f"triton=={RELEASES['triton'][0]}"
    others = installed(venv, monkeypatch, *RELEASES).calls
    wanted = [(package, release) for package in RELEASES for release in RELEASES[package]]
    assert [call[-1] for call in others] == ["==".join(each) for each in wanted[1:]]
    assert installed(venv, monkeypatch, *RELEASES).calls == []
    assert folders(venv) == {folder_of(venv, *each) for each in wanted}


def test_what_pip_did_not_finish_is_not_taken_for_a_release(
    venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(installed(venv, monkeypatch, "peft", "diffusers", pip=Pip(works=False)).calls) == 1
    assert not folder_of(venv, "peft", RELEASES["peft"][0]).exists()
    assert len(installed(venv, monkeypatch, "peft").calls) == len(RELEASES["peft"])
    assert folders(venv) == {folder_of(venv, "peft", release) for release in RELEASES["peft"]}


def test_a_release_that_is_no_longer_tested_goes(venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {venv / name for name in ("triton-tools", "peft-0.11.0", "vllm-0.30.0")}
    for folder in (*kept, venv / "triton-3.5.0"):
        folder.mkdir()
    installed(venv, monkeypatch, "triton", "--oldest")
    assert folders(venv) == {folder_of(venv, "triton", RELEASES["triton"][0]), *kept}


def test_a_package_of_which_no_release_is_tested_is_refused(
    venv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        other_releases.main(["numpy", "--venv", str(venv)])
    assert "choose from" in capsys.readouterr().err


def test_without_an_environment_the_way_to_one_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert other_releases.main(["triton", "--venv", str(tmp_path / "none")]) == 1
    assert "is no environment: `make install` makes it" in capsys.readouterr().err
