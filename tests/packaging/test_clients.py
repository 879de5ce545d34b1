"""tools/clients.py: what it asks of the installers, and when it has nothing to do."""

from __future__ import annotations

from pathlib import Path

import pytest

import clients


def asked(venv: Path, monkeypatch: pytest.MonkeyPatch, works: bool = True) -> list[tuple[str, ...]]:
    """What pip is asked for."""
    calls: list[tuple[str, ...]] = []

    def run_pip(folder: Path, *arguments: str) -> bool:
        assert folder in (
            clients.folder_of(venv),
            *(clients.folder_of(venv) / name for name in clients.APART),
        )
        calls.append(arguments)
        return works

    monkeypatch.setattr(clients, "run_pip", run_pip)
    monkeypatch.setattr("venv.create", lambda folder, **_: folder.mkdir(exist_ok=True))
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert clients.main(["--venv", str(venv)]) == (0 if works else 1)
    return calls


def test_clients_are_installed_once_and_again_if_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert asked(tmp_path, monkeypatch, works=False) == [("install", *clients.PYTHON)]
    everything = 2 + len(clients.APART)
    assert len(asked(tmp_path, monkeypatch)) == everything
    assert asked(tmp_path, monkeypatch) == []
    monkeypatch.setattr(clients, "PYTHON", ("anthropic==2.15.0",))
    assert len(asked(tmp_path, monkeypatch)) == everything


def test_every_client_is_pinned() -> None:
    assert all("==" in client for client in (*clients.PYTHON, clients.ALONE, *clients.APART.values()))
    assert all("@" in client[1:] for client in clients.NODE)


def test_without_an_environment_the_way_to_one_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert clients.main(["--venv", str(tmp_path / "none")]) == 1
    assert "is no environment: `make install` makes it" in capsys.readouterr().err
