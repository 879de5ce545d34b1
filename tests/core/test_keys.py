"""Keys of adapter files: the module and role that each means, whatever a trainer put around its name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from making import peft_tensors, write_by_hand
from merged_lora.adapters import Adapter
from merged_lora.errors import AdapterError
from merged_lora.files.keys import FACTORS, Key, check_outer, parse

MODULE = "model.layers.0.mlp.up_proj"
PEFT = "base_model.model."
WRAPPERS = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_fpw_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
)


@pytest.mark.parametrize(
    ("tail", "role"),
    [
        ("lora_A.weight", "lora_A.weight"),
        ("lora_B.default.weight", "lora_B.weight"),
        ("lora_A.sql.weight", "lora_A.weight"),
        ("lora_A.lora_1.weight", "lora_A.weight"),
        ("lora_embedding_A", "lora_embedding_A"),
        ("lora_embedding_B.default", "lora_embedding_B"),
        ("lora_A.bias", "lora_A.bias"),
        ("lora_B.default.bias", "lora_B.bias"),
        ("lora_magnitude_vector", "lora_magnitude_vector"),
        ("lora_magnitude_vector.default.weight", "lora_magnitude_vector.weight"),
        ("weight", "weight"),
        ("bias", "bias"),
        ("modules_to_save.default.weight", "weight"),
    ],
)
def test_the_adapters_own_name_is_no_part_of_a_role(tail: str, role: str) -> None:
    assert parse(f"{PEFT}{MODULE}.{tail}") == Key(MODULE, role)


def test_only_the_two_factors_of_linear_and_embedding_modules_are_factors() -> None:
    roles = {
        parse(f"{PEFT}{MODULE}.{tail}").role for tail in ("lora_A.bias", "lora_magnitude_vector", "weight")
    }
    assert not roles & FACTORS.keys()
    assert FACTORS[parse(f"{MODULE}.lora_B.sql.weight").role] == ("B", False)
    assert FACTORS[parse(f"{MODULE}.lora_embedding_A.sql").role] == ("A", True)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("prefix", [PEFT, ""])
def test_a_wrapper_is_no_part_of_a_name_wherever_it_comes(wrapper: str, prefix: str) -> None:
    parts = f"{prefix}{MODULE}.lora_A.default.weight".split(".")
    for at in range(len(parts) - 2):
        assert parse(".".join([*parts[:at], wrapper, *parts[at:]])) == Key(MODULE, "lora_A.weight")


@pytest.mark.parametrize(
    "front",
    [
        PEFT,
        "",
        "module.",
        "module.module.",
        "module._orig_mod.",
        f"module.{PEFT}",
        f"_orig_mod.module.{PEFT}",
        f"_module.{PEFT}",
        PEFT + PEFT,
        PEFT + PEFT + PEFT,
        f"{PEFT}module.{PEFT}",
        f"{PEFT}_orig_mod.{PEFT}_orig_mod.",
    ],
)
def test_what_wraps_the_whole_model_is_no_part_of_a_name(front: str) -> None:
    assert parse(f"{front}{MODULE}.lora_B.weight") == Key(MODULE, "lora_B.weight")


@pytest.mark.parametrize(
    ("key", "module"),
    [
        (f"{PEFT}module.layers.0.up.lora_A.weight", "module.layers.0.up"),
        (f"module.{PEFT}module.up.lora_A.weight", "module.up"),
        (f"{PEFT}{PEFT}module.up.lora_A.weight", "module.up"),
        ("encoder.module.up.lora_A.weight", "encoder.module.up"),
        ("module.lora_A.weight", "module"),
        (f"{PEFT}module.lora_A.weight", "module"),
        (f"{PEFT}base_model.layers.0.up.lora_A.weight", "base_model.layers.0.up"),
        (f"{PEFT}judge.{PEFT}up.lora_A.weight", f"judge.{PEFT}up"),
        (f"{PEFT}mlp.experts.base_layer.lora_A.weight", "mlp.experts.base_layer"),
        (f"{PEFT}my_orig_mod.module_list.up.lora_A.weight", "my_orig_mod.module_list.up"),
        (f"{PEFT}blora_A.lora_A.weight", "blora_A"),
    ],
)
def test_a_module_of_the_base_model_keeps_its_name(key: str, module: str) -> None:
    assert parse(key) == Key(module, "lora_A.weight")


@pytest.mark.parametrize("key", ["", ".", "weight", PEFT, "lora_A.weight", f"{PEFT}lora_A.weight", "module"])
def test_a_key_without_a_module_has_an_empty_one(key: str) -> None:
    assert parse(key).module == ""


@pytest.mark.parametrize(
    "front", ["thinker.", "module.thinker.", "thinker.module.", "_orig_mod.thinker._orig_mod."]
)
def test_what_comes_before_peft_besides_wrappers_is_kept_and_named(front: str) -> None:
    key = parse(f"{front}{PEFT}{PEFT}{MODULE}.lora_A.weight")
    assert key == Key(f"thinker.{PEFT}{MODULE}", "lora_A.weight", "thinker.")


def test_a_container_outside_is_refused_with_both_ways_out() -> None:
    names = [f"thinker.{PEFT}{MODULE}"]
    with pytest.raises(
        AdapterError, match=r"--rename thinker\.base_model\.model\.=thinker\. .* --rename \S+= if"
    ):
        check_outer(names, ["", "thinker."])
    for name in (f"thinker.{MODULE}", MODULE):
        check_outer([name], ["", "thinker."])


def test_a_name_inside_pefts_own_prefix_is_never_taken_for_a_container() -> None:
    key = parse(f"{PEFT}judge.{PEFT}up.lora_A.weight")
    check_outer([key.module], [key.outer])


@pytest.mark.parametrize(
    "spelling",
    [
        lambda key: "_orig_mod." + key,
        lambda key: "module." + key,
        lambda key: key.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
        lambda key: PEFT + key,
        lambda key: key.replace(".weight", ".default.weight"),
    ],
)
def test_a_file_with_wrappers_holds_the_same_adapter(tmp_path: Path, spelling: Callable[[str], str]) -> None:
    tensors = peft_tensors("model.layers.0.q_proj", "model.layers.1.q_proj")
    plain = write_by_hand(tmp_path / "plain", tensors)
    wrapped = write_by_hand(tmp_path / "wrapped", {spelling(key): t for key, t in tensors.items()})
    assert Adapter.load(wrapped).digest == Adapter.load(plain).digest


def test_two_keys_that_mean_one_factor_are_refused_by_both_names(tmp_path: Path) -> None:
    tensors = peft_tensors("model.layers.0.q_proj")
    twice = {f"_orig_mod.{key}": torch.ones_like(tensor) for key, tensor in tensors.items()}
    folder = write_by_hand(tmp_path / "adapter", tensors | twice)
    with pytest.raises(
        AdapterError, match=r"_orig_mod\.base_model\S+ and base_model\S+ are both lora_[AB]\.weight"
    ):
        Adapter.load(folder)


def test_a_file_of_a_model_within_another_is_refused(tmp_path: Path) -> None:
    tensors = {f"thinker.{key}": tensor for key, tensor in peft_tensors("model.layers.0.q_proj").items()}
    with pytest.raises(AdapterError, match=r"'thinker\.' in front of PEFT's own"):
        Adapter.load(write_by_hand(tmp_path / "adapter", tensors))
