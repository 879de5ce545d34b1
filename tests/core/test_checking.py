"""A check finds the source whose skill a merge lost, and the commands around it say so."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from merged_lora.adapters import Adapter
from merged_lora.calibrating import calibrate
from merged_lora.calibration import CALIBRATION_NAME, Calibration
from merged_lora.checking import check
from merged_lora.engine import merge
from merged_lora.errors import CalibrationError, MergeError, SpecError, UnknownAdapterError
from merged_lora.language_model import LanguageModel
from running import Run, command, environment, started

AB = ("--adapter", "a=a", "--adapter", "b=b")
WORDS = ["hello", "who is there", "a", "what is a merge", "1 + 1 is", "yes or no", "bye", "yes yes yes"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model ``model``, calibrated adapters ``a`` and ``b`` and ``bare``, which is not."""
    root = tmp_path_factory.mktemp("check")
    model = LanguageModel.load(tiny.make_model(root / "model"))
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": word}) + "\n" for word in WORDS))
    for seed, name in enumerate(["a", "b", "bare"]):
        tiny.make_adapter(seed).save(root / name)
        if name != "bare":
            calibrate(model, root / name, root / "prompts.jsonl", count=8, answers=6)
    return root


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


@pytest.fixture(scope="module")
def model(made: Path) -> LanguageModel:
    return LanguageModel.load(made / "model")


def test_an_adapter_by_itself_keeps_all_of_its_answers(model: LanguageModel, folder: Path) -> None:
    (found,) = check("a", {"a": "a"}, model)
    assert (found.source, found.kept, found.total, found.lost) == ("a", 8, 8, False)
    calibration = Adapter.load("a").calibration
    assert isinstance(calibration, Calibration)
    with model.wearing(Adapter.load("a").modules):
        replayed = [model.replay(e.prompt, e.answer) for e in calibration.exchanges]
    tokens = sum(len(e.answer) for e in calibration.exchanges)
    assert found.nll == pytest.approx(-sum(each.log_likelihood for each in replayed) / tokens, rel=1e-6)


def test_a_source_that_a_merge_destroys_is_found_and_comes_first(
    model: LanguageModel, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "merged_lora"):
        found = check("0.01*a + b", {"a": "a", "b": "b"}, model)
    assert [each.source for each in found] == ["a", "b"]
    assert (found[0].lost, found[1].lost) == (True, False)
    assert found[0].nll > found[1].nll
    (record,) = caplog.records
    assert record.getMessage() == f"sum(0.01*a, b): a: {found[0].kept} of 8 of its answers survive"


def test_what_is_counted_is_what_the_merged_adapter_answers(model: LanguageModel, folder: Path) -> None:
    merged = merge("a + 0.03*b", {"a": "a", "b": "b"})
    calibration = Adapter.load("a").calibration
    assert isinstance(calibration, Calibration)
    with model.wearing(merged.modules):
        answers = model.answers([e.prompt for e in calibration.exchanges], 6, lambda _: None)
    kept = sum(answer == e.answer for answer, e in zip(answers, calibration.exchanges, strict=True))
    (found,) = [s for s in check("a + 0.03*b", {"a": "a", "b": "b"}, model) if s.source == "a"]
    assert (found.kept, found.total) == (kept, 8)
    assert 0 < kept < 8  # or this test compares nothing


def test_a_merge_that_is_fitted_to_inputs_is_run_over_the_other_prompts(
    model: LanguageModel, folder: Path
) -> None:
    found = check("regmean(a, b)", {"a": "a", "b": "b"}, model)
    assert [each.total for each in found] == [4, 4]


def test_a_check_takes_adapters_in_memory_a_backend_a_rank_and_reports_its_progress(
    model: LanguageModel, folder: Path
) -> None:
    shares: list[float] = []
    adapters: dict[str, str | Adapter] = {"a": Adapter.load("a"), "b": Adapter.load("b"), "unused": "nowhere"}
    found = check("a + b", adapters, model, backend="numpy", rank=1, progress=shares.append)
    assert {each.source for each in found} == {"a", "b"}
    assert sum(shares) == pytest.approx(1)
    assert found != check("a + b", adapters, model)


