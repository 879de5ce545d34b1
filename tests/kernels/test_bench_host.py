"""The benchmark of a write's host time: every write is measured, and none of its launches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from merged_lora.bench import cases, host
from merged_lora.bench.device_agreement import USUAL
from merged_lora.triton_kernels.kernels import combine, trim

KINDS = ("again", "moved", "first", "placed", "placed_first")


@pytest.mark.slow
def test_all_times_are_written_and_nothing_is_launched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def launched(*_: object, **__: object) -> None:
        raise AssertionError("a kernel is launched")

    for module, kernel in ((combine, "_combine_kernel"), (trim, "_find_thresholds_kernel")):
        monkeypatch.setattr(module, kernel, {(n,): launched for n in range(1 << 16)})
    monkeypatch.setattr(cases, "llama3_8b", lambda layers: cases.SMALL)
    threads = torch.get_num_threads()
    try:
        assert host.run(1, 2, tmp_path / "host.json") == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads((tmp_path / "host.json").read_text())
    assert report["modules"] == len(cases.SMALL)
    assert len(report["rows"]) == len(host.COUNTS) * len(USUAL)
    for row in report["rows"]:
        assert [len(row[kind]) for kind in KINDS] == [2] * 5
    assert report["aims"][0]["aim"] == host.AIM
    assert "host time of a write of 2 modules" in capsys.readouterr().out
