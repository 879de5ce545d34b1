"""The GPU benchmark measures only what agrees, needs a GPU for it, and reports every time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.rehearsing import SHAPES, TINY, HostTimer, check
from merged_lora.backends import Slot
from merged_lora.bench import cases, device, device_agreement, gpu, pool
from merged_lora.bench.__main__ import main
from merged_lora.bench.agreement import Check
from merged_lora.bench.device import Call, Copies, CudaTimer
from merged_lora.bench.device_agreement import COUNTS, USUAL
from merged_lora.bench.gpu_report import Row
from merged_lora.factors import DTYPES
from merged_lora.plan import MergePlan
from merged_lora.triton_kernels.backend import TritonBackend

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")


def agreeing(backend: object) -> Iterator[tuple[str, Iterator[Check]]]:
    yield "nothing", iter([check("a", "ties"), check("b", "ties")])


def disagreeing(backend: object) -> Iterator[tuple[str, Iterator[Check]]]:
    yield "something", iter([check("this", "ties"), check("that", "ties", "differs")])


class Untimeable(HostTimer):
    def on_device(self, functions: Sequence[Call]) -> dict[str, float]:
        raise AssertionError("timed what disagrees")


def test_what_disagrees_is_named_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "groups", disagreeing)
    assert gpu.run(TINY, tmp_path / "times.json", timer=Untimeable()) == 1
    assert not (tmp_path / "times.json").exists()
    out = capsys.readouterr().out
    assert "WRONG" in out
    assert "that: differs" in out


@pytest.mark.parametrize("code", [0, 1])
def test_agreement_alone_tells_by_its_exit_code(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "groups", disagreeing if code else agreeing)
    assert main(["gpu", "--agreement-only"]) == code


@pytest.mark.soak
def test_every_check_of_the_device_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--agreement-only"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all(line.strip().startswith("ok") for line in lines[1:])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the whole benchmark writes, of tiny shapes; of the merges of entries, two."""
    file = tmp_path_factory.mktemp("bench") / "times.json"
    every = gpu.Bench.cases
    chosen = {*USUAL, "svd", "core_linear", "ties_svd"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "groups", agreeing)
        patch.setattr(gpu.Bench, "cases", lambda self: (c for c in every(self) if c.strategy in chosen))
        assert gpu.run(TINY, file, timer=HostTimer()) == 0
    read: dict[str, Any] = json.loads(file.read_text())
    return read


@pytest.mark.slow
def test_every_case_is_in_the_report_with_every_time(report: dict[str, Any]) -> None:
    rows = [(r["case"], r["sources"], r["dtype"], r["slot_rank"]) for r in report["rows"]]
    for count in TINY.counts:
        for case in ("linear", "ties", "dare_ties"):
            assert (case if count == 4 else f"{case} of {count}", count, "bfloat16", 4) in rows
        assert ("ties, cold" if count == 4 else f"ties of {count}, cold", count, "bfloat16", 4) in rows
    for case in ("linear", "ties", "dare_ties"):
        assert (f"{case}, float32", 4, "float32", 4) in rows
    assert ("svd of 2", 2, "bfloat16", 4) in rows
    for row in report["rows"]:
        assert all(seconds > 0 for times in row["seconds"].values() for seconds in times)
        if row["case"] in ("linear", "ties", "ties, cold", "dare_ties"):
            expected = dict.fromkeys(("copy", "kernels", "write", "queued", "call"), 1)
            assert {name: len(times) for name, times in row["seconds"].items()} == expected
            assert {name: len(times) for name, times in row["work"].items()} == {
                "_host_kernel": 1,
                "Memcpy": 1,
            }
            assert row["seconds"]["write"] == [sum(times[0] for times in row["work"].values())]
            assert row["seconds"]["kernels"] == row["work"]["_host_kernel"]


