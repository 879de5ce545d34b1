"""Prompts of all kinds, and everything that may go wrong while a calibration is made."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibrations import calibrated, write
from making import random_adapter
from merged_lora import prompts as prompts_module
from merged_lora.calibrating import calibrate
from merged_lora.calibration import CALIBRATION_NAME, read_calibration
from merged_lora.errors import CalibrationError, MergeError
from merged_lora.language_model import LanguageModel


def test_prompts_of_all_forms_are_read_in_order_and_repeated_ones_once(
    model: LanguageModel, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chat = [{"role": "user", "content": "hi"}]
    answered = [*chat, {"role": "assistant", "content": "no"}]
    lines: list[object] = [
        {"prompt": "x", "completion": "y"},
        "x",
        {"messages": chat},
        "z",
        {"messages": answered},
    ]
    text = "\ufeff" + "\n\n".join(
        map(json.dumps, lines)
    )  # a mark of the byte order, empty lines, no last line end
    Path("prompts.jsonl").write_text(text, encoding="utf-8")
    with caplog.at_level(logging.WARNING, "merged_lora"):
        made = calibrated(model)
    assert [e.prompt for e in made.exchanges] == [model.encode("x"), model.encode(chat), model.encode("z")]
    assert [r.getMessage() for r in caplog.records] == [
        "prompts.jsonl: 3 distinct prompts are used, 8 were asked for"
    ]


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: json.dumps(text).encode()))
def test_any_bytes_are_prompts_or_one_line_of_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_bytes(data)
    try:
        prompts = [prompt for _, prompt in prompts_module.read_prompts(file)]
    except CalibrationError as caught:
        error = str(caught)
        assert re.fullmatch(r".*any\.jsonl, line \d+: [^\n]+", error)
    else:
        assert all(isinstance(prompt, str) and prompt.encode() for prompt in prompts)


def test_no_more_of_a_file_is_read_than_is_needed(model: LanguageModel, folder: Path) -> None:
    with Path("prompts.jsonl").open("ab") as file:
        file.write(b"not JSON\n")
        file.truncate(1 << 40)
    assert len(calibrated(model).exchanges) == 8


def test_prompts_that_are_too_long_are_skipped_and_counted(
    model: LanguageModel, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write("prompts.jsonl", ["x" * 247, "y" * 246, "z" * 1000, "w"])
    with caplog.at_level(logging.WARNING, "merged_lora"):
        made = calibrated(model)
    assert [len(e.prompt) for e in made.exchanges] == [246, 1]
    assert [r.getMessage() for r in caplog.records] == [
        "prompts.jsonl: 2 prompts are too long and were skipped: "
        "the model takes 256 tokens, 10 of them the answer",
        "prompts.jsonl: 2 distinct prompts are used, 8 were asked for",
    ]


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no usable prompts, and at least 2 are needed"),
    "blank": (b"\n \n\n", "no usable prompts, and at least 2 are needed"),
    "one prompt": (b'"x"\n"x"\n', "1 usable prompt, and at least 2 are needed: one is kept back for replays"),
    "all too long": (
        json.dumps("x" * 300).encode(),
        "no usable prompts, and at least 2 are needed; 1 prompt is too long and was skipped: "
        "the model takes 256 tokens",
    ),
    "a million characters": (json.dumps("é" * 1_000_000).encode(), "1 prompt is too long"),
    "no JSON": (b'"x"\nhello\n', "line 2: not a line of JSON"),
    "cut JSON": (b'"x"\n{"prompt": "y', "line 2: not a line of JSON"),
    "a list": (b'"x"\n"y"\n["z"]\n', "line 3: a prompt is a line of the form"),
    "a number": (b"1\n", "line 1: a prompt is a line of the form"),
    "an empty text": (b'""\n', "line 1: a prompt is a line of the form"),
    "no text": (b'{"prompt": null}\n', "line 1: a prompt is a line of the form"),
    "messages as text": (b'{"messages": "x"}\n', "line 1: a prompt is a line of the form"),
    "a message as text": (b'{"messages": ["x"]}\n', "line 1: a prompt is a line of the form"),
    "a message of parts": (
        b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}\n',
        "line 1: a prompt is a line of the form",
    ),
    "no messages": (b'{"messages": []}\n', "line 1: no message is left that an assistant would answer"),
    "answers only": (
        b'{"messages": [{"role": "assistant", "content": "x"}]}\n',
        "line 1: no message is left that an assistant would answer",
    ),
    "bytes": (b'"\xff\xfe"\n', "line 1: not a line of JSON"),
    "half a character": (b'"\\ud800"\n', "line 1: not a line of JSON"),
    "half a character in a message": (
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}\n',
        "line 1: not a line of JSON",
    ),
    "deep": (b"[" * 100_000 + b"\n", "line 1: not a line of JSON"),
    "a long number": (b"9" * 10_000 + b"\n", "line 1: not a line of JSON"),
}
"""Files of prompts that no calibration can be made of, with what the error says."""


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=pytest.mark.slow) if f == "a million characters" else f for f in BAD]
)
def test_a_file_without_prompts_is_a_line_and_nothing_is_written(
    model: LanguageModel, folder: Path, fault: str
) -> None:
    data, message = BAD[fault]
    Path("prompts.jsonl").write_bytes(data)
    with pytest.raises(CalibrationError) as caught:
        calibrated(model)
    assert message in str(caught.value)
    assert str(caught.value).startswith("prompts.jsonl")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert not (folder / "a" / CALIBRATION_NAME).exists()


@pytest.mark.parametrize(
    ("size", "message"), [("MAX_LINE", "line 3: longer than 8"), ("MAX_FILE", "first 8 bytes")]
)
def test_a_file_without_end_is_not_read_to_its_end(
    model: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch, size: str, message: str
) -> None:
    monkeypatch.setattr(prompts_module, size, 8)
    Path("prompts.jsonl").write_bytes(b'"x"\n\n' + b"y" * 100)
    with pytest.raises(CalibrationError, match=message):
        calibrated(model)


@pytest.mark.parametrize("name", ["nowhere", "a", "n" * 300])
def test_a_file_that_cannot_be_read_is_a_line(model: LanguageModel, folder: Path, name: str) -> None:
    with pytest.raises(CalibrationError, match=f"{name}: cannot be read"):
        calibrate(model, "a", name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 1}, "count must be a whole number from 2 to 65536, got 1"),
        ({"count": 0, "replay": False}, "count must be a whole number from 1 to 65536, got 0"),
        ({"answers": 0}, "answers must be a whole number from 1 to 65536, got 0"),
        ({"components": 0}, "components must be a whole number from 1 to 65536, got 0"),
        ({"components": 2.5}, "components must be a whole number from 1 to 65536, got 2.5"),
        ({"drop": ["dora"]}, "no module that is called 'dora'"),
    ],
)
def test_an_option_out_of_its_range_is_a_line(
    model: LanguageModel, folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message) as caught:
        calibrated(model, **options)
    assert caught.type.__name__ in ("CalibrationError", "AdapterError")


def test_a_model_that_does_not_fit_is_found_before_all_prompts_are_read(
    model: LanguageModel, folder: Path
) -> None:
    random_adapter({"model.layers.0.mlp.up_proj": (160, 65)}).save("a", overwrite=True)
    Path("prompts.jsonl").write_text('"x"\nno JSON', encoding="utf-8")
    with pytest.raises(CalibrationError, match="the model does not fit"):
        calibrate(model, "a", "prompts.jsonl")


@pytest.mark.parametrize(("prompts", "message"), [("nowhere", "cannot be read"), ("bad", "line 1")])
def test_prompts_that_cannot_be_read_are_found_before_the_model_is_loaded(
    folder: Path, prompts: str, message: str
) -> None:
    Path("bad").write_text("no JSON", encoding="utf-8")
    with pytest.raises(CalibrationError, match=f"^{prompts}.*{message}"):
        calibrate("no-model", "a", prompts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "a", "prompts.jsonl"), "a model is a folder or a name on the hub, not NoneType"),
        (("no-model", None, "prompts.jsonl"), "an adapter's path is text or a Path, not NoneType"),
        (("no-model", "a", ["x"]), "the prompts are a file, not list"),
    ],
)
def test_an_argument_of_another_type_is_a_line(folder: Path, arguments: Any, message: str) -> None:
    with pytest.raises(MergeError, match=f"^{message}$"):
        calibrate(*arguments)


# What may go wrong at the end.


def test_a_disk_that_fills_up_leaves_the_adapter_as_it_was(model: LanguageModel, folder: Path) -> None:
    before = sorted(path.name for path in Path("a").iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CalibrationError, match="cannot write a/merged_lora_calibration"):
            calibrated(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in Path("a").iterdir()) == before


def test_a_folder_that_may_not_be_written_is_found_before_the_model_runs(
    model: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == Path("a") and mode == os.W_OK))
    with pytest.raises(CalibrationError, match="the folder is read-only"):
        calibrate(model, "a", "nowhere")


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_a_model_that_cannot_be_run_backward_is_a_line(
    model: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def full(*_: object) -> None:
        raise kind("out of memory\nTried to allocate 9 GiB")

    monkeypatch.setattr(model, "sensitivities", full)
    expected = r"cannot be run backward over \d+ tokens .*: out of memory Tried to allocate 9 GiB$"
    with pytest.raises(CalibrationError, match=expected):
        calibrated(model)
    assert not (folder / "a" / CALIBRATION_NAME).exists()


def test_an_interruption_leaves_the_model_and_the_old_calibration(model: LanguageModel, folder: Path) -> None:
    old = calibrated(model).digest
    before = copy.copy(model.model.generation_config)

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(model, progress=interrupted)
    assert read_calibration(Path("a") / CALIBRATION_NAME).digest == old
    assert len(list(Path("a").iterdir())) == 3
    assert model.model.generation_config.to_dict() == before.to_dict()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())
