"""Without a numba that can be imported, tests of the CPU backend are skipped, and all others run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REFUSAL = "Numba needs NumPy 2.4 or less. Got NumPy 2.5."
OF_TRITON = "test_quotients_are_rounded_as_by_the_hardware and 1-zero"
OF_THE_CPU = "test_density_1_does_not_trim"
FILES = {
    "tests/agreement/test_entries.py",
    "tests/agreement/test_known_thresholds.py",
    "tests/agreement/test_numbers.py",
    "tests/agreement/test_philox.py",
    "tests/agreement/test_trim.py",
    "tests/core/test_compiling.py",
    "tests/core/test_pool.py",
}
"""Tests that look into the CPU backend itself."""


@pytest.mark.slow
def test_all_tests_are_collected_and_those_that_need_the_cpu_backend_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text(f"raise ImportError({REFUSAL!r})\n")
    chosen = ("-k", f"{OF_TRITON} or {OF_THE_CPU}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "--no-fold-skipped", "-p", "no:cacheprovider", *chosen],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = dict(re.findall(r"^SKIPPED (\S+\.py)\S* - (?:Skipped: )?(.*)$", done.stdout, re.MULTILINE))
    assert skipped == dict.fromkeys(
        FILES | {"tests/agreement/test_algebra.py"}, f"the CPU backend needs numba: {REFUSAL}"
    )
    assert " 1 passed, 8 skipped, " in done.stdout
