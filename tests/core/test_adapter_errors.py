"""Adapter files that are damaged, contradictory, or hold what no merge supports: each has a clear error."""

import json
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from making import SMALL, peft_tensors, random_adapter, write_by_hand
from merged_lora.adapters import Adapter
from merged_lora.errors import AdapterError

NAME = "model.layers.0.q_proj"
A = f"base_model.model.{NAME}.lora_A.weight"
B = f"base_model.model.{NAME}.lora_B.weight"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound adapter of one module."""
    return write_by_hand(tmp_path / "adapter", peft_tensors(NAME))


def configure(folder: Path, **fields: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def refused(folder: Path | str, message: str, drop: tuple[str, ...] = ()) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        Adapter.load(folder, drop)
    assert len(str(caught.value)) < 800


def test_the_folder_of_these_tests_is_sound(folder: Path) -> None:
    assert list(Adapter.load(folder).modules) == [NAME]


@pytest.mark.parametrize("name", ["nowhere", "n" * 300])
def test_a_path_that_is_no_folder_is_refused(folder: Path, name: str) -> None:
    refused(folder.parent / name, "no such adapter folder|cannot be read")


def test_a_path_with_nul_is_refused(folder: Path) -> None:
    refused(f"{folder}\0", "NUL")


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    refused(folder, f"{file}: missing")


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_folder_in_the_place_of_a_file_is_refused(folder: Path, file: str) -> None:
    (folder / file).unlink()
    (folder / file).mkdir()
    refused(folder, f"{file}: (missing|cannot be read)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'"LORA"', "not a JSON object"),
        (b"{}", "peft_type is None, only LORA"),
        (b'{"peft_type": "LOHA"}', "peft_type is 'LOHA', only LORA"),
        (b'{"peft_type": "%s"}' % (b"x" * 100_000), "peft_type is 'x+...x+', only LORA"),
        (b'{"peft_type": %s%s}' % (b"[" * 980, b"]" * 980), "peft_type is .*, only LORA|not valid JSON"),
        (b" " * (16 << 20) + b"{}", "larger than 16777216 bytes"),
    ],
    ids=lambda value: value[:24],
)
def test_a_config_that_is_no_adapter_configuration_is_refused(
    folder: Path, text: bytes, message: str
) -> None:
    (folder / CONFIG).write_bytes(text)
    refused(folder, message)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"alora_invocation_tokens": [1]},
        {"alora_invocation_string": "<|start_of_role|>"},
        {"invocation_string": "<|start_of_role|>"},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"megatron_config": {"x": 1}},
        {"arrow_config": {"top_k": 3}},
        {"kasa_config": {"beta": 1}},
        {"use_of_tomorrow": True},
        {"tomorrow_config": {"x": 1}},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "OLoRA"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "LoRA-GA"},
        {"init_lora_weights": "milora"},
        {"init_lora_weights": "EVA"},
        {"init_lora_weights": 5},
    ],
    ids=str,
)
def test_what_no_merge_supports_is_refused_by_name(folder: Path, fields: dict[str, object]) -> None:
    configure(folder, **fields)
    key, value = next(iter(fields.items()))
    refused(folder, f"uses what no merge supports: '?{key}")
    if isinstance(value, str) and value.lower().startswith(("pissa", "olora", "loftq", "corda", "lora")):
        refused(folder, f"{value}' \\(it changed the base model; convert it")
    elif key == "init_lora_weights":
        refused(folder, f"{value}'? \\(unknown, it may have changed the base model\\)")


@pytest.mark.parametrize(
    "init", [True, False, "gaussian", "Gaussian", "eva", "orthogonal", "mica", "MiCA", None]
)
def test_an_initialisation_that_left_the_base_alone_is_taken(folder: Path, init: object) -> None:
    configure(folder, init_lora_weights=init)
    assert list(Adapter.load(folder).modules) == [NAME]


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"target_parameters": ["mlp.experts.down_proj"]},
        {"velora_config": {"num_groups": 4}},
        {"monteclora_config": {"num_samples": 4}},
        {"use_of_tomorrow": False},
        {"tomorrow_config": {}},
        {"merge_weights": True, "unsloth_version": "2026.1"},
    ],
    ids=str,
)
def test_what_a_configuration_announces_and_the_file_does_not_hold_is_no_obstacle(
    folder: Path, fields: dict[str, object]
) -> None:
    before = Adapter.load(folder).digest
    configure(folder, **fields)
    assert Adapter.load(folder).digest == before


def test_everything_unsupported_is_named_at_once(folder: Path) -> None:
    configure(folder, use_dora=True)
    extra = {"base_model.model.lm_head.weight": torch.ones(2, 2), B.replace("weight", "bias"): torch.ones(8)}
    rewrite(folder, peft_tensors(NAME) | extra)
    refused(
        folder,
        r"use_dora \(.*; PEFT's merge_and_unload makes one model of it and its base\), "
        r"heads \(.*\): lm_head.weight, lora_bias \(.*\): .*lora_B.bias; "
        "can be left out with --drop heads lora_bias",
    )


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / WEIGHTS)


EXPERTS = "base_model.model.model.layers.0.mlp.experts"
DROPS: dict[str, tuple[dict[str, object], list[str]]] = {
    "heads": (
        {},
        ["base_model.model.score.weight", "base_model.model.lm_head.bias", "classifier.a.weight"],
    ),
    "embeddings": ({}, ["base_model.model.model.embed_tokens.weight", "transformer.wpe.weight"]),
    "modules_to_save": (
        {"modules_to_save": ["norm", "pooler"]},
        ["base_model.model.model.norm.weight", "base_model.model.pooler.dense.bias"],
    ),
    "biases": ({"bias": "all"}, ["base_model.model.model.layers.0.mlp.up_proj.bias"]),
    "lora_bias": ({"lora_bias": True}, [B.replace("weight", "bias")]),
    "tokens": (
        {"trainable_token_indices": [1]},
        ["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"],
    ),
}


@pytest.mark.parametrize("kind", DROPS)
def test_what_can_be_left_out_is_left_out_on_request_and_only_then(folder: Path, kind: str) -> None:
    rest = Adapter.load(folder).digest
    fields, extra = DROPS[kind]
    configure(folder, **fields)
    rewrite(folder, peft_tensors(NAME) | {name: torch.ones(6, 6) for name in extra})
    refused(folder, f"{kind} .*; can be left out with --drop {kind}")
    assert Adapter.load(folder, [kind]).digest == rest
    for other in DROPS.keys() - {kind, "modules_to_save"}:
        refused(folder, kind, (other,))
    whole = kind in ("heads", "embeddings", "modules_to_save")
    if whole:
        assert Adapter.load(folder, ["modules_to_save"]).digest == rest


@pytest.mark.parametrize(
    ("names", "stored"),
    [
        (["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], 2),
        (["gate_up_proj", "down_proj"], 2),  # as PEFT writes it for target_modules of a model of experts
        (["mlp.experts.down_proj"], 1),
    ],
)
def test_factors_of_parameters_are_left_out_on_request(folder: Path, names: list[str], stored: int) -> None:
    rest = Adapter.load(folder).digest
    configure(folder, target_parameters=names)
    pairs = {
        f"{EXPERTS}{'.base_layer' * depth}.lora_{side}.weight": torch.ones(8, 8)
        for depth in range(stored)
        for side in "AB"
    }
    rewrite(folder, peft_tensors(NAME) | pairs)
    assert Adapter.load(folder).digest != rest
    assert Adapter.load(folder, ["target_parameters"]).digest == rest


@pytest.mark.parametrize("word", ["norm", "model.norm", "n*m", "model.layers.0.input_layernorm"])
def test_a_module_that_was_saved_whole_is_left_out_by_name(folder: Path, word: str) -> None:
    rest = Adapter.load(folder).digest
    name = word if "layers" in word else "model.norm"
    rewrite(folder, peft_tensors(NAME) | {f"base_model.model.{name}.weight": torch.ones(2)})
    refused(
        folder,
        f"{name}.weight; can be left out with --drop {name.rpartition('.')[2]} of the command merged-lora$",
    )
    refused(folder, name, ("orm", "modules_to_save", "model", "layers.0"))
    assert Adapter.load(folder, [word]).digest == rest


def test_leaving_out_spares_modules_whose_names_only_look_alike(folder: Path) -> None:
    configure(folder, target_parameters=["proj.weight"])
    assert list(Adapter.load(folder, ["target_parameters"]).modules) == [NAME]
    configure(folder, target_parameters=None, modules_to_save=["proj"])
    rewrite(folder, peft_tensors(NAME) | {"base_model.model.q_proj.weight": torch.ones(2, 2)})
    refused(folder, "q_proj.weight; can be left out with --drop q_proj", ("modules_to_save",))


@pytest.mark.parametrize("word", ["", "a b", "../x", "x" * 300])
def test_what_cannot_be_the_name_of_a_part_says_what_can(folder: Path, word: str) -> None:
    refused(folder, "cannot drop .*; it can be one of heads, embeddings, modules_to_save, biases", (word,))


@pytest.mark.parametrize("key", ["modules_to_save", "target_parameters"])
@pytest.mark.parametrize("value", [5, "lm_head", {"x": 1}, [1]], ids=str)
def test_a_malformed_list_of_what_to_leave_out_is_refused(folder: Path, key: str, value: object) -> None:
    configure(folder, **{key: value})
    refused(folder, f"{key} in adapter_config.json is not a list of names", (key,))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 8}, r"factors of shape \(4, 8\) and \(8, 4\), but adapter_config.json says rank 8"),
        ({"rank_pattern": {"q_proj": 2}}, "says rank 2"),
        ({"r": 0}, "rank 0 of model.layers.0.q_proj is not a whole number from 1 to 65536"),
        ({"r": 65537}, "rank 65537 of"),
        ({"r": None}, "rank None of"),
        ({"r": True}, "rank True of"),
        ({"r": 4.0}, r"rank 4.0 of"),
        ({"r": "4"}, "rank '4' of"),
        ({"r": [[[4]]]}, "rank .*4.* of"),
        ({"rank_pattern": [4]}, "rank_pattern is not an object"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern holds '\(', which is not a regular expression"),
        ({"alpha_pattern": {"(" * 5000: 4}}, "which could take forever to match"),
        ({"rank_pattern": {"(a+)+b": 4}}, r"rank_pattern holds '\(a\+\)\+b', which could take forever"),
        ({"rank_pattern": {"a*a*a*a*a*b": 4}}, "which could take forever to match"),
        ({"use_rslora": 1}, "use_rslora is neither true nor false"),
        ({"alpha_pattern": {"a{99999999999}": 4}}, "which is not a regular expression"),
        ({"alpha_pattern": "q_proj"}, "alpha_pattern is not an object"),
        (
            {"lora_alpha": None},
            "lora_alpha None of model.layers.0.q_proj is not a number of size up to 1e.30",
        ),
        ({"lora_alpha": True}, "lora_alpha True of"),
        ({"lora_alpha": "8"}, "lora_alpha '8' of"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan of"),
        ({"lora_alpha": float("inf")}, "lora_alpha inf of"),
        ({"lora_alpha": 1.1e30}, "lora_alpha 1.1e.30 of"),
        ({"lora_alpha": 10**400}, "lora_alpha 1000.*000 of"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_contradicts_the_tensors_or_itself_is_refused(
    folder: Path, fields: dict[str, object], message: str
) -> None:
    configure(folder, **fields)
    refused(folder, message)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({A: torch.ones(4, 8)}, f"{NAME} has no lora_B"),
        ({B: torch.ones(8, 4)}, f"{NAME} has no lora_A"),
        ({A: torch.ones(8, 4), B: torch.ones(8, 4)}, "says rank 4"),
        ({A: torch.ones(4, 8), B: torch.ones(8, 3)}, "says rank 4"),
        ({A: torch.ones(4, 8, 1, 1), B: torch.ones(8, 4)}, r"shape \(4, 8, 1, 1\), not a matrix"),
        ({A: torch.ones(4, 0), B: torch.ones(8, 4)}, r"shape \(4, 0\), not a matrix"),
        ({A: torch.ones(()), B: torch.ones(8, 4)}, r"shape \(\), not a matrix"),
        (
            {A: torch.ones(4, 8).double(), B: torch.ones(8, 4)},
            "lora_A is torch.float64, .*; save it in one of",
        ),
        ({A: torch.ones(4, 8), B: torch.ones(8, 4).int()}, "lora_B is torch.int32, only"),
        ({A: torch.ones(4, 8), B: torch.ones(8, 4).to(torch.float8_e4m3fn)}, "lora_B is torch.float8"),
        ({"x": torch.ones(1)}, "not LoRA factors: x"),
        ({}, "holds no LoRA factors"),
        (peft_tensors(NAME) | {f"{NAME}.lora_magnitude_vector": torch.ones(8)}, "not LoRA.*magnitude_vector"),
        (
            peft_tensors(NAME)
            | {f"{NAME}.lora_embedding_A": torch.ones(4, 8), f"{NAME}.lora_embedding_B": torch.ones(8, 4)},
            "has both linear and embedding factors",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_tensors_that_are_no_pair_of_factors_are_refused(
    folder: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    rewrite(folder, tensors)
    refused(folder, message)


@pytest.mark.parametrize("side", [A, B])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_single_entry_that_is_no_number_is_refused(
    folder: Path, side: str, dtype: torch.dtype, value: float
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in peft_tensors(NAME).items()}
    tensors[side][-1, -1] = value
    rewrite(folder, tensors)
    refused(folder, f"{NAME} holds NaN or infinity; train or export the adapter again$")


def test_weights_cut_off_anywhere_are_refused(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    for length in [0, 1, 7, 8, 9, 64, len(whole) // 2, len(whole) - 1]:
        (folder / WEIGHTS).write_bytes(whole[:length])
        refused(folder, "not a sound safetensors file")
    (folder / WEIGHTS).write_bytes(whole + b"\0")
    refused(folder, "not a sound safetensors file")


def test_weights_with_a_false_header_are_refused(folder: Path) -> None:
    entry = '"x": {"dtype": "%s", "shape": [%s], "data_offsets": [%s]}'
    for header in (
        "",
        "[]",
        "{",
        "{" + entry % ("F32", "2", "0, 4") + "}",
        "{" + entry % ("F32", "1", "4, 8") + "}",
        "{" + entry % ("F4", "2", "0, 1") + "}",
        "{" + entry % ("F32", "99999999999999999999", "0, 4") + "}",
        "[" * 5000,
    ):
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
        refused(folder, "not a sound safetensors file")
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**63) + bytes(100))
    refused(folder, "not a sound safetensors file")


def test_metadata_may_be_null(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size]) | {"__metadata__": None}
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])
    assert Adapter.load(folder).metadata == {}


class Bomb:
    """Unpickling one creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pth"])
