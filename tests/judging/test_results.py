"""Rows outlive an interruption at any byte, and a file of something else is never written to."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from merged_lora.errors import EvaluationError
from merged_lora.judging.results import Results

ABOUT = {"metric": "exact", "limit": 64}


def filled(file: Path) -> None:
    with Results(file, ABOUT).open() as results:
        for i in range(3):
            results.add(f"row {i}", {"score": i, "answer": "ä\n"})


def test_a_run_goes_on_from_what_was_written(tmp_path: Path) -> None:
    filled(tmp_path / "r.jsonl")
    again = Results(tmp_path / "r.jsonl", ABOUT)
    assert (len(again), again["row 2"]) == (3, {"score": 2, "answer": "ä\n"})
    with again.open():
        again.add("row 3", {"score": 3})
    assert len(Results(tmp_path / "r.jsonl", ABOUT)) == 4


def test_a_file_that_ends_anywhere_gives_the_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    filled(file)
    whole = file.read_bytes()
    begins = [i for i in range(len(whole)) if whole[i - 1 : i] == b"\n"]
    for end in range(begins[0], len(whole)):
        file.write_bytes(whole[:end])
        found = Results(file, ABOUT)
        assert len(found) == sum(begin <= end for begin in begins) - 1
        with found.open():
            found.add("new", {})
        assert len(Results(file, ABOUT)) == len(found)
        assert "new" in Results(file, ABOUT)


@pytest.mark.parametrize("text", ["{}\n", "[]\n", "x\n", '{"about": {}}\n[]\n', "\n", "half a line"])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"r\.jsonl"):
        Results(file, ABOUT)
    assert file.read_text(encoding="utf-8") == text


def test_other_settings_are_named(tmp_path: Path) -> None:
    filled(tmp_path / "r.jsonl")
    with pytest.raises(EvaluationError, match="with another limit; name another file"):
        Results(tmp_path / "r.jsonl", ABOUT | {"limit": 65})


def test_a_full_disk_is_one_line_and_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "r.jsonl"
    filled(file)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with Results(file, ABOUT).open() as results:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(EvaluationError, match=r"cannot write .*No space left"):
            results.add("row 3", {})
    assert len(Results(file, ABOUT)) >= 3


def test_rows_without_a_file_stay_in_memory() -> None:
    with Results(None, ABOUT).open() as results:
        results.add("a", {"score": 1})
    assert json.dumps(dict(results["a"])) == '{"score": 1}'


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    filled(file)
    early = Results(file, ABOUT)
    with Results(file, ABOUT).open() as first:
        with pytest.raises(EvaluationError, match="another run writes to it"), early.open():
            pass
        first.add("row 3", {})
    with pytest.raises(EvaluationError, match="another run has written to it"), early.open():
        pass
    assert len(Results(file, ABOUT)) == 4


def test_a_refused_file_keeps_the_line_that_was_never_finished(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    filled(file)
    file.write_bytes(whole := file.read_bytes() + b'{"key": "ro')
    with pytest.raises(EvaluationError, match="another limit"):
        Results(file, ABOUT | {"limit": 65})
    assert file.read_bytes() == whole


def test_a_full_disk_leaves_the_error_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "r.jsonl"
    filled(file)
    with Results(file, ABOUT).open() as results:
        monkeypatch.setattr(
            os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(EvaluationError, match=r"cannot write .*r\.jsonl: No space left on device"):
            results.add("row 3", {})
        assert "row 3" not in results
