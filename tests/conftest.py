"""Where there is no GPU, the kernels run under Triton's interpreter, in this process and only in this one."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it while it is imported, for its own functions
    import triton

    triton.knobs.runtime.interpret = True  # and here whenever a kernel is defined
    del os.environ["TRITON_INTERPRET"]  # processes that a test starts decide for themselves


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let each file stay in one process of several, and all tests of engines in one: they share a server."""
    for item in items:
        group = "engines" if item.get_closest_marker("engine") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
