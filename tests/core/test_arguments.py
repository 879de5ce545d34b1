"""Arguments of another type than the signature says are one sentence, and paths are shown as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from making import SMALL, random_adapter
from merged_lora.adapters import Adapter
from merged_lora.errors import AdapterError
from merged_lora.files.layout import CONFIG_NAME, WEIGHTS_NAME


@pytest.mark.parametrize("path", [None, 3, b"a", ["a"]])
def test_what_is_no_path_is_refused_by_its_type(path: Any) -> None:
    message = f"^an adapter's path is text or a Path, not {type(path).__name__}$"
    with pytest.raises(AdapterError, match=message):
        Adapter.load(path)
    with pytest.raises(AdapterError, match=message):
        random_adapter(SMALL).save(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": 3}, "drop must be a list of words, not int"),
        ({"take": "heads"}, "take must be a list of words, not str"),
        ({"rename": ["a"]}, "rename must be a mapping, not list"),
        ({"rename": {1: "a"}}, "rename must hold text alone, got 1"),
    ],
)
def test_an_option_of_another_type_is_refused(options: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=f"^{message}$"):
        Adapter.load("a", **options)


@pytest.mark.parametrize("path", ["a", "./a", "a/"])
def test_a_short_path_is_nothing_else_in_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    message = rf"^a/{CONFIG_NAME}: missing; a PEFT adapter folder holds it beside {WEIGHTS_NAME}$"
    with pytest.raises(AdapterError, match=message):
        Adapter.load(path)
    with pytest.raises(AdapterError, match=r"^an adapter's path is empty$"):
        Adapter.load("")