def test_what_has_an_aim_is_measured_before_all_else() -> None:
    names = [case.name for case in gpu.Bench(TINY, HostTimer()).cases()]
    first = ["linear", "ties", "dare_ties", "ties, cold", "linear, planned anew", "svd", *gpu.ENTRY_AIMS]
    assert names[: len(first)] == first
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_the_bytes_of_a_row_are_those_of_the_sources_and_of_the_slots(report: dict[str, Any]) -> None:
    entries = 4 * sum(rows + columns for rows, columns in TINY.shapes.values())
    found = {(r["case"], r["sources"], r["dtype"], r["slot_rank"]): r["bytes"] for r in report["rows"]}
    assert found["linear of 2", 2, "bfloat16", 4] == 2 * (2 + 1) * entries
    assert found["linear, float32", 4, "float32", 4] == 4 * (4 + 1) * entries
    assert found["stage of ties", 4, "bfloat16", 4] == 2 * (4 + 1) * entries
    assert found["place", 4, "bfloat16", 4] == 2 * 2 * entries


def test_every_aim_is_judged(report: dict[str, Any]) -> None:
    aims = {aim["what"]: aim for row in report["rows"] for aim in row["aims"]}
    for case, limit in gpu.COPY_AIMS.items():
        for name in ("kernels", "write"):
            aim = aims[f"{case}, {name} over a copy of the same bytes"]
            assert aim["aim"] == limit
            assert aim["at_most"]
    svds = [aim for what, aim in aims.items() if "times PEFT's speed" in what and what.startswith("svd of ")]
    assert [(aim["aim"], aim["at_most"]) for aim in svds] == [(1000, False)]
    assert any(what.startswith("ties of 4") and aim["aim"] == 100 for what, aim in aims.items())
    assert any("milliseconds" in what and aim["aim"] == 30 for what, aim in aims.items())


def test_the_report_says_what_was_measured_and_on_what(report: dict[str, Any]) -> None:
    assert report["machine"].pop("copy bytes per second") > 0
    assert report["machine"] == {"gpu": "none"}
    assert report["checks"] == 2
    assert all("MAGMA" in text for text in report["left_out"])  # what torch's builds for CPUs lack
    assert report["modules"] == 1
    assert (report["work"]["rank"], report["work"]["rounds"], report["density"]) == (4, 2, 0.5)
    assert report["date"].startswith("20")


@pytest.mark.soak
def test_svds_that_would_take_too_long_are_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "groups", agreeing)
    two = dict(list(SHAPES.items())[:2])
    quick = replace(TINY, shapes=two, counts=(4,), sets=1, svd_seconds=0.0, everything=False)
    assert gpu.run(quick, None, timer=HostTimer()) == 0
    out = capsys.readouterr().out
    assert "left out: PEFT's svd of model.layers.0.self_attn.q_proj" in out
    assert "float32\n" not in out


def test_a_wrong_merge_is_noticed_before_it_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write = TritonBackend.write

    def wrong(self: TritonBackend, plan: MergePlan, slots: Mapping[str, Slot]) -> None:
        write(self, plan, slots)
        next(iter(slots.values())).b[-1, -1] += 1

    monkeypatch.setattr(TritonBackend, "write", wrong)
    monkeypatch.setattr(gpu, "groups", agreeing)
    assert gpu.run(TINY, tmp_path / "times.json", timer=HostTimer()) == 1
    assert not (tmp_path / "times.json").exists()
    assert "WRONG linear(a, b, c, d): model.layers.0.self_attn.q_proj differs" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["ties", "svd"])
def test_a_slot_that_is_not_wholly_written_is_noticed(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonBackend, "write", lambda self, plan, slots: None)
    sources = pool.Pool(SHAPES, 4, 4, torch.bfloat16, HostTimer().device)
    with pytest.raises(pool.DisagreementError, match="not wholly written"):
        sources.merges(strategy, 4, "", 1).verify()