def test_a_check_leaves_nothing_behind(model: LanguageModel, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    check("a + b", {"a": "a", "b": "b"}, model)
    assert sorted(folder.rglob("*")) == before
    assert not any(module._forward_hooks for module in model.model.modules())


def test_what_cannot_be_checked_is_a_line(model: LanguageModel, folder: Path, tmp_path: Path) -> None:
    def refused(kind: type[MergeError], message: str, spec: str, **adapters: str | Path | Adapter) -> None:
        with pytest.raises(kind, match=message):
            check(spec, adapters, model)

    refused(
        CalibrationError, r"a check needs a calibration .* bare has none; make one with", "bare", bare="bare"
    )
    refused(UnknownAdapterError, "unknown adapter 'c'", "a + c", a="a")
    refused(SpecError, "at character", "ties(a", a="a")
    tiny.make_adapter(5).save(tmp_path / "q")
    calibrate(model, tmp_path / "q", "prompts.jsonl", count=2, answers=2, replay=False)
    refused(
        CalibrationError, "holds no answers; calibrate it again without --no-replay", "q", q=tmp_path / "q"
    )


def test_a_model_that_does_not_fit_the_merge_is_a_line(folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    make: Any = LlamaForCausalLM
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2
    )
    other = LanguageModel(make(config).eval(), None)
    with pytest.raises(CalibrationError, match=r"the model does not fit: it has no model\.layers\.1"):
        check("a", {"a": "a"}, other)


def test_the_command_prints_the_worst_first_and_exits_3_if_a_skill_is_lost(run: Run, folder: Path) -> None:
    code, out, err = run("check", "0.01*a + b", *AB, "--model", "model")
    assert code == 3
    assert re.fullmatch(
        r"a: [0-3] of 8 of its answers survive, \d+\.\d{3} nats per token\n"
        r"b: [4-8] of 8 of its answers survive, \d+\.\d{3} nats per token\n",
        out,
    )
    assert re.fullmatch(
        r"merged-lora: warning: sum\(0\.01\*a, b\): a: [0-3] of 8 of its answers survive\n", err
    )


def test_the_command_exits_0_if_all_skills_are_left_and_prints_json(run: Run, folder: Path) -> None:
    code, out, err = run("check", "a", *AB[:2], "--model", "model", "--json", "--backend", "numpy")
    assert (code, err) == (0, "")
    (row,) = json.loads(out)
    assert row.keys() == {"source", "kept", "total", "nll", "lost"}
    assert (row["source"], row["kept"], row["total"], row["lost"]) == ("a", 8, 8, False)


def test_calibrating_says_in_one_line_what_was_made(run: Run, folder: Path) -> None:
    file = folder / "bare" / CALIBRATION_NAME
    arguments = ("calibrate", "--model", "model", "--adapter", "c=bare", "--prompts", "prompts.jsonl")
    try:
        code, out, err = run(*arguments, "--count", 6, "--answers", 3, "--components", 4)
        assert (code, err) == (0, "")
        calibration = Adapter.load("bare").calibration
        assert isinstance(calibration, Calibration)
        asked, answered = calibration.tokens
        assert {len(e.answer) for e in calibration.exchanges} <= {1, 2, 3}
        assert re.fullmatch(
            rf"bare/{CALIBRATION_NAME}: 3 prompts with {asked} tokens and {answered} tokens of answers, "
            rf"3 more kept back for replays, 4 components, {file.stat().st_size / 1e6:.1f} MB, \d+\.\d s\n",
            out,
        )
        code, out, err = run(*arguments, "--no-replay")
        assert code == 0
        assert "kept back" not in out
        assert err == "merged-lora: warning: prompts.jsonl: 8 distinct prompts are used, 16 were asked for\n"
    finally:
        file.unlink(missing_ok=True)


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no model": (["calibrate", "--adapter", "a=a", "--prompts", "p"], "arguments are required: --model"),
    "no such model": (
        ["calibrate", "--model", "a", "--adapter", "a=a", "--prompts", "prompts.jsonl"],
        "cannot load the model a: ",
    ),
    "no such adapter": (
        ["calibrate", "--model", "model", "--adapter", "a=nowhere", "--prompts", "prompts.jsonl"],
        "nowhere: no such adapter folder",
    ),
    "no such file": (
        ["calibrate", "--model", "model", "--adapter", "a=a", "--prompts", "nowhere"],
        "nowhere: cannot be read (No such file or directory)",
    ),
    "a count of 1": (
        ["calibrate", "--model", "model", "--adapter", "a=a", "--prompts", "p", "--count", "1"],
        "count must be a whole number from 2 to 65536, got 1",
    ),
    "a check of an adapter that is not calibrated": (
        ["check", "bare", "--adapter", "bare=bare", "--model", "model"],
        "a check needs a calibration of every source, but bare has none; make one with: merged-lora",
    ),
    "a check with an adapter too many": (
        ["check", "a", *AB, "--model", "model"],
        "--adapter b=... is not used",
    ),
    "a check with a wrong rank": (
        ["check", "a", *AB[:2], "--model", "model", "--rank", "0"],
        "at least 1, got 0",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_on_stderr_and_nothing_is_written(run: Run, folder: Path, mistake: str) -> None:
    arguments, message = MISTAKES[mistake]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"merged-lora: error: [^\n]+\n", err)
    assert message in err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


STALL = "import os, time\nos.fsync = lambda _: (print('writing', flush=True), time.sleep(100))"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
def test_calibrating_that_is_stopped_leaves_no_half_calibration(
    folder: Path, number: signal.Signals, code: int
) -> None:
    before = set(folder.rglob("*"))
    process = started(
        STALL,
        "calibrate",
        "--model",
        "model",
        "--adapter",
        "c=bare",
        "--prompts",
        "prompts.jsonl",
        "--count",
        "2",
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, out) == (code, "")
    assert "Traceback" not in err
    assert set(folder.rglob("*")) == before


@pytest.mark.slow
def test_a_pipe_sees_no_progress_bar_of_ours_or_of_transformers(folder: Path) -> None:
    check = command("check", "a", *AB[:2], "--model", "model")
    done = subprocess.run(check, capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


def test_a_check_runs_in_float32_on_the_cpu(model: LanguageModel) -> None:
    if model.model.device.type == "cpu":
        assert {parameter.dtype for parameter in model.model.parameters()} == {torch.float32}
