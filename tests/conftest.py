"""How tests are run: one core for each process, Triton's interpreter without a GPU, and in which process.

Without a GPU, the kernels run under Triton's interpreter, in this process and only in this one.  Without a
numba that can be imported, tests that import the CPU backend are skipped, in whatever way they import it.
"""

import gc
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from running import Run

# torch and NumPy read it while they are imported.  With more, the helpers of each process that runs tests
# and of each server that a test starts spin on the cores that the others need.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it while it is imported, for its own functions
    import triton

    triton.knobs.runtime.interpret = True  # and here whenever a kernel is defined
    del os.environ["TRITON_INTERPRET"]  # processes that a test starts decide for themselves


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in a hook of the same name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let each file stay in one process of several, and all tests of engines in one: they share a server.

    A file with an engine of its own may say otherwise, so that the processes have about the same to do.
    """
    for item in items:
        if item.get_closest_marker("xdist_group"):
            continue
        group = "engines" if item.get_closest_marker("engine") else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish() -> None:
    """Let the garbage collector pass by what was imported and collected, which stays until the end.

    Otherwise a full collection takes a second and more, and some tests need many.
    """
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # nanobind reports what is left at the end


class CpuBackendGate(MetaPathFinder):
    """Finds no module.  The import of the CPU backend's loops skips the test, or its file, without numba."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name in ("merged_lora.cpu_kernels.kernels", "merged_lora.cpu_kernels.compiling"):
            try:
                import numba  # noqa: F401
            except ImportError as error:
                pytest.skip(f"the CPU backend needs numba: {error}", allow_module_level=True)


sys.meta_path.insert(0, CpuBackendGate())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> "Run":
    """Run the command in this process; returns its exit code, stdout and stderr."""
    from merged_lora.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def pytest_report_header() -> str:
    import triton

    return f"triton: {triton.__version__}"
