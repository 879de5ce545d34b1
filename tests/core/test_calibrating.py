"""What a calibration holds is what the adapter's modules take as inputs, and what the adapter answers."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import resource
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import tiny
from making import random_adapter
from merged_lora import prompts as prompts_module
from merged_lora.adapters import Adapter
from merged_lora.calibrating import _Recorder, calibrate
from merged_lora.calibration import CALIBRATION_NAME, Calibration, Inputs, read_calibration
from merged_lora.errors import CalibrationError
from merged_lora.language_model import LanguageModel
from merged_lora.peft_files import Header
from merged_lora.sketch import Sketch, TokenCounts

HALF = 2.0**-11
"""The largest relative error of rounding to float16."""
LAYER = "model.layers.0."
TEXTS = [
    "hello",
    "who is there",
    "a",
    "what is a merge of two",
    "1 + 1 is",
    "yes or no",
    "bye",
    "yes yes yes",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return LanguageModel.load(tiny.make_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: an adapter ``a`` of all linear modules, and eight prompts."""
    monkeypatch.chdir(tmp_path)
    tiny.make_adapter(seed=1).save("a")
    write("prompts.jsonl", [{"prompt": text} for text in TEXTS])
    return tmp_path


def write(file: str, values: Sequence[object]) -> str:
    Path(file).write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return file


def calibrated(model: LanguageModel, **options: Any) -> Calibration:
    return calibrate(model, "a", "prompts.jsonl", **{"count": 8, "answers": 10} | options)


def dense(inputs: Inputs) -> NDArray[np.float64]:
    """The leading part of a second moment, ``[in, in]``."""
    vectors, values = inputs.vectors.double().numpy(), inputs.values.double().numpy()
    product: NDArray[np.float64] = (vectors.T * values) @ vectors
    return product


def second_moments(model: LanguageModel, calibration: Calibration) -> dict[str, NDArray[np.float64]]:
    """The second moment of each module's inputs, from inputs that hooks of its own recorded, in NumPy."""
    adapter = Adapter.load("a")
    fitted = [exchange for exchange in calibration.exchanges if exchange.fitted]
    found: dict[str, NDArray[np.float64]] = {}
    for strength in (0.0, 0.5, 1.0):
        seen: dict[str, list[NDArray[np.float64]]] = {name: [] for name in adapter.modules}
        handles = [
            model.model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name, seen=seen: seen[name].append(args[0][0].double().numpy())
            )
            for name in adapter.modules
        ]
        worn = {name: replace(f, scaling=strength * f.scaling) for name, f in adapter.modules.items()}
        with torch.inference_mode(), model.wearing(worn):
            for exchange in fitted:
                model.model(torch.tensor([exchange.prompt + exchange.answer[:-1]]))
        for handle in handles:
            handle.remove()
        for name, parts in seen.items():
            asked = np.concatenate([x[: len(e.prompt)] for x, e in zip(parts, fitted, strict=True)])
            predicting = np.concatenate([x[len(e.prompt) - 1 :] for x, e in zip(parts, fitted, strict=True)])
            assert len(predicting) == sum(len(e.answer) for e in fitted)
            each = (asked.T @ asked / len(asked) + predicting.T @ predicting / len(predicting)) / 2
            found[name] = found.get(name, 0.0) + each / 3
    factors = counts(model, calibration)
    return {name: factors[name] * moment for name, moment in found.items()}


