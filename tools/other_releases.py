"""Installs other releases of packages for the tests, beside those of the environment.

    python3 tools/other_releases.py PACKAGE [PACKAGE ...] [--venv DIR] [--oldest]

Each gets a folder of its own in the environment, `PACKAGE-RELEASE`. With that folder first on PYTHONPATH,
everything else comes from the environment. Run again, it does only what is missing. Standard library only.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from install import ROOT, InstallError, run, run_pip, say

RELEASES: Mapping[str, Sequence[str]] = {
    # The last of every minor release that vLLM brings or brought; the environment's own is newer.
    "triton": ("3.6.0", "3.7.1", "3.8.0"),
    # Both sides of each change in how it matches patterns, and the newest. 0.16 and 0.17 do not import with
    # transformers 5.
    "peft": ("0.12.0", "0.13.2", "0.14.0", "0.15.2", "0.19.1", "0.21.2"),
    "diffusers": ("0.42.1",),
}
"""The releases of each package that are tested, oldest first."""

UNFINISHED = ".unfinished"  # what a folder's name ends in while pip is at work


def folder_of(venv: Path, package: str, release: str) -> Path:
    """The folder of a release, whether or not it is there."""
    return venv / f"{package}-{release}"


def install(venv: Path, package: str, releases: Sequence[str]) -> None:
    """Installs what is missing of the releases; folders of untested ones go, and what was interrupted."""
    if not (venv / "bin" / "python").exists():
        raise InstallError(f"{venv} is no environment: `make install` makes it")
    tested = {folder_of(venv, package, release) for release in RELEASES[package]}
    for other in set(venv.glob(f"{package}-[0-9]*")) - tested:
        shutil.rmtree(other)
    for release in releases:
        folder = folder_of(venv, package, release)
        if folder.is_dir():
            continue
        say(f"{package} {release} for the tests, in {folder}")
        unfinished = folder.with_name(folder.name + UNFINISHED)
        target = ("--target", str(unfinished), "--no-compile")
        if not run_pip(venv, "install", "--no-deps", *target, f"{package}=={release}"):
            raise InstallError(f"pip could not install {package} {release}; its message is above")
        unfinished.rename(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Install other releases of packages for the tests.")
    parser.add_argument("packages", nargs="+", metavar="PACKAGE", choices=RELEASES, help=", ".join(RELEASES))
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: %(default)s")
    parser.add_argument("--oldest", action="store_true", help="the oldest release of each alone")
    options = parser.parse_args(arguments)

    def work() -> None:
        for package in options.packages:
            releases = RELEASES[package]
            install(options.venv.absolute(), package, releases[:1] if options.oldest else releases)

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
