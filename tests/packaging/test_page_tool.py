"""tools/page.py: what it asks of npm and apt, and that the vendored library is the published one."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import page
from install import ROOT

JSDIFF = ROOT / "merged_lora" / "playground" / "static" / "jsdiff"


def asked(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, there: Sequence[str], fails: bool = False
) -> tuple[int, list[list[str]]]:
    """The exit code and the commands that are run, on a machine with some programs."""
    commands: list[list[str]] = []

    def run(command: list[str], **named: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, int(fails))

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if name in there else None)
    return page.main(list(arguments)), commands


def test_checkers_are_installed_once_and_again_if_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = ("--venv", str(tmp_path))
    code, commands = asked(monkeypatch, "checkers", *venv, there=["npm"], fails=True)
    assert code == 1
    assert commands[0][-len(page.NODE) :] == list(page.NODE)
    assert asked(monkeypatch, "checkers", *venv, there=["npm"]) == (0, commands)
    assert asked(monkeypatch, "checkers", *venv, there=["npm"]) == (0, [])
    monkeypatch.setattr(page, "NODE", (*page.NODE[1:], "typescript@8.0.0"))
    assert len(asked(monkeypatch, "checkers", *venv, there=["npm"])[1]) == 1


def test_without_npm_the_way_to_one_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(monkeypatch, "checkers", "--venv", str(tmp_path), there=[]) == (1, [])
    assert "install Node.js 20 or newer" in capsys.readouterr().err


@pytest.mark.parametrize("browser", page.BROWSERS)
def test_a_browser_that_is_there_is_left_alone(monkeypatch: pytest.MonkeyPatch, browser: str) -> None:
    assert asked(monkeypatch, "browser", there=[browser, "apt-get"]) == (0, [])


def test_root_gets_a_browser_and_anybody_else_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    code, commands = asked(monkeypatch, "browser", there=["apt-get"])
    assert (code, [command[2] for command in commands]) == (0, ["update", "install"])
    code, commands = asked(monkeypatch, "browser", there=["apt-get"], fails=True)
    assert (code, len(commands)) == (1, 1)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert asked(monkeypatch, "browser", there=["apt-get"]) == (0, [])
    assert "apt install chromium" in capsys.readouterr().out


def test_every_checker_is_pinned() -> None:
    assert all("@" in package[1:] for package in page.NODE)


def test_the_vendored_library_is_the_published_one() -> None:
    published = page.folder_of(ROOT / ".venv") / "node_modules" / "diff"
    if not published.is_dir():
        pytest.skip("make checkers installs what it is compared with")
    assert (JSDIFF / "LICENSE").read_bytes() == (published / "LICENSE").read_bytes()
    for name in ("array.js", "base.js"):
        assert (JSDIFF / name).read_bytes() == (published / "libesm" / "diff" / name).read_bytes()
