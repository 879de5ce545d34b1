"""Installs what checks the playground's page: TypeScript, Biome and axe-core by npm, and Chromium.

    python3 tools/page.py checkers|browser [--venv DIR]

The checkers get a folder of their own, `page` in the project's environment. Chromium is the system's: if
there is none, root gets Debian's package, and for anybody else the tests that need it are skipped. Run again,
it does only what is missing. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from install import ROOT, InstallError, run, say

# Pinned: a new release must not turn an unchanged tree red.
NODE = ("@biomejs/biome@2.6.8", "axe-core@4.14.1", "diff@9.0.0", "typescript@7.0.2")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_FLAGS = ["--no-sandbox"] if os.geteuid() == 0 else []
"""Chromium's sandbox does not work for root, and the pages that are opened with these flags are our own."""


def folder_of(venv: Path) -> Path:
    """The folder of the checkers, whether or not it is there."""
    return venv / "page"


def find_browser() -> str | None:
    """The path of this machine's Chromium, None if there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def install_checkers(venv: Path) -> None:
    """Installs the checkers if they are not there."""
    folder = folder_of(venv)
    done = folder / "installed"
    wanted = "\n".join(NODE)
    if done.is_file() and done.read_text(encoding="utf-8") == wanted:
        return
    npm = shutil.which("npm")
    if npm is None:
        raise InstallError(
            "the playground's page is checked by TypeScript, which needs npm, and there is none: install"
            " Node.js 20 or newer (Debian and Ubuntu: apt install npm)"
        )
    say(f"what checks the playground's page, in {folder} (some 130 MB)")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [npm, "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(folder), *NODE]
    if subprocess.run(command).returncode != 0:
        raise InstallError("npm could not install what checks the page; its message is above")
    done.write_text(wanted, encoding="utf-8")


def install_browser() -> None:
    """Installs Chromium if there is none and this user may."""
    if find_browser() is not None:
        return
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid() != 0:
        say("no Chromium (Debian: apt install chromium): the tests of the playground's page are skipped")
        return
    say("Chromium, for the tests of the playground's page")
    for command in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
        done = subprocess.run([apt, "-qq", *command], stdout=subprocess.DEVNULL)
        if done.returncode != 0:
            raise InstallError(f"apt-get {command[0]} failed; its message is above")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Install what checks the playground's page.")
    parser.add_argument("what", choices=("checkers", "browser"))
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: %(default)s")
    options = parser.parse_args(arguments)
    venv = options.venv.absolute()
    return run(install_browser if options.what == "browser" else lambda: install_checkers(venv))


if __name__ == "__main__":
    sys.exit(main())
