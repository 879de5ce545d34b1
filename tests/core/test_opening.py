"""Where the files of an adapter are found, and in which forms they are read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from making import peft_tensors, write_by_hand
from merged_lora.adapters import Adapter
from merged_lora.errors import AdapterError

TENSORS = peft_tensors("model.layers.0.q_proj", "model.layers.1.q_proj")
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0a" * 32 + "\nsize 839\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_by_hand(tmp_path / "adapter", TENSORS)


@pytest.fixture
def digest(folder: Path) -> str:
    """The digest of the adapter, read from its folder."""
    return Adapter.load(folder).digest


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_of_the_adapter_stands_for_its_folder(folder: Path, digest: str, name: str) -> None:
    assert Adapter.load(folder / name).digest == digest


def test_weights_of_another_name_are_read_if_the_path_names_them(folder: Path, digest: str) -> None:
    (folder / WEIGHTS).rename(folder / "sql.safetensors")
    assert Adapter.load(folder / "sql.safetensors").digest == digest
    with pytest.raises(AdapterError, match=f"{WEIGHTS}: missing"):
        Adapter.load(folder)


def test_a_file_that_holds_no_weights_is_refused(folder: Path) -> None:
    (folder / "README.md").write_text("words")
    with pytest.raises(AdapterError, match=r"README.md: not a file of weights"):
        Adapter.load(folder / "README.md")


def test_an_adapter_one_folder_deeper_is_found(folder: Path, digest: str) -> None:
    (folder.parent / "logs").mkdir()
    assert Adapter.load(folder.parent).digest == digest


def test_several_adapters_one_folder_deeper_are_named(folder: Path) -> None:
    write_by_hand(folder.parent / "other", TENSORS)
    with pytest.raises(AdapterError, match="holds the adapters adapter, other; choose one"):
        Adapter.load(folder.parent)


def test_a_byte_order_mark_before_the_configuration_is_no_part_of_it(folder: Path, digest: str) -> None:
    (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes())
    assert Adapter.load(folder).digest == digest


@pytest.mark.parametrize("index", ["adapter_model.safetensors.index.json", "model.safetensors.index.json"])
def test_weights_in_parts_are_read_under_the_names_of_peft_and_of_transformers(
    folder: Path, digest: str, index: str
) -> None:
    (folder / WEIGHTS).unlink()
    shards = {key: f"adapter_model-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(TENSORS)}
    for shard in set(shards.values()):
        save_file({key: TENSORS[key] for key in TENSORS if shards[key] == shard}, folder / shard)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert Adapter.load(folder).digest == digest
    assert Adapter.load(folder / index).digest == digest


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pth"])
def test_pickled_tensors_are_read_if_that_is_allowed(folder: Path, digest: str, name: str) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(TENSORS, folder / name)
    assert Adapter.load(folder, allow_pickle=True).digest == digest
    assert Adapter.load(folder / name, allow_pickle=True).digest == digest
    with pytest.raises(AdapterError, match="only with --allow-pickle"):
        Adapter.load(folder / name)


def test_safetensors_come_before_a_pickle(folder: Path, digest: str) -> None:
    torch.save({key: tensor + 1 for key, tensor in TENSORS.items()}, folder / "adapter_model.bin")
    assert Adapter.load(folder, allow_pickle=True).digest == digest


@pytest.mark.parametrize("content", [TENSORS | {"step": 3}, [1, 2], {"a": {"b": torch.ones(1)}}], ids=str)
def test_a_pickle_of_something_else_than_tensors_is_refused(folder: Path, content: object) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model.bin: holds '(dict|list)', not tensors by name"):
        Adapter.load(folder, allow_pickle=True)


@pytest.mark.parametrize("odd", ["transposed", "negative"])
def test_pickled_views_are_read_as_plain_tensors(folder: Path, digest: str, odd: str) -> None:
    (folder / WEIGHTS).unlink()

    def view(tensor: torch.Tensor) -> torch.Tensor:
        if odd == "transposed":
            return tensor.T.contiguous().T
        return torch.complex(tensor, -tensor).conj().imag

    torch.save({key: view(tensor) for key, tensor in TENSORS.items()}, folder / "adapter_model.bin")
    loaded = Adapter.load(folder, allow_pickle=True)
    assert loaded.digest == digest
    assert all(f.a.is_contiguous() and f.b.is_contiguous() for f in loaded.modules.values())


@pytest.mark.parametrize("tensor", [torch.ones(4, 8).to_sparse(), torch.ones(4, 8, device="meta")], ids=str)
def test_pickled_tensors_that_are_not_plain_are_refused(folder: Path, tensor: torch.Tensor) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(TENSORS | {"x.lora_A.weight": tensor}, folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"x.lora_A.weight is not stored as a plain tensor"):
        Adapter.load(folder, allow_pickle=True)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "adapter_model.bin"])
def test_a_pointer_of_git_lfs_says_how_to_get_the_file(folder: Path, name: str) -> None:
    if name.endswith("bin"):
        (folder / WEIGHTS).unlink()
    (folder / name).write_text(POINTER)
    with pytest.raises(AdapterError, match=f"{name}: a pointer of git-lfs, .* run: git lfs pull"):
        Adapter.load(folder, allow_pickle=True)


@pytest.mark.parametrize("pattern", [".*.*.*x", "a?" * 12 + "a" * 12, "(?:a|a)*b", "a{1,}b{2,}c{3,}"])
def test_a_pattern_that_could_take_forever_is_refused(folder: Path, pattern: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"alpha_pattern": {pattern: 4}}))
    with pytest.raises(AdapterError, match="which could take forever to match"):
        Adapter.load(folder)


def test_a_pattern_may_be_as_long_as_many_names(folder: Path, digest: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    names = "|".join(f"model.layers.{i}.q_proj" for i in range(100))
    (folder / CONFIG).write_text(json.dumps(config | {"r": 2, "rank_pattern": {f"({names})": 4}}))
    assert Adapter.load(folder).modules.keys() == {"model.layers.0.q_proj", "model.layers.1.q_proj"}
    assert {f.rank for f in Adapter.load(folder).modules.values()} == {4}
