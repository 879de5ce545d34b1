"""The file of a calibration: what is written is what is read, and what does not fit is a line."""

from __future__ import annotations

import json
import logging
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from making import SMALL, random_adapter
from merged_lora.adapters import Adapter, calibrations_of
from merged_lora.bench.cases import calibrated
from merged_lora.calibration import (
    CALIBRATION_NAME,
    PARTS,
    Calibration,
    Exchange,
    Inputs,
    read_calibration,
    write_calibration,
)
from merged_lora.engine import merge
from merged_lora.errors import CalibrationError
from merged_lora.files.layout import Header

EXCHANGES = (Exchange((1, 2, 3), (4,), True), Exchange((5,), (6, 0, 319), False))
FIRST = "model.layers.0.mlp.down_proj"
SHARED = ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj")


def a_calibration(seed: int = 0, header: Header | None = None) -> Calibration:
    """The calibration that ``folder`` holds."""
    made = random_adapter(SMALL, header=header or Header("org/base"), seed=seed)
    calibration = calibrated(made, seed, exchanges=EXCHANGES).calibration
    assert isinstance(calibration, Calibration)
    return calibration


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter with a calibration that fits it."""
    random_adapter(SMALL, header=Header("org/base")).save(tmp_path / "a")
    write_calibration(tmp_path / "a" / CALIBRATION_NAME, a_calibration())
    return tmp_path / "a"


def same(one: Calibration, other: Calibration) -> bool:
    """Whether all fields and all bits are equal, and the same modules share their inputs."""
    plain = [(c.adapter, c.base_model, c.prompts, c.tokens, c.exchanges) for c in (one, other)]
    shares = [
        {name: [n for n, i in c.inputs.items() if i is inputs] for name, inputs in c.inputs.items()}
        for c in (one, other)
    ]
    pairs = [
        (getattr(one.inputs[name], part), getattr(other.inputs[name], part))
        for name in SMALL
        for part in PARTS
    ]
    equal = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    return plain[0] == plain[1] and shares[0] == shares[1] and equal


def test_what_is_written_is_what_is_read(folder: Path) -> None:
    read = read_calibration(folder / CALIBRATION_NAME)
    assert same(read, a_calibration())
    assert read.digest == a_calibration().digest
    assert read.inputs[SHARED[0]] is read.inputs[SHARED[1]]


def test_a_calibration_without_exchanges_or_a_base_model_is_read_as_it_was(tmp_path: Path) -> None:
    written = replace(a_calibration(header=Header()), exchanges=())
    write_calibration(tmp_path / "c", written)
    assert same(read_calibration(tmp_path / "c"), written)
    assert read_calibration(tmp_path / "c").base_model is None


def test_inputs_of_no_eigenpairs_are_read_as_they_were(tmp_path: Path) -> None:
    none = Inputs(torch.zeros(0), torch.zeros(0, 32, dtype=torch.float16), torch.ones(32))
    written = replace(a_calibration(), inputs=dict(a_calibration().inputs) | {SHARED[0]: none})
    write_calibration(tmp_path / "c", written)
    assert same(read_calibration(tmp_path / "c"), written)


def test_inputs_that_are_parts_of_one_tensor_are_written_apart(tmp_path: Path) -> None:
    whole = torch.ones(3, 80)
    views = Inputs(whole[0, :2], torch.ones(4, 80, dtype=torch.float16)[::2], whole[1])
    written = replace(a_calibration(), inputs=dict(a_calibration().inputs) | {FIRST: views})
    write_calibration(tmp_path / "c", written)
    assert same(read_calibration(tmp_path / "c"), written)


def test_an_adapter_keeps_the_calibration_beside_it(folder: Path) -> None:
    loaded = Adapter.load(folder)
    assert isinstance(loaded.calibration, Calibration)
    assert same(loaded.calibration, a_calibration())
    assert loaded.identity != loaded.digest
    bare = Adapter.load(folder, calibration=False)
    assert (bare.calibration, bare.identity) == (None, loaded.digest)


def changed(name: str, part: str) -> Calibration:
    """The calibration with one number of one tensor changed in its last bit."""
    old = a_calibration()
    tensor = getattr(old.inputs[name], part).clone()
    words = tensor.view(torch.int16 if tensor.dtype == torch.float16 else torch.int32)
    words.view(-1)[-1] ^= 1
    new = replace(old.inputs[name], **{part: tensor})
    return replace(old, inputs={n: new if i is old.inputs[name] else i for n, i in old.inputs.items()})


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", [FIRST, *SHARED])
def test_the_digest_covers_every_bit_of_the_inputs(name: str, part: str) -> None:
    assert changed(name, part).digest != a_calibration().digest


def test_the_digest_covers_the_adapter_the_exchanges_and_what_is_shared() -> None:
    old = a_calibration()
    inputs = dict(old.inputs)
    inputs[SHARED[0]] = replace(inputs[SHARED[0]])
    others = [
        replace(old, adapter="0" * 32),
        replace(old, exchanges=()),
        replace(old, exchanges=EXCHANGES[::-1]),
        replace(old, exchanges=(replace(EXCHANGES[0], fitted=False), EXCHANGES[1])),
        replace(old, exchanges=(Exchange((1, 2), (3, 4), True), EXCHANGES[1])),
        replace(old, inputs=inputs),
    ]
    assert len({old.digest, *(other.digest for other in others)}) == len(others) + 1


def test_the_bytes_of_a_calibration_count_what_is_shared_once() -> None:
    inputs = (4 * 6 + 2 * 6 * 32 + 4 * 32, 4 * 6 + 2 * 6 * 80 + 4 * 80)
    assert a_calibration().nbytes == 2 * inputs[0] + inputs[1] + 4 * 8


def stale(folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Load the adapter, and return the one warning about its calibration, which an error repeats."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "merged_lora"):
        adapter = Adapter.load(folder)
    (record,) = caplog.records
    warning = record.getMessage()
    assert isinstance(adapter.calibration, str)
    assert adapter.identity not in (adapter.digest, replace(adapter, calibration=a_calibration()).identity)
    with pytest.raises(CalibrationError) as caught:
        calibrations_of({"a": adapter}, "regmean")
    assert adapter.calibration in warning
    assert adapter.calibration in str(caught.value)
    assert "\n" not in warning
    assert len(warning) < 600
    return warning


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (random_adapter(SMALL, seed=5, header=Header("org/base")), "made for other weights"),
        (random_adapter(SMALL, header=Header("org/other")), "made on org/base, the adapter is for org/other"),
        (random_adapter(SMALL, header=Header()), "made on org/base, the adapter is for None"),
    ],
    ids=["weights", "base", "no base"],
)
def test_a_calibration_of_another_adapter_is_a_warning_and_is_not_used(
    folder: Path, other: Adapter, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = folder / CALIBRATION_NAME
    data = file.read_bytes()
    other.save(folder, overwrite=True)
    assert not file.exists()  # a new adapter does not keep the calibration of the old one
    file.write_bytes(data)
    assert message in stale(folder, caplog)


def test_a_calibration_of_other_modules_or_shapes_is_refused() -> None:
    adapter = random_adapter(SMALL, header=Header("org/base"))
    old = a_calibration()
    less = replace(old, inputs={name: i for name, i in old.inputs.items() if name != FIRST})
    with pytest.raises(CalibrationError, match=rf"lacks modules of the adapter: {FIRST}"):
        less.check(adapter.modules, adapter.digest, "org/base")
    narrow = Inputs(torch.ones(1), torch.ones(1, 79, dtype=torch.float16), torch.ones(79))
    with pytest.raises(CalibrationError, match=rf"79 inputs for {FIRST}, which takes 80"):
        replace(old, inputs=dict(old.inputs) | {FIRST: narrow}).check(
            adapter.modules, adapter.digest, "org/base"
        )


def test_an_adapter_with_a_stale_calibration_still_merges_without_one(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_calibration(folder / CALIBRATION_NAME, a_calibration(seed=7))
    expected = merge("ties(a)", {"a": Adapter.load(folder, calibration=False)}).digest
    with caplog.at_level(logging.WARNING, "merged_lora"):
        assert merge("ties(a)", {"a": folder}).digest == expected
    assert len(caplog.records) == 1
    with pytest.raises(CalibrationError, match="made for other weights"):
        merge("regmean(a)", {"a": folder})


def rewrite(
    folder: Path,
    change: Callable[[dict[str, torch.Tensor], dict[str, str]], object],
) -> None:
    """Change the tensors and the metadata of the calibration in a folder."""
    file = folder / CALIBRATION_NAME
    tensors = load_file(file)
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    change(tensors, metadata)
    save_file(tensors, file, metadata)


BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor], dict[str, str]], object], str]] = {
    "NaN": (lambda t, _: t[f"{FIRST}.rest"].fill_(torch.nan), f"inputs of {FIRST} hold NaN or infinity"),
    "infinity": (lambda t, _: t[f"{FIRST}.vectors"].fill_(torch.inf), "hold NaN or infinity"),
    "a negative value": (lambda t, _: t[f"{FIRST}.values"].neg_(), f"{FIRST} have negative squares"),
    "a negative rest": (lambda t, _: t[f"{FIRST}.rest"].neg_(), "have negative squares"),
    "another version": (lambda _, m: m.update(version="2"), "has format '2', this release reads '1'"),
    "no version": (lambda _, m: m.pop("version"), "has format 'None', this release reads '1'"),
    "a value too few": (
        lambda t, _: t.update({f"{FIRST}.values": torch.ones(5)}),
        f"the inputs of {FIRST} have wrong shapes or dtypes",
    ),
    "vectors of another width": (
        lambda t, _: t.update({f"{FIRST}.vectors": torch.ones(6, 79, dtype=torch.float16)}),
        "have wrong shapes or dtypes",
    ),
    "vectors in float32": (
        lambda t, _: t.update({f"{FIRST}.vectors": torch.ones(6, 80)}),
        "have wrong shapes or dtypes",
    ),
    "one axis too many": (
        lambda t, _: t.update({f"{FIRST}.values": torch.ones(6, 1)}),
        "have wrong shapes or dtypes",
    ),
    "a tensor is missing": (lambda t, _: t.pop(f"{FIRST}.rest"), "its parts do not fit together"),
    "no exchanges": (lambda t, _: t.pop("exchanges"), "its parts do not fit together"),
    "token ids that are not whole": (
        lambda t, _: t.update(exchanges=torch.ones(8)),
        "its token ids are not whole numbers from 0",
    ),
    "token ids below 0": (
        lambda t, _: t.update(exchanges=-torch.ones(8, dtype=torch.int32)),
        "its token ids are not whole numbers from 0",
    ),
    "a token too many": (
        lambda t, _: t.update(exchanges=torch.ones(9, dtype=torch.int32)),
        "its token ids do not have the lengths",
    ),
}
"""Changes to a sound calibration, with what its refusal says."""

LENGTHS = [
    "[]",
    "[[3, 1, true]]",
    "[[9, -1, true]]",
    "[[8, 0, true]]",
    "[[7.0, 1.0, true]]",
    "[[true, 7, 1]]",
]
FIELDS = ["", "null", "[]", "{}", "1", '"x"', "[[1]]", "[[[1]]]", "{", '{"x": 1}', "[1e999, 1]", "[" * 9999]


@pytest.mark.parametrize("fault", BROKEN)
def test_a_file_with_a_fault_is_refused_by_name(
    folder: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, message = BROKEN[fault]
    rewrite(folder, change)
    warning = stale(folder, caplog)
    assert message in warning
    assert str(folder / CALIBRATION_NAME) in warning


@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths_that_are_not_those_of_the_token_ids_are_refused(
    folder: Path, lengths: str, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(folder, lambda _, m: m.update(lengths=lengths))
    assert "its token ids do not have the lengths that it states" in stale(folder, caplog)


def put(field: str, text: str, _: object, metadata: dict[str, str]) -> None:
    metadata[field] = text


@pytest.mark.parametrize("field", ["adapter", "base_model", "prompts", "tokens", "inputs", "lengths"])
def test_a_field_that_is_missing_or_of_another_kind_is_refused(
    folder: Path, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    sound = (folder / CALIBRATION_NAME).read_bytes()
    rewrite(folder, lambda _, m: m.pop(field))
    assert "its parts do not fit together" in stale(folder, caplog)
    for text in FIELDS:
        (folder / CALIBRATION_NAME).write_bytes(sound)
        rewrite(folder, partial(put, field, text))
        if (field, text) != ("prompts", "1"):
            stale(folder, caplog)


@given(cut=st.integers(0, 10**9), junk=st.binary(max_size=12), at=st.integers(0, 10**9))
def test_a_file_that_is_cut_or_damaged_is_refused_or_is_sound(
    tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bytes, at: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged"
    write_calibration(file, a_calibration())
    data = file.read_bytes()
    file.write_bytes(data[: cut % len(data)])
    with pytest.raises(CalibrationError, match="not a sound safetensors file"):
        read_calibration(file)
    at %= 3000  # the header, where damage is hardest to take
    file.write_bytes(data[:at] + junk + data[at + len(junk) :])
    with suppress(CalibrationError):
        assert all(e.prompt and e.answer for e in read_calibration(file).exchanges)


def test_a_file_that_cannot_be_read_is_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = folder / CALIBRATION_NAME
    file.unlink()
    file.symlink_to("nowhere")
    assert "cannot be read (No such file or directory)" in stale(folder, caplog)
    file.unlink()
    file.mkdir()
    assert "cannot be read (Is a directory)" in stale(folder, caplog)


def test_an_older_calibration_is_replaced_and_has_the_mode_that_the_umask_gives(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        write_calibration(folder / CALIBRATION_NAME, a_calibration(seed=3))
    finally:
        os.umask(before)
    assert read_calibration(folder / CALIBRATION_NAME).digest == a_calibration(seed=3).digest
    assert (folder / CALIBRATION_NAME).stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        CALIBRATION_NAME,
    ]


def test_a_disk_that_fills_up_is_an_error_and_leaves_the_old_calibration(folder: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CalibrationError, match=r"cannot write .*: File too large"):
            write_calibration(folder / CALIBRATION_NAME, a_calibration(seed=3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(read_calibration(folder / CALIBRATION_NAME), a_calibration())
    assert len(list(folder.iterdir())) == 3


def test_writing_that_is_interrupted_leaves_the_old_calibration(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_calibration(folder / CALIBRATION_NAME, a_calibration(seed=3))
    assert same(read_calibration(folder / CALIBRATION_NAME), a_calibration())
    assert len(list(folder.iterdir())) == 3


def test_a_place_where_no_file_can_be_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot write .*: No such file or directory"):
        write_calibration(tmp_path / "nowhere" / CALIBRATION_NAME, a_calibration())


def test_what_is_read_does_not_change_with_the_file(folder: Path) -> None:
    read = read_calibration(folder / CALIBRATION_NAME)
    write_calibration(folder / CALIBRATION_NAME, a_calibration(seed=3))
    (folder / CALIBRATION_NAME).unlink()
    assert same(read, a_calibration())


def test_a_missing_calibration_says_how_to_make_one(folder: Path) -> None:
    (folder / CALIBRATION_NAME).unlink()
    with pytest.raises(CalibrationError) as caught:
        merge("regmean(a)", {"a": folder})
    assert str(caught.value) == (
        "regmean needs a calibration of every source, but a has none; make one with: "
        "merged-lora calibrate --model org/base --adapter a=PATH --prompts FILE.jsonl"
    )


def test_a_field_of_json_that_is_not_unicode_is_refused(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = (folder / CALIBRATION_NAME).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = json.dumps(header).encode().replace(b"org/base", b"\xff\xff\xff\xff\xff\xff\xff\xff")
    (folder / CALIBRATION_NAME).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    assert "not a sound safetensors file" in stale(folder, caplog)
