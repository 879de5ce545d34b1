"""Installs releases of other projects that read LoRA adapters, for the tests of what we write.

    python3 tools/readers.py [--venv DIR]

Each gets a folder of its own in the environment, `NAME-RELEASE`. With that folder first on PYTHONPATH,
everything else comes from the environment. Run again, it does only what is missing. Standard library only.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from install import ROOT, InstallError, run, run_pip, say

# PEFT: both sides of each change in how it matches patterns, and the newest. 0.16 and 0.17 do not import with
# transformers 5. Diffusers: the newest.
RELEASES = (
    *(("peft", release) for release in ("0.12.0", "0.13.2", "0.14.0", "0.15.2", "0.19.1", "0.21.2")),
    ("diffusers", "0.42.1"),
)

UNFINISHED = ".unfinished"  # what a folder's name ends in while pip is at work


def folder_of(venv: Path, name: str, release: str) -> Path:
    """The folder of a release, whether or not it is there."""
    return venv / f"{name}-{release}"


def install(venv: Path) -> None:
    """Installs what is missing; folders of other releases go, and what was interrupted."""
    if not (venv / "bin" / "python").exists():
        raise InstallError(f"{venv} is no environment: `make install` makes it")
    wanted = {folder_of(venv, *release): "==".join(release) for release in RELEASES}
    for name in {name for name, _ in RELEASES}:
        for other in set(venv.glob(f"{name}-[0-9]*")) - set(wanted):
            shutil.rmtree(other)
    for folder, requirement in wanted.items():
        if folder.is_dir():
            continue
        say(f"{requirement} for the tests, in {folder}")
        unfinished = folder.with_name(folder.name + UNFINISHED)
        target = ("--target", str(unfinished), "--no-compile")
        if not run_pip(venv, "install", "--no-deps", *target, requirement):
            raise InstallError(f"pip could not install {requirement}; its message is above")
        unfinished.rename(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Install other readers of adapters for the tests.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: %(default)s")
    options = parser.parse_args(arguments)
    return run(lambda: install(options.venv.absolute()))


if __name__ == "__main__":
    sys.exit(main())
