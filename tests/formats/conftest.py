"""Builds every row of the table once for all tests of this folder."""

from __future__ import annotations

import pytest

from formats.building import Build, Built, build_twice
from formats.table import ROWS


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    made: dict[str, Built] = {}

    def build(name: str) -> Built:
        if name not in made:
            made[name] = build_twice(ROWS[name], tmp_path_factory.mktemp("row"))
        return made[name]

    return build
