"""The servers of a GPU's first day, rehearsed on a CPU: what is found is kept, what is wrong is seen."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from openai import OpenAI

from merged_lora.bench import first_day_server as day
from merged_lora.bench import recording, serving
from merged_lora.bench.cases import llama3_8b
from merged_lora.bench.first_day_server import Shape, Steps
from merged_lora.bench.launcher import vllm_command
from merged_lora.bench.recording import Record

TINY = {
    "layers": 2,
    "hidden": 64,
    "intermediate": 160,
    "heads": 2,
    "kv-heads": 1,
    "vocabulary": 320,
    "rank": 8,
}


@pytest.mark.soak
@pytest.mark.engine
@pytest.mark.timeout(1200)
def test_all_of_it_runs_on_a_tiny_model(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "merged_lora.bench.first_day_server", "--json", str(tmp_path)),
        *("--minutes", "18", "--requests", "2", "--dtype", "float32", "--flags=--enforce-eager"),
        *("--no-invariant", "--gpu-gib", "0.25", *(f"--{name}={value}" for name, value in TINY.items())),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / day.FILE).read_text())
    assert results["state"] == "finished"
    assert results["not_reached"] == []
    assert len(results["steps"]) == 11
    steps = {step["name"]: step for step in results["steps"]}
    found = steps["a merge beside its twin on disk, and slots that are used again"]
    assert found["log-probabilities apart"]["merge - twin"] == 0
    assert found["log-probabilities apart"]["merge - plain adapter"] > 0
    assert steps["server with the plugin"]["cache tokens"] > 0
    assert steps["stall of a stream"]["gaps"]["with the plugin"]["largest"]
    assert steps["warm requests and first ones"]["first"]


NO_CLIENT = cast(OpenAI, None)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """What is found of log-probabilities that are given in the order in which they are requested."""

    def find(*values: float) -> dict[str, Any]:
        given = iter(values)
        monkeypatch.setattr(serving, "logprobs", lambda client, model: [next(given)] * 8)
        return day.answers(NO_CLIENT)

    return find


Answers = Callable[..., dict[str, Any]]


def test_a_merge_that_is_its_twin_and_no_other_is_right(answers: Answers) -> None:
    assert answers(-1.0, -2.0, -1.0, -3.0, -4.0, -1.0)["wrong"] == []


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ((-1.0, -2.0, -1.1, -3.0, -4.0, -1.0), "merge - twin"),
        ((-1.0, -2.0, -1.0, -3.0, -4.0, -3.0), "merge - merge after others"),
        ((-1.0, -1.0, -1.0, -3.0, -4.0, -1.0), "merge - plain adapter is 0"),
        ((-1.0, -2.0, -1.0, -1.0, -4.0, -1.0), "merge - other merge is 0"),
    ],
)
def test_an_answer_that_is_anothers_is_wrong(answers: Answers, values: tuple[float, ...], wrong: str) -> None:
    assert answers(*values)["wrong"] == [wrong]


def test_a_number_that_is_none_is_as_far_apart_as_can_be(answers: Answers) -> None:
    assert answers(math.nan, -2.0, -1.0, -3.0, -4.0, -1.0)["wrong"]


def test_slots_that_are_mixed_up_in_a_batch_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def mixed(client: OpenAI, model: str, tokens: int) -> list[float]:
        asked.append(model)
        return [-1.0 if (model == day.SPEC) == (len(asked) <= 2) else -2.0] * 8

    monkeypatch.setattr(serving, "logprobs", mixed)
    assert day.in_one_batch(NO_CLIENT)["wrong"] == [day.SPEC, day.OTHER]


def test_the_size_of_the_cache_is_read_from_the_metrics() -> None:
    series = 'vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="1000",x="a,b"} 1.0'
    assert day.cache_size(f"vllm:other 1.0\n{series}\n")["cache tokens"] == 16_000
    with pytest.raises(LookupError):
        day.cache_size("vllm:other 1.0\n")


def test_steps_that_fail_or_are_wrong_are_told_and_the_next_are_done(tmp_path: Path) -> None:
    record = Record(tmp_path / "x.json", steps=[], not_reached=[])
    do = Steps(record, 1).do

    def fault() -> dict[str, Any]:
        raise RuntimeError("no answer\nand the end of a log")

    assert not do("a", fault)
    assert not do("b", lambda: {"wrong": ["merge - twin"]})
    assert day.has_failed(record.data)
    assert do("c", lambda: {"found": 3})
    assert not do("d", fault, seconds=61)
    read = json.loads((tmp_path / "x.json").read_text())
    assert [step["state"] for step in read["steps"]] == [recording.FAILED, recording.WRONG, "ok"]
    assert read["steps"][0]["error"] == "RuntimeError: no answer"
    assert "the end of a log" in read["steps"][0]["text"]
    assert read["steps"][2]["found"] == 3
    assert read["not_reached"] == ["d"]


def test_the_shape_is_that_of_llama_3_8b() -> None:
    assert Shape().modules() == llama3_8b(32)


def test_adapters_cover_every_module_and_no_two_layers_are_alike() -> None:
    shape = Shape(layers=2, hidden=64, intermediate=160, heads=2, kv_heads=1, vocabulary=320, rank=8)
    adapters = day.random_adapters(shape)
    assert set(adapters) == {"sql", "json", "tone", "sql32", "tone32"}
    for adapter in adapters.values():
        assert {name: (f.b.shape[0], f.a.shape[1]) for name, f in adapter.modules.items()} == shape.modules()
        first, second = (adapter.modules[f"model.layers.{i}.mlp.up_proj"] for i in (0, 1))
        assert not torch.equal(first.a, second.a)
        assert not torch.equal(first.b, second.b)


@pytest.mark.slow
def test_a_checkout_is_laid_out_as_if_it_were_installed(tmp_path: Path) -> None:
    day.lay_out_package(tmp_path)
    code = (
        "import importlib.metadata as m, merged_lora, merged_lora.triton_kernels.kernels.words;"
        "(e,) = {e.value for e in m.entry_points(group='vllm.general_plugins', name='merged_lora')};"
        "print(merged_lora.__file__, e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [
        str(tmp_path / "merged_lora" / "__init__.py"),
        "merged_lora.vllm_plugin:register",
    ]
    assert not (tmp_path / "triton_kernels").exists()


@pytest.mark.parametrize("installed", [True, False])
def test_vllm_is_started_where_it_merely_lies_on_the_path(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    if installed:
        (tmp_path / "vllm").touch()
    module = [str(tmp_path / "python3"), "-P", "-m", "vllm.entrypoints.cli.main"]
    assert vllm_command() == ([str(tmp_path / "vllm")] if installed else module)
