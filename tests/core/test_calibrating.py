"""What a calibration holds is what the adapter's modules take as inputs, and what the adapter answers."""

from __future__ import annotations

import copy
import logging
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import tiny
from calibrations import HALF, TEXTS, calibrated, dense, write
from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.calibrating import _Recorder, calibrate
from merged_lora.calibration import CALIBRATION_NAME, Calibration, read_calibration
from merged_lora.errors import CalibrationError
from merged_lora.files.layout import Header
from merged_lora.language_model import LanguageModel

LAYER = "model.layers.0."


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
