"""PEFT and vLLM do with the adapters what ``docs/adapters.md`` says, and vLLM reads our merges of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from formats import building, readers
from formats.building import Build, merge
from formats.kinds import KINDS, NOT_CHECKED, ODD_KINDS
from formats.odd import ODD, OF
from formats.table import ROWS

pytestmark = pytest.mark.slow
RECORDED = readers.recorded()
IN_VLLM = {name: facts["vLLM"] for name, facts in RECORDED["rows"].items()}
SERVED = [n for n, row in ROWS.items() if row.of.outcome != "refused" and IN_VLLM.get(n) != readers.NO_LORA]
HEADED = [n for n, row in ROWS.items() if row.of.outcome == "carried over" and IN_VLLM.get(n) == readers.HEAD]


def assert_as_recorded(found: dict[str, object], expected: dict[str, object]) -> None:
    """The facts are those that were recorded, as far as the same releases were asked, and could be."""
    for reader, facts in found.items():
        if readers.releases()[reader] == RECORDED["releases"][reader] and NOT_CHECKED not in str(
            expected[reader]
        ):
            assert facts == expected[reader]


def test_every_row_and_every_kind_is_recorded() -> None:
    assert RECORDED["rows"].keys() == ROWS.keys()
    assert RECORDED["odd"].keys() == ODD.keys() == ODD_KINDS.keys()
    assert {row.kind for row in ROWS.values()} == KINDS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_peft_and_vllm_do_with_an_adapter_what_was_recorded(built: Build, name: str) -> None:
    assert_as_recorded(readers.of_row(built(name)), RECORDED["rows"][name])


@pytest.mark.parametrize("kind", ODD)
def test_peft_and_vllm_do_with_odd_files_what_was_recorded(built: Build, tmp_path: Path, kind: str) -> None:
    assert_as_recorded(readers.of_odd(built(OF), kind, tmp_path), RECORDED["odd"][kind])


@pytest.mark.parametrize("name", SERVED)
def test_vllm_reads_from_a_saved_merge_what_peft_reads(built: Build, tmp_path: Path, name: str) -> None:
    of = built(name)
    drop = ["--drop", *of.row.drop] if of.row.drop else []
    assert merge(of, tmp_path / "merged", *drop) == 0
    expected = building.deltas(building.load(of.row, tmp_path / "merged"))
    found = readers.in_vllm(of.row, tmp_path / "merged", expected)
    if found == readers.NO_LORA:
        pytest.skip("an older vLLM, which has no LoRA for this architecture")
    assert found == readers.SAME


@pytest.mark.parametrize("name", HEADED)
def test_vllm_reads_the_head_that_a_merge_took_over(built: Build, tmp_path: Path, name: str) -> None:
    of = built(name)
    assert merge(of, tmp_path / "merged", "--take", "heads=b") == 0
    expected = building.deltas(building.load(of.row, tmp_path / "merged"))
    found = readers.in_vllm(of.row, tmp_path / "merged", expected)
    if found == readers.NO_LORA or "modules_to_save being None" in found:
        pytest.skip("an older vLLM, which serves no heads of adapters")
    assert found == readers.HEAD