def test_a_wrong_truncation_is_noticed() -> None:
    merges = pool.Pool(SHAPES, 2, 4, torch.float32, HostTimer().device).merges("svd", 2, ", rank=4", 1)
    merges.write(0)
    plan, slots = merges.plans[0], merges.slots[0]
    names = pool.one_of_each(SHAPES)
    assert names == ["model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj"]
    assert device_agreement.find_different_truncation(plan, names, slots) is None
    slots[names[1]].a[0, 0] *= 1.001
    assert str(device_agreement.find_different_truncation(plan, names, slots)).startswith(names[1])


def test_sets_share_no_source_and_fill_slots_beside_each_other() -> None:
    merges = pool.Pool(SHAPES, 8, 4, torch.bfloat16, HostTimer().device).merges("linear", 4, "", 4, 16)
    assert [plan.spec.names for plan in merges.plans] == [("a", "b", "c", "d"), ("e", "f", "g", "h")]
    first, second = (slots["model.layers.0.self_attn.q_proj"].a for slots in merges.slots)
    assert first.shape == (16, 40)
    assert second.data_ptr() - first.data_ptr() == first.nbytes


@pytest.mark.slow
def test_a_merge_that_is_planned_anew_keeps_other_entries() -> None:
    sources = pool.Pool({"large": (1 << 10, 40)}, 4, 16, torch.bfloat16, HostTimer().device)
    merges = sources.merges("ties", 4, ", density={density}", 1)
    merges.write(0)
    before = merges.slots[0]["large"].b.clone()
    merges.write_anew(0)
    assert not torch.equal(merges.slots[0]["large"].b, before)
    merges.verify()


def test_copies_move_the_bytes_they_are_asked_for() -> None:
    copies = Copies(torch.device("cpu"), 4096, 2)
    copies(1)
    assert torch.equal(copies._target[1], copies._source[1])
    assert copies._source[1].nbytes + copies._target[1].nbytes == 4096


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_awkward_sources_hold_zeros_of_both_signs_subnormals_and_ties(dtype: torch.dtype) -> None:
    f = cases.awkward_sources(cases.SMALL, 1, 8, dtype)["a"].modules["small.wide"]
    info = torch.finfo(dtype)
    assert f.b.isfinite().all()
    assert f.b.abs().max() < info.max * 2.0**-13
    assert ((f.b == 0) & f.b.signbit()).any()
    assert ((f.b == 0) & ~f.b.signbit()).any()
    assert ((f.b != 0) & (f.b.abs() < info.smallest_normal)).any()
    assert (f.b.abs() == 0.375).sum() > 1


