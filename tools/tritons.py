"""Installs the other releases of Triton that the kernels are tested on, beside the environment's own.

    python3 tools/tritons.py [--venv DIR] [--oldest]

Each gets a folder of its own in the environment, `triton-RELEASE`. With that folder first on PYTHONPATH,
everything else comes from the environment. Run again, it does only what is missing. Standard library only.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from install import ROOT, InstallError, run, run_pip, say

# The last of every minor release that vLLM brings or brought, oldest first; the environment's own is newer.
RELEASES = ("3.6.0", "3.7.1", "3.8.0")

UNFINISHED = ".unfinished"  # what a folder's name ends in while pip is at work


def folder_of(venv: Path, release: str) -> Path:
    """The folder of a release, whether or not it is there."""
    return venv / f"triton-{release}"


def install(venv: Path, releases: tuple[str, ...]) -> None:
    """Installs what is missing of the releases; folders of others go, and what was interrupted."""
    if not (venv / "bin" / "python").exists():
        raise InstallError(f"{venv} is no environment: `make install` makes it")
    for other in set(venv.glob("triton-*")) - {folder_of(venv, release) for release in RELEASES}:
        shutil.rmtree(other)
    for release in releases:
        folder = folder_of(venv, release)
        if folder.is_dir():
            continue
        say(f"triton {release} for the tests, in {folder} (some 700 MB)")
        unfinished = folder.with_name(folder.name + UNFINISHED)
        target = ("--target", str(unfinished), "--no-compile")
        if not run_pip(venv, "install", "--no-deps", *target, f"triton=={release}"):
            raise InstallError(f"pip could not install triton {release}; its message is above")
        unfinished.rename(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Install other releases of Triton for the tests.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: %(default)s")
    parser.add_argument(
        "--oldest", action="store_true", help=f"{RELEASES[0]} alone, of {', '.join(RELEASES)}"
    )
    options = parser.parse_args(arguments)
    releases = RELEASES[:1] if options.oldest else RELEASES
    return run(lambda: install(options.venv.absolute(), releases))


if __name__ == "__main__":
    sys.exit(main())
