"""The Tritons that are tested: the environment's own, and those of ``tools/other_releases.py``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from other_releases import folder_of

INSTALLED = "installed"


def environment(release: str) -> dict[str, str]:
    """The variables of a process that runs with a release.  Skips the test if that is not installed."""
    variables = dict(os.environ)
    if release != INSTALLED:
        folder = folder_of(Path(sys.prefix), "triton", release)
        if not folder.is_dir():
            pytest.skip(f"Triton {release} is not installed: make tritons")
        variables["PYTHONPATH"] = str(folder)
    return variables
