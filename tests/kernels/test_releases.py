"""The tests of the kernels pass with every supported release of Triton. Compiles nothing for a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kernels.releases import environment
from other_releases import RELEASES

OWN = ("tests/kernels/test_compiled.py", "tests/kernels/test_releases.py")
"""Tests that start other Tritons themselves."""
BITS = "tests/kernels/test_bits.py::test_triton_gives_the_bits_of_the_reference"
USUAL = (
    "tests/kernels/test_divide.py",
    "tests/kernels/test_rounding.py",
    *(f"{BITS}[{case}]" for case in ("linear-4", "ties-1", "ties-3", "dare_ties-4", "dare_linear-9")),
    "tests/kernels/test_trim.py::test_sorted_entries_are_no_obstacle",
)


def assert_passing(release: str, *tests: str) -> None:
    """They pass, in a process that runs with a release of Triton."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests],
        env=environment(release),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert f"\ntriton: {release}\n" in done.stdout
    assert done.returncode == 0


@pytest.mark.slow
def test_usual_merges_keep_their_bits_under_the_oldest_release() -> None:
    assert_passing(RELEASES["triton"][0], *USUAL)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("release", RELEASES["triton"])
def test_every_test_of_the_kernels_passes(release: str) -> None:
    assert_passing(release, "tests/kernels", *(f"--ignore={file}" for file in OWN))