def test_wrong_eigenvalues_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    eigh = torch.linalg.eigh

    def off(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = eigh(x)
        return values * (1 + 1e-11), vectors

    assert {check.find() for check in device_agreement.eigenvalues(HostTimer().device)} == {None}
    monkeypatch.setattr(torch.linalg, "eigh", off)
    wrong = [check.what for check in device_agreement.eigenvalues(HostTimer().device) if check.find()]
    assert len([what for what in wrong if what.startswith("eigenvalues")]) == 4


def test_an_approximation_that_is_not_the_best_is_noticed() -> None:
    sources = pool.Pool(SHAPES, 2, 4, torch.float32, HostTimer().device)
    merges = sources.merges("svd", 2, ", rank=4", 1)
    plan = merges.plans[0]
    result = sources.backend.merge(plan)
    name = next(iter(SHAPES))
    assert device_agreement.not_best(plan.modules[name], result.modules[name]) is None
    result.modules[name].b[:, 0] *= 1.01
    assert device_agreement.not_best(plan.modules[name], result.modules[name]) is not None


class Profile:
    """A profile of these activities: their names, microseconds, and whether they are the CPU's or CUDA's."""

    def __init__(self, *recorded: tuple[str, float, str]) -> None:
        self.recorded = recorded

    def __call__(self, activities: object) -> Profile:
        return self

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def events(self) -> list[Any]:
        return [
            SimpleNamespace(
                name=name,
                device_type=SimpleNamespace(name=kind),
                time_range=SimpleNamespace(elapsed_us=lambda us=us: us),
            )
            for name, us, kind in self.recorded
        ]


def test_the_devices_work_is_added_up_by_name_over_all_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    launch, copy = ("cudaLaunchKernel", 9.0, "CPU"), ("Memcpy", 1.0, "CUDA")
    recorded = Profile(("_trim", 2.0, "CUDA"), launch, copy, ("_trim", 4.0, "CUDA"))
    monkeypatch.setattr(device, "profile", recorded)
    seconds = CudaTimer(torch.device("cpu")).on_device([lambda: log.append("work")] * 2)
    assert seconds == pytest.approx({"_trim": 3e-6, "Memcpy": 0.5e-6})
    assert log == ["wait", "work", "work", "wait"]


def test_a_device_on_which_nothing_is_recorded_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(device, "profile", Profile(("cudaLaunchKernel", 9.0, "CPU")))
    with pytest.raises(RuntimeError, match="recorded no work"):
        CudaTimer(torch.device("cpu")).on_device([lambda: None])


def test_only_our_kernels_count_as_kernels() -> None:
    row = Row("ties", "ties(a, b)", "bfloat16", 2, 16, 1000)
    row.add_work({"_combine_kernel": 3.0, "Memcpy HtoD (Pinned -> Device)": 1.0, "void at::native::x": 2.0})
    assert row.seconds == {"kernels": [3.0], "write": [6.0]}


def test_a_whole_call_ends_when_the_device_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: time.sleep(0.01))
    queued, done = CudaTimer(torch.device("cpu")).until_done(lambda: None)
    assert 0 <= queued < done
    assert done >= 0.01


@pytest.mark.parametrize("tool", ["echo 580.1", "exit 9", None])
def test_the_facts_name_the_gpu_and_every_version(
    tool: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = SimpleNamespace(name="X", multi_processor_count=132, total_memory=2**37, L2_cache_size=60_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: made)
    monkeypatch.setenv("PATH", str(tmp_path))
    if tool:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{tool}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    facts = CudaTimer(torch.device("cpu")).facts()
    assert str(facts["driver"]).startswith("580.1" if tool == "echo 580.1" else "unknown: ")
    assert (facts["gpu"], facts["memory GiB"], facts["L2 MB"]) == ("X", 128.0, 60.0)
    assert facts["torch"] == torch.__version__
    assert {"cuda", "rocm", "triton", "numpy", "peft"} <= facts.keys()


@WITHOUT_GPU
def test_without_a_gpu_nothing_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["gpu"])  # under the interpreter
    assert caught.value.code == 2
    assert "no GPU to time; --agreement-only runs under the interpreter" in capsys.readouterr().err


@pytest.mark.slow
@WITHOUT_GPU
def test_without_a_gpu_and_without_the_interpreter_there_is_one_line() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "merged_lora.bench", "gpu", "--agreement-only"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "backend triton needs a CUDA or ROCm device" in line


def test_without_layers_there_is_nothing_to_measure() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["gpu", "--layers", "0"])
    assert caught.value.code == 2


def test_the_command_measures_what_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[gpu.Work, Path | None, bool]] = []

    def run(work: gpu.Work, file: Path | None, agreement_only: bool) -> int:
        asked.append((work, file, agreement_only))
        return 0

    monkeypatch.setattr(gpu, "run", run)
    assert main(["gpu", "--quick", "--layers", "2", "--json", "times.json"]) == 0
    assert main(["gpu", "--agreement-only"]) == 0
    (quick, file, _), (whole, _, _) = asked
    assert (len(quick.shapes), len(whole.shapes)) == (14, 224)
    assert (quick.everything, whole.everything) == (False, True)
    assert file == Path("times.json")
    assert [only for _, _, only in asked] == [False, True]


def test_agreement_meets_every_number_of_sources_that_is_timed() -> None:
    assert set(gpu.Work(SHAPES).counts) <= set(COUNTS)
