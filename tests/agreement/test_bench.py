"""The benchmark measures only what agrees, and says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from merged_lora.backends import Progress, Result, load_backend, no_progress
from merged_lora.bench import cases, cpu
from merged_lora.bench.__main__ import main
from merged_lora.bench.cpu import Case, Row
from merged_lora.plan import MergePlan


class Wrong:
    """The CPU backend with the last place of one entry turned."""

    name = "wrong"

    def warm_up(self, dtype: torch.dtype) -> None:
        load_backend("cpu").warm_up(dtype)

    def confine(self, threads: int, nice: int) -> None:
        """Ignored."""

    def make_room(self, progress: Progress) -> None:
        """Ignored."""

    def merge(self, plan: MergePlan, progress: Progress = no_progress) -> Result:
        result = load_backend("cpu").merge(plan, progress)
        name, f = next(iter(result.modules.items()))
        b = f.b.clone()
        b.view(torch.int32 if b.dtype == torch.float32 else torch.int16)[-1, -1] ^= 1
        return Result(result.modules | {name: replace(f, b=b)}, result.energy)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """The cases that would have been timed."""
    cases: list[Case] = []

    def measure(backend: object, case: Case) -> Row:
        cases.append(case)
        return Row(case.name, case.spec, 1, [1.0], [1.0])

    monkeypatch.setattr(cpu, "measure", measure)
    return cases


def test_what_disagrees_is_named_and_not_timed(
    untimed: list[Case], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(cpu, "load_backend", lambda name: Wrong())
    assert main(["cpu", "--json", str(tmp_path / "times.json")]) == 1
    assert untimed == []
    assert not (tmp_path / "times.json").exists()
    lines = [line for line in capsys.readouterr().out.splitlines() if "NumPy, every bit" in line]
    assert len(lines) == 18
    assert all("WRONG" in line and "small.tall differs" in line for line in lines)


def test_agreement_comes_first_then_every_time_goes_to_the_file(
    untimed: list[Case], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["cpu", "--json", str(tmp_path / "times.json")]) == 0
    assert untimed == cpu.CASES["factors"]
    assert "WRONG" not in capsys.readouterr().out
    report = json.loads((tmp_path / "times.json").read_text())
    assert [row["case"] for row in report["rows"]] == [case.name for case in untimed]
    assert {"cpu", "cores", "torch", "numpy", "numba", "peft"} <= report["machine"].keys()


def test_quick_leaves_out_the_large_svds(untimed: list[Case]) -> None:
    assert main(["cpu", "--quick"]) == 0
    assert [case.strategy for case in untimed] == ["linear"] * 3 + ["ties"] * 3 + ["dare_ties"] * 3


def test_the_cases_of_a_space_are_timed_after_its_own_agreement(
    untimed: list[Case], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cpu", "--space", "core"]) == 0
    assert untimed == cpu.CASES["core"]
    assert "the dense reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    "case",
    [
        Case("ties", 2, ", density=0.5", module="m", rounds=2, peft_rounds=2, faster=1e-9),
        Case("svd", 2, ", rank=16", module="m", dtype=torch.float32, rounds=2, peft_rounds=1, seconds=1e9),
    ],
    ids=str,
)
def test_a_case_is_timed_beside_peft_and_held_to_its_aims(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cases.LLAMA3_8B_LAYER, "m", (48, 80))
    row = cpu.measure(load_backend("cpu"), case)
    assert (len(row.ours_s), len(row.plan_s), len(row.peft_s)) == (2, 2, case.peft_rounds)
    assert [aim.met for aim in row.aims] == [True]
    entries = 16 * (48 + 80)
    assert row.bytes_moved == 3 * entries * (4 if case.dtype == torch.float32 else 2)


@pytest.mark.parametrize("strategy", cpu.CORE_SECONDS)
def test_the_memory_of_every_strategy_in_shared_bases_can_be_measured(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cases.LLAMA3_8B_LAYER, "m", (48, 80))
    assert cpu._peak_memory(Case(strategy, 2, module="m")) >= 0


def test_a_file_in_no_folder_is_refused_before_anything_is_measured(
    untimed: list[Case], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["cpu", "--json", str(tmp_path / "none" / "times.json")])
    assert caught.value.code == 2
    assert untimed == []


@pytest.mark.parametrize("benchmark", ["cpu", "gpu", "registers"])
def test_a_folder_is_refused_before_anything_is_measured(
    untimed: list[Case], tmp_path: Path, benchmark: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([benchmark, "--json", str(tmp_path)])
    assert caught.value.code == 2
    assert untimed == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_in_distinct_sources_no_magnitudes_tie_and_sums_are_exact(dtype: torch.dtype) -> None:
    sources = cases.distinct_sources(cases.SMALL, 8, 8, dtype)
    for module in cases.SMALL:
        for tensors in zip(*((f.a, f.b) for f in (s.modules[module] for s in sources.values())), strict=True):
            assert all(tensor.abs().unique().numel() == tensor.numel() for tensor in tensors)
            stacked = torch.stack(tensors)
            exact = stacked.double().sum(0)
            assert torch.equal(sum(stacked.float(), torch.zeros(())).double(), exact)