def counts(model: LanguageModel, calibration: Calibration) -> dict[str, float]:
    """What the second moments of each module are multiplied by."""
    adapter = Adapter.load("a")
    fitted = [exchange for exchange in calibration.exchanges if exchange.fitted]
    names = list(calibration.inputs)
    with model.wearing(adapter.modules):
        each = [model.sensitivities(exchange.prompt, exchange.answer, names) for exchange in fitted]
    total = {name: sum(found[name] for found in each) / calibration.tokens[1] for name in each[0]}
    return {
        name: sum(total.get(n, 0.0) for n, x in calibration.inputs.items() if x is inputs) ** 0.5
        for name, inputs in calibration.inputs.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_the_second_moments_that_numpy_finds(
    model: LanguageModel, folder: Path, dtype: torch.dtype
) -> None:
    model = LanguageModel(copy.deepcopy(model.model).to(dtype), model.tokenizer)
    made = calibrated(model, components=160)
    for name, expected in second_moments(model, made).items():
        inputs = made.inputs[name]
        got = dense(inputs) + np.diag(inputs.rest.double().numpy())
        vectors, values = np.abs(inputs.vectors.double().numpy()), inputs.values.double().numpy()
        # Both vectors in a product are rounded to float16, where the smallest number is 2^-24. The rows of
        # the sketch are rounded to float32.
        bound = 2.1 * (vectors.T * values) @ (HALF * vectors + 2.0**-25) + 2.0**-20 * np.diag(expected).max()
        assert (np.abs(got - expected) <= bound + bound.T).all(), name


@pytest.mark.parametrize("components", [1, 5, 32])
def test_the_components_are_the_leading_ones_and_the_diagonal_is_whole(
    model: LanguageModel, folder: Path, components: int
) -> None:
    made = calibrated(model, components=components)
    for name, expected in second_moments(model, made).items():
        inputs = made.inputs[name]
        values = np.linalg.eigvalsh(expected)[::-1][:components]
        assert inputs.vectors.shape == (components, len(expected))
        np.testing.assert_allclose(inputs.values, values, rtol=0, atol=2.0**-20 * values[0])
        explained = dense(inputs).diagonal()
        diagonal = np.diag(expected)
        np.testing.assert_allclose(
            inputs.rest, np.maximum(diagonal - explained, 0), rtol=0, atol=2.0**-20 * diagonal.max()
        )
        assert (explained + inputs.rest.double().numpy() >= diagonal * (1 - 2.0**-20)).all()


def test_modules_that_are_given_the_same_inputs_share_them(model: LanguageModel, folder: Path) -> None:
    calibrated(model)
    inputs = read_calibration(Path("a") / CALIBRATION_NAME).inputs
    groups: dict[int, set[str]] = {}
    for name, each in inputs.items():
        groups.setdefault(id(each), set()).add(name.removeprefix(LAYER))
    assert sorted(
        sorted(group) for group in groups.values() if not any("layers.1" in name for name in group)
    ) == [
        ["mlp.down_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
    ]
    assert len(groups) == 8


def test_the_adapter_is_on_while_its_inputs_are_measured(model: LanguageModel, folder: Path) -> None:
    with_a = calibrated(model)
    zero = {
        name: type(f)(f.a, torch.zeros_like(f.b), f.scaling) for name, f in Adapter.load("a").modules.items()
    }
    Adapter(zero, Header("tiny")).save("a", overwrite=True)
    without = calibrated(model)
    assert [e.prompt for e in with_a.exchanges] == [e.prompt for e in without.exchanges]
    assert [e.answer for e in with_a.exchanges] != [e.answer for e in without.exchanges]


def test_a_source_whose_answers_depend_more_on_a_module_counts_more(
    model: LanguageModel, folder: Path
) -> None:
    made = calibrated(model)
    scaled = LanguageModel(copy.deepcopy(model.model), model.tokenizer)
    with torch.no_grad():
        scaled.model.get_output_embeddings().weight.mul_(3.0)  # the same answers, by thrice the margin
    sharper = calibrated(scaled)
    assert [e.answer for e in sharper.exchanges] == [e.answer for e in made.exchanges]
    before, after = counts(model, made), counts(scaled, sharper)
    for name, inputs in made.inputs.items():
        ratio = after[name] / before[name]
        assert ratio > 1.5
        np.testing.assert_allclose(sharper.inputs[name].values, ratio * inputs.values, rtol=1e-4)


def test_gradients_that_are_not_finite_are_an_error(
    model: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "sensitivities", lambda *_: {LAYER + "mlp.up_proj": float("nan")})
    with pytest.raises(CalibrationError, match="the gradients of the answers hold NaN or infinity"):
        calibrated(model)
    assert not (folder / "a" / CALIBRATION_NAME).exists()


def test_a_calibration_says_what_it_was_made_of(model: LanguageModel, folder: Path) -> None:
    made = calibrated(model)
    adapter = Adapter.load("a")
    assert isinstance(adapter.calibration, Calibration)
    assert adapter.calibration.digest == made.digest
    assert (made.adapter, made.base_model, made.prompts) == (adapter.digest, "tiny", 4)
    prompts = [tuple(model.tokenizer(text)["input_ids"]) for text in TEXTS]
    assert [e.prompt for e in made.exchanges] == prompts
    assert [e.fitted for e in made.exchanges] == [True, False] * 4
    with model.wearing(adapter.modules):
        assert [e.answer for e in made.exchanges] == model.answers(prompts, 10, lambda _: None)
    fitted = made.exchanges[::2]
    assert made.tokens == (sum(len(e.prompt) for e in fitted), sum(len(e.answer) for e in fitted))


def test_a_calibration_is_the_same_each_time(model: LanguageModel, folder: Path) -> None:
    assert calibrated(model).digest == calibrated(model).digest


def test_without_replay_all_prompts_are_measured_and_none_is_stored(
    model: LanguageModel, folder: Path
) -> None:
    kept = calibrated(model)
    made = calibrated(model, replay=False)
    assert (made.prompts, made.exchanges) == (8, ())
    assert made.tokens[0] == sum(len(e.prompt) for e in kept.exchanges)
    assert b"hello" not in (folder / "a" / CALIBRATION_NAME).read_bytes()
    write("prompts.jsonl", TEXTS[:1])
    assert calibrated(model, replay=False).prompts == 1


@pytest.mark.parametrize("components", [16, 32])
def test_the_file_is_at_most_as_large_as_an_adapter_of_that_rank(
    model: LanguageModel, folder: Path, components: int
) -> None:
    calibrated(model, components=components)
    tiny.make_adapter(seed=2, rank=components).save("ranked")
    size = (folder / "a" / CALIBRATION_NAME).stat().st_size
    assert size <= (folder / "ranked" / "adapter_model.safetensors").stat().st_size


def test_the_files_of_the_adapter_stay_as_they_are_and_a_stale_calibration_is_replaced(
    model: LanguageModel, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calibrated(model)
    stale = (folder / "a" / CALIBRATION_NAME).read_bytes()
    tiny.make_adapter(seed=2).save("a", overwrite=True)
    (folder / "a" / CALIBRATION_NAME).write_bytes(stale)
    before = {file.name: file.read_bytes() for file in Path("a").iterdir() if file.name != CALIBRATION_NAME}
    with caplog.at_level(logging.WARNING, "merged_lora"):
        calibrated(model)
        assert isinstance(Adapter.load("a").calibration, Calibration)
    assert not caplog.records
    after = {file.name: file.read_bytes() for file in Path("a").iterdir() if file.name != CALIBRATION_NAME}
    assert after == before


def test_the_shares_of_the_work_sum_to_one(model: LanguageModel, folder: Path) -> None:
    shares: list[float] = []
    calibrated(model, progress=shares.append)
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= 0


def test_an_embedding_has_the_frequencies_of_its_tokens(model: LanguageModel, folder: Path) -> None:
    modules = {"model.embed_tokens": (64, 320), "lm_head": (320, 64)}
    random_adapter(modules, 4, embeddings=["model.embed_tokens"]).save("a", overwrite=True)
    made = calibrated(model)
    inputs = made.inputs["model.embed_tokens"]
    assert inputs.vectors.shape == (0, 320)
    shares = np.zeros(320)
    positions = 0
    for exchange in made.exchanges[::2]:
        for token in exchange.prompt:
            shares[token] += 0.5 / made.tokens[0]
        for token in (exchange.prompt[-1], *exchange.answer[:-1]):
            shares[token] += 0.5 / made.tokens[1]
        positions += len(exchange.prompt) + len(exchange.answer) - 1
    factor = counts(model, made)["model.embed_tokens"]
    expected = (shares * positions + 1) / (positions + 320)
    np.testing.assert_allclose(inputs.rest, factor * expected, rtol=1e-6)
    assert float(inputs.rest.sum()) == pytest.approx(factor, rel=1e-6)


def test_an_output_layer_sees_all_tokens(model: LanguageModel, folder: Path) -> None:
    random_adapter({"lm_head": (320, 64)}, 4).save("a", overwrite=True)
    made = calibrated(model, components=64)
    (expected,) = second_moments(model, made).values()
    inputs = made.inputs["lm_head"]
    np.testing.assert_allclose(
        dense(inputs).diagonal() + inputs.rest.numpy(), expected.diagonal(), rtol=3 * HALF
    )


def test_a_module_that_no_token_reaches_has_zeros(model: LanguageModel, folder: Path) -> None:
    spare = LAYER + "mlp.spare"
    random_adapter({spare: (160, 64), LAYER + "mlp.up_proj": (160, 64)}, 4).save("a", overwrite=True)
    model.model.get_submodule(LAYER + "mlp").spare = torch.nn.Linear(64, 160)
    try:
        made = calibrated(model)
    finally:
        del model.model.get_submodule(LAYER + "mlp").spare
    unused = read_calibration(Path("a") / CALIBRATION_NAME).inputs[spare]
    assert (unused.values.shape, unused.vectors.shape) == ((0,), (0, 64))
    assert torch.equal(unused.rest, torch.zeros(64))
    assert len(made.inputs[LAYER + "mlp.up_proj"].values) == 32


def test_a_module_that_some_tokens_reach_weighs_each_alike() -> None:
    recorder = _Recorder({"expert": (6, False)}, 6)
    rows = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    recorder.begin(torch.tensor([0.1, 0.2, 0.3, 0.0], dtype=torch.float64))
    recorder.see("expert", rows[:2])
    recorder.begin(torch.tensor([0.4], dtype=torch.float64))
    recorder.see("expert", rows[2:])
    inputs = recorder.inputs()["expert"]
    expected = 0.15 * rows[:2].T @ rows[:2] + 0.4 * rows[2:].T @ rows[2:]
    torch.testing.assert_close(
        torch.tensor(dense(inputs).diagonal()) + inputs.rest,
        expected.diagonal().double(),
        rtol=3 * HALF,
        atol=0,
    )


def test_inputs_that_are_not_finite_are_an_error(model: LanguageModel, folder: Path) -> None:
    adapter = tiny.make_adapter(seed=1, scaling=1e29)
    adapter.save("a", overwrite=True)
    with pytest.raises(CalibrationError, match=r"the inputs of model\.layers\..* hold NaN or infinity"):
        calibrated(model)
    assert not (folder / "a" / CALIBRATION_NAME).exists()


# The sketch by itself.


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    width=st.integers(1, 80),
    rank=st.integers(1, 16),
    chunks=st.lists(st.integers(0, 400), min_size=1, max_size=5),
)
def test_a_sketch_of_inputs_of_low_rank_is_exact_however_many_there_are(
    seed: int, width: int, rank: int, chunks: list[int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(rank, width, generator=generator)
    rows = torch.randn(sum(chunks), rank, generator=generator) @ factor
    weights = torch.rand(len(rows), generator=generator, dtype=torch.float64)
    sketch = Sketch(width, 16, torch.device("cpu"))
    for part, weight in zip(torch.split(rows, chunks), torch.split(weights, chunks), strict=True):
        sketch.add(part, weight)
        assert sketch.used <= len(sketch.rows) == 256
    inputs = sketch.result()
    expected = (rows.double().T * weights) @ rows.double()
    got = torch.tensor(dense(inputs)) + torch.diag(inputs.rest.double())
    # The rows are rounded to float32, and the vectors to float16. The trace bounds all entries.
    assert float((got - expected).abs().max()) <= (4 * HALF) * float(expected.trace()) + 1e-30


def test_a_sketch_keeps_the_leading_directions_of_a_long_stream() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = 0.95 ** torch.arange(400.0)  # a slow decay: much of the energy is beyond what is kept
    rows = torch.randn(6000, 400, generator=generator) * scales
    sketch = Sketch(400, 32, torch.device("cpu"))
    for part in torch.split(rows, 100):
        sketch.add(part, torch.full((len(part),), 1 / 6000, dtype=torch.float64))
    inputs = sketch.result()
    expected = rows.double().T @ rows.double() / 6000
    best = torch.linalg.eigvalsh(expected).flip(0)[:32]
    assert float(inputs.values.sum() / best.sum()) > 0.999
    vectors = inputs.vectors.double()
    captured = torch.einsum("kn,nm,km->k", vectors, expected, vectors)
    assert float(captured.sum() / best.sum()) > 0.999
    assert len(sketch.rows) == 256


def test_an_eigenvalue_of_zero_is_left_out() -> None:
    sketch = Sketch(6, 4, torch.device("cpu"))
    sketch.add(
        torch.eye(6)[[0, 0, 3, 3]] * torch.tensor([[2.0], [2.0], [1.0], [0.0]]),
        torch.ones(4, dtype=torch.float64),
    )
    inputs = sketch.result()
    assert inputs.values.tolist() == pytest.approx([8, 1])
    assert inputs.vectors.abs().tolist() == [[1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]]
    assert inputs.rest.tolist() == pytest.approx([0] * 6, abs=1e-6)
    sketch = Sketch(6, 4, torch.device("cpu"))
    sketch.add(torch.zeros(9, 6), torch.ones(9, dtype=torch.float64))
    assert (sketch.result().vectors.shape, float(sketch.result().rest.sum())) == ((0, 6), 0)


def test_inputs_whose_squares_differ_by_far_are_told_apart() -> None:
    rows = torch.zeros(300, 8)
    rows[:, 0] = 3e4  # as the first token of a text has them
    rows[:, 1] = torch.where(torch.arange(300) % 2 == 0, 1.0, -1.0)
    sketch = Sketch(8, 4, torch.device("cpu"))
    sketch.add(rows, torch.full((300,), 1 / 300, dtype=torch.float64))
    inputs = sketch.result()
    assert inputs.values.tolist() == pytest.approx([9e8, 1], rel=1e-5)


def test_tokens_are_counted_by_their_weights() -> None:
    counts = TokenCounts(4, torch.device("cpu"))
    counts.add(torch.tensor([1, 1, 3]), torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64))
    assert counts.result().rest.tolist() == pytest.approx([1 / 7, 2.5 / 7, 1 / 7, 2.5 / 7])


# Prompts.


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
        ({"drop": ["dora"]}, "cannot drop dora"),
    ],
)
def test_an_option_out_of_its_range_is_a_line(
    model: LanguageModel, folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message) as caught:
        calibrated(model, **options)
    assert caught.type.__name__ in ("CalibrationError", "AdapterError")


def test_a_model_that_does_not_fit_is_found_before_prompts_are_read(
    model: LanguageModel, folder: Path
) -> None:
    random_adapter({LAYER + "mlp.up_proj": (160, 65)}).save("a", overwrite=True)
    with pytest.raises(CalibrationError, match="the model does not fit"):
        calibrate(model, "a", "nowhere")


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


# The model of the examples.


@pytest.mark.slow
def test_an_example_adapter_is_calibrated_in_seconds(folder: Path) -> None:
    from smollm2 import MODEL_DIR
    from tasks import TASKS, examples
    from train import ADAPTERS_DIR

    shutil.copytree(ADAPTERS_DIR / "sql", "sql", ignore=shutil.ignore_patterns(CALIBRATION_NAME))
    unseen = examples(TASKS["sql"], "train", 1472)[1440:]
    write("prompts.jsonl", [{"messages": [{"role": "user", "content": e.prompt}]} for e in unseen])
    before = resource.getrusage(resource.RUSAGE_SELF)
    made = calibrate(MODEL_DIR, "sql", "prompts.jsonl")
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 2 < 30
    # The adapter has rank 8 in bf16.
    weights = (Path("sql") / "adapter_model.safetensors").stat().st_size
    assert (Path("sql") / CALIBRATION_NAME).stat().st_size <= 4 * weights
    assert len({id(inputs) for inputs in made.inputs.values()}) == 4 * 30
    model = LanguageModel.load(MODEL_DIR)
    answers = [model.tokenizer.decode(e.answer, skip_special_tokens=True) for e in made.exchanges]
    assert sum(got == want.answer for got, want in zip(answers, unseen, strict=False)) >= 15
