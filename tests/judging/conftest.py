"""How all tests of this folder ask a server."""

import pytest

from merged_lora.judging import served


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No attempt after the first, except where a test wants more."""
    monkeypatch.setattr(served, "ATTEMPTS", 0)