def test_code_in_pickled_weights_is_never_run(folder: Path, name: str) -> None:
    marker = folder.parent / "exploded"
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    refused(folder, f"{name}: pickled weights are read only with --allow-pickle")
    with pytest.raises(AdapterError, match=f"{name}: is damaged, or holds more than tensors"):
        Adapter.load(folder, allow_pickle=True)
    assert not marker.exists()
    pickle.loads((folder / name).read_bytes()).close()
    assert marker.exists()  # the bomb was live


def test_a_pickle_under_the_name_of_safetensors_is_refused_and_never_unpickled(folder: Path) -> None:
    marker = folder.parent / "exploded"
    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb(marker)))
    refused(folder, "not a sound safetensors file")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map must name a file for every tensor"),
        ({"weight_map": []}, "weight_map must name a file for every tensor"),
        ({"weight_map": {A: 1}}, "weight_map must name a file for every tensor"),
        ({"weight_map": {A: "../secret.safetensors"}}, "'../secret.safetensors' is not the name of a file"),
        ({"weight_map": {A: "/secret.safetensors"}}, "is not the name of a file beside it"),
        ({"weight_map": {A: "sub/x.safetensors"}}, "is not the name of a file beside it"),
        ({"weight_map": {A: "..\\x.safetensors"}}, "is not the name of a file beside it"),
        ({"weight_map": {A: "x\0.safetensors"}}, "is not the name of a file beside it"),
        ({"weight_map": {A: "x.bin"}}, "'x.bin' is not the name of a file beside it"),
        ({"weight_map": {A: "x" * 10**6}}, "is not the name of a file beside it"),
        ({"weight_map": {A: "gone.safetensors"}}, "gone.safetensors: missing"),
        ({"weight_map": {A: "part.safetensors"}}, f"does not agree with its shards about {B}"),
        ({"weight_map": {A: "part.safetensors", B: "part.safetensors", "C": "part.safetensors"}}, "about C"),
        ({"weight_map": {}}, "holds no LoRA factors"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_false_index_of_shards_is_refused(folder: Path, index: dict[str, object], message: str) -> None:
    save_file(peft_tensors(NAME), folder.parent / "secret.safetensors")
    (folder / WEIGHTS).rename(folder / "part.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, message)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "bias",
    "init_lora_weights",
    "modules_to_save",
    "target_parameters",
    "base_model_name_or_path",
    "task_type",
    "fan_in_fan_out",
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3), st.booleans())
def test_any_config_gives_an_adapter_or_an_adapter_error(
    folder: Path, fields: dict[str, object], drop: bool
) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (folder / CONFIG).write_text(json.dumps(config | fields))
    try:
        adapter = Adapter.load(folder, tuple(DROPS) if drop else ())
    except AdapterError:
        return
    adapter.save(folder.parent / "again", overwrite=True)
    assert Adapter.load(folder.parent / "again").header == adapter.header


def test_any_damage_to_the_weights_gives_an_adapter_or_an_adapter_error(tmp_path: Path) -> None:
    random_adapter(dict(list(SMALL.items())[:1])).save(tmp_path / "a")
    file = tmp_path / "a" / WEIGHTS
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    draw = random.Random(0)
    outcomes = set()
    for _ in range(1000):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(header)] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            Adapter.load(tmp_path / "a")
            outcomes.add("adapter")
        except AdapterError:
            outcomes.add("error")
    assert outcomes == {"adapter", "error"}
