"""Installs the clients of other projects that ``tests/serving/test_clients.py`` asks the server with.

    python3 tools/clients.py [--venv DIR]

They get an environment of their own, `clients` in the project's, and what comes by npm a folder in it. So do
programs that need other releases than the clients, one each. Run again, it does only what is missing.
Standard library only.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import venv as environments
from pathlib import Path

from install import ROOT, InstallError, run, run_pip, say

# Pinned: what another project changes must not turn an unchanged tree red.
PYTHON = (
    "anthropic==2.14.0",
    "langchain-openai==1.7.4",
    "litellm==1.110.2",
    "llama-index-llms-openai-like==0.8.1",
)
# Its pins contradict those of the others; what it imports comes with them.
ALONE = "lorax-client==0.6.3"
# Each in an environment of its own.  The proxy is of the last release all of whose parts pip finds.
APART = {"litellm-proxy": "litellm[proxy]==1.108.7", "lm-eval": "lm-eval[api]==0.4.13"}
NODE = ("ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92")


def folder_of(venv: Path) -> Path:
    """The environment of the clients, whether or not it is there."""
    return venv / "clients"


def install(venv: Path) -> None:
    """Installs the clients if they are not there; those of npm only if there is an npm."""
    if not (venv / "bin" / "python").exists():
        raise InstallError(f"{venv} is no environment: `make install` makes it")
    folder = folder_of(venv)
    done = folder / "installed"
    wanted = "\n".join((*PYTHON, ALONE, *APART.values(), *NODE))
    if done.is_file() and done.read_text(encoding="utf-8") == wanted:
        return
    say(f"clients of other projects for the tests, in {folder} (some 2.3 GB)")
    environments.create(folder, with_pip=True, clear=True)
    if not (run_pip(folder, "install", *PYTHON) and run_pip(folder, "install", "--no-deps", ALONE)):
        raise InstallError("pip could not install the clients; its message is above")
    for name, program in APART.items():
        environments.create(folder / name, with_pip=True)
        if not run_pip(folder / name, "install", program):
            raise InstallError(f"pip could not install {program}; its message is above")
    npm = shutil.which("npm")
    if npm is not None:
        command = [npm, "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(folder), *NODE]
        if subprocess.run(command).returncode != 0:
            raise InstallError("npm could not install the clients; its message is above")
    done.write_text(wanted, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Install clients of other projects for the tests.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: %(default)s")
    options = parser.parse_args(arguments)
    return run(lambda: install(options.venv.absolute()))


if __name__ == "__main__":
    sys.exit(main())
