"""Which process of several runs a test."""

from __future__ import annotations

import pytest


def test_the_tests_of_a_file_share_a_process(request: pytest.FixtureRequest) -> None:
    # pytest-xdist writes a test's group behind its name, and shares out tests without one as they come: then
    # each process starts servers and builds models of its own.
    grouped = getattr(request.config.option, "loadgroup", False)
    file = request.node.nodeid.partition("::")[0]
    assert request.node.nodeid.endswith(f"@{file}") == grouped
