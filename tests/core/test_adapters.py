"""Adapters in memory and in PEFT's folders: what is read, written, and left behind by a failure."""

import json
import math
import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from making import SMALL, peft_tensors, random_adapter, write_by_hand
from merged_lora.adapters import Adapter
from merged_lora.calibration import Calibration
from merged_lora.errors import AdapterError
from merged_lora.factors import Factors
from merged_lora.files.layout import Header
from merged_lora.files.writing import config_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Q, K, DOWN, Q1 = SMALL
EMBED = "model.embed_tokens"


def assert_same(found: Adapter, expected: Adapter) -> None:
    """Same modules, kinds, scalings, dtypes and bits."""
    assert sorted(found.modules) == sorted(expected.modules)
    for name, f in expected.modules.items():
        g = found.modules[name]
        assert (g.scaling, g.embedding, g.a.dtype, g.b.dtype) == (
            f.scaling,
            f.embedding,
            f.a.dtype,
            f.b.dtype,
        )
        assert torch.equal(g.a, f.a)
        assert torch.equal(g.b, f.b)


def test_an_adapter_is_shown_in_a_line() -> None:
    adapter = random_adapter(SMALL, 4, header=Header("org/base"))
    assert repr(adapter) == "<Adapter of org/base: 4 modules, rank 4>"
    assert repr(Adapter(adapter.modules)) == "<Adapter: 4 modules, rank 4>"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_saved_adapter_reloads_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = random_adapter(SMALL, dtype=dtype, header=Header("org/base", "CAUSAL_LM", True))
    adapter = replace(adapter, metadata={"merged_lora.spec": "sum(a)", "note": "ü"})
    adapter.save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a")
    assert_same(loaded, adapter)
    assert loaded.digest == adapter.digest
    assert loaded.header == adapter.header
    assert loaded.metadata == adapter.metadata


def test_ranks_scalings_dtypes_and_kinds_that_differ_by_module_reload(tmp_path: Path) -> None:
    ranks = {Q: 4, K: 4, DOWN: 7, Q1: 1, EMBED: 2}
    scalings = {Q: 1.0, K: 0.5, DOWN: 1.0, Q1: -3.0, EMBED: 0.0}
    adapter = random_adapter({**SMALL, EMBED: (32, 100)}, ranks, torch.bfloat16, 0, scalings, {EMBED})
    mixed = {**adapter.modules, K: Factors(adapter.modules[K].a.float(), adapter.modules[K].b, 0.5)}
    adapter = replace(adapter, modules=mixed)
    adapter.save(tmp_path / "a")
    assert_same(Adapter.load(tmp_path / "a"), adapter)
    assert Adapter.load(tmp_path / "a").digest == adapter.digest


@given(st.floats(1e-6, 1e6), st.integers(1, 64))
def test_a_scaling_reloads_to_two_roundings(scaling: float, rank: int) -> None:
    adapter = random_adapter({Q: (3, 3)}, rank, scaling=scaling)
    alpha = config_of(adapter.modules, adapter.header)["lora_alpha"]
    assert isinstance(alpha, int | float)
    # alpha = scaling * rank is rounded once, alpha / rank once more: each by at most 2^-53 of itself.
    assert abs(alpha / rank - scaling) <= scaling * 2.0**-52


def test_factors_in_any_memory_layout_are_saved_as_their_values(tmp_path: Path) -> None:
    block = torch.randn(4, 6)
    shared = {Q: Factors(block, block.T), K: Factors(block, block[:, ::2].T)}
    adapter = Adapter({**shared, DOWN: Factors(block[1:3], block[:, :2])})
    adapter.save(tmp_path / "a")
    assert_same(Adapter.load(tmp_path / "a"), adapter)


def test_what_was_loaded_does_not_change_when_the_file_does(tmp_path: Path) -> None:
    adapter = random_adapter(SMALL)
    adapter.save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    with file.open("r+b") as f:
        f.write(bytes(file.stat().st_size))
    assert_same(loaded, adapter)


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 8 / 4),
        ({"lora_alpha": 0.5}, 0.5 / 4),
        ({"lora_alpha": -8}, -2.0),
        ({"use_rslora": True}, 8 / math.sqrt(4)),
        ({"alpha_pattern": {"q_proj": 6}}, 6 / 4),
        ({"alpha_pattern": {"layers.0.q_proj": 6}}, 6 / 4),
        ({"alpha_pattern": {r"^model\.layers\.0\.q_proj": 6}}, 6 / 4),
        ({"alpha_pattern": {r"layers\.\d\.[qk]_proj": 6}}, 6 / 4),
        ({"alpha_pattern": {"q_proj": 6}, "use_rslora": True}, 6 / math.sqrt(4)),
        ({"alpha_pattern": {"q_proj": 6, "layers.0.q_proj": 5}}, 6 / 4),  # the first that matches
        ({"alpha_pattern": {"k_proj": 6}}, 8 / 4),
        ({"alpha_pattern": {"_proj": 6}}, 8 / 4),  # a suffix starts at a dot
        ({"alpha_pattern": {"q_pro": 6}}, 8 / 4),
        ({"r": 9, "rank_pattern": {"q_proj": 4}}, 8 / 4),
        ({"r": 9, "rank_pattern": {"q_proj": 4}, "use_rslora": True}, 8 / math.sqrt(4)),
    ],
    ids=str,
)
def test_scaling_follows_rank_alpha_patterns_and_rslora(
    tmp_path: Path, config: dict[str, object], scaling: float
) -> None:
    tensors = peft_tensors("model.layers.0.q_proj", rank=4)
    adapter = Adapter.load(write_by_hand(tmp_path / "a", tensors, **config))
    factors = adapter.modules["model.layers.0.q_proj"]
    assert factors.scaling == scaling
    a, b = (tensors[f"base_model.model.model.layers.0.q_proj.lora_{side}.weight"].double() for side in "AB")
    # One product of float64 matrices of inner size 4 on both sides: the same operations, the same bits.
    assert torch.equal(factors.delta(), scaling * (b @ a))


def test_embedding_factors_are_known_by_their_names(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.embed_tokens.lora_embedding_A": torch.randn(4, 100),
        "base_model.model.embed_tokens.lora_embedding_B": torch.randn(8, 4),
        "base_model.model.embed_tokens.base_layer.weight": torch.randn(100, 8),
    }
    adapter = Adapter.load(write_by_hand(tmp_path / "a", tensors))
    assert list(adapter.modules) == ["embed_tokens"]
    assert adapter.modules["embed_tokens"].embedding
    assert adapter.modules["embed_tokens"].shape == (8, 100)


def test_shards_read_as_one_file(tmp_path: Path) -> None:
    adapter = random_adapter(SMALL)
    adapter.save(tmp_path / "a")
    shard(tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_model.safetensors").exists()
    assert_same(Adapter.load(tmp_path / "a"), adapter)


def shard(folder: Path) -> None:
    """Split a folder's weights into two files and an index, A apart from B."""
    whole = folder / "adapter_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    weight_map = {name: f"adapter_model-{1 + ('lora_B' in name):05}-of-00002.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        save_file({n: t.clone() for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index = folder / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def test_the_digest_is_that_of_the_deltas_and_of_nothing_else() -> None:
    adapter = random_adapter(SMALL, dtype=torch.float16)
    backwards = dict(reversed(list(adapter.modules.items())))
    assert Adapter(backwards, Header("other"), {"note": "x"}).digest == adapter.digest
    f = adapter.modules[Q]
    changed = f.a.clone()
    changed.view(torch.int16)[-1, -1] ^= 1  # the last bit of the last entry
    for other in (
        replace(f, scaling=2.5),
        replace(f, embedding=True),
        replace(f, a=changed),
        replace(f, a=f.a.view(torch.bfloat16)),  # the same bytes, another meaning
        replace(f, a=f.a.reshape(8, -1), b=f.b.reshape(-1, 8)),
    ):
        assert replace(adapter, modules={**adapter.modules, Q: other}).digest != adapter.digest
    renamed = {("x" if name == Q else name): g for name, g in adapter.modules.items()}
    assert replace(adapter, modules=renamed).digest != adapter.digest


def test_an_adapter_knows_its_size() -> None:
    adapter = random_adapter({Q: (8, 16), K: (2, 16)}, {Q: 3, K: 5}, torch.bfloat16)
    assert isinstance(adapter.calibration, Calibration)
    factors = 2 * (3 * (8 + 16) + 5 * (2 + 16))
    assert adapter.rank == 5
    assert adapter.nbytes == factors + adapter.calibration.nbytes
    assert replace(adapter, calibration=None).nbytes == factors


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({}, "at least one module"),
        ([], "the modules of an adapter are a mapping from names to Factors, not list"),
        ({Q: Factors(torch.zeros(4, 8), torch.zeros(8, 3))}, r"shape \(4, 8\) and \(8, 3\) do not multiply"),
        ({Q: Factors(torch.zeros(4), torch.zeros(8, 4))}, "do not multiply"),
        ({Q: Factors(torch.zeros(4, 8).double(), torch.zeros(8, 4))}, "float64.*not fp32, fp16 or bf16"),
        ({Q: Factors(torch.zeros(4, 8), torch.zeros(8, 4), math.nan)}, "scaling nan is not a number"),
        ({Q: Factors(torch.zeros(4, 8), torch.zeros(8, 4), -1e31)}, "size up to 1e.30"),
    ],
    ids=["no module", "no mapping", "inner size", "not a matrix", "dtype", "NaN scaling", "huge scaling"],
)
def test_an_adapter_made_of_unfit_factors_is_refused(modules: dict[str, Factors], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        Adapter(modules)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_saving_makes_missing_parents_and_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "x" / "empty").mkdir(parents=True)
    random_adapter(SMALL).save(tmp_path / "x" / "empty")
    random_adapter(SMALL).save(tmp_path / "y" / "z")
    assert names(tmp_path / "x") == ["empty"]
    assert names(tmp_path / "y" / "z") == ["adapter_config.json", "adapter_model.safetensors"]


def test_saving_leaves_what_stands_there_unless_told_to_overwrite(tmp_path: Path) -> None:
    first, second = random_adapter(SMALL, seed=1), random_adapter(SMALL, seed=2)
    first.save(tmp_path / "a")
    with pytest.raises(AdapterError, match="exists; choose another folder or overwrite it"):
        second.save(tmp_path / "a")
    assert_same(Adapter.load(tmp_path / "a"), first)
    second.save(tmp_path / "a", overwrite=True)
    assert_same(Adapter.load(tmp_path / "a"), second)
    assert names(tmp_path) == ["a"]


def test_only_an_adapter_is_overwritten(tmp_path: Path) -> None:
    adapter = random_adapter(SMALL)
    adapter.save(tmp_path / "a")
    (tmp_path / "a" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="not replaced: it also holds thesis"):
        adapter.save(tmp_path / "a", overwrite=True)
    with pytest.raises(AdapterError, match="is not a folder"):
        adapter.save(tmp_path / "file", overwrite=True)
    assert (tmp_path / "a" / "thesis.tex").exists()
    assert names(tmp_path) == ["a", "file"]


def test_overwriting_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    first, second = random_adapter(SMALL, seed=1), random_adapter(SMALL, seed=2)
    first.save(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    second.save(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert_same(Adapter.load(tmp_path / "real"), second)


def test_a_saved_adapter_is_readable_by_whom_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        random_adapter(SMALL).save(tmp_path / "a")
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "a").iterdir()} == {"0o640"}


@pytest.mark.parametrize("name", ["file/a", "n" * 300, "nul\0"], ids=["under a file", "long", "NUL"])
def test_saving_where_no_folder_can_be_is_an_error_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError):
        random_adapter(SMALL).save(tmp_path / name)
    assert names(tmp_path) == ["file"]


def test_a_disk_that_fills_up_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(AdapterError, match="cannot write"):
            random_adapter(SMALL).save(tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []


def test_a_save_that_is_interrupted_leaves_the_old_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = random_adapter(SMALL, seed=1), random_adapter(SMALL, seed=2)
    old.save(tmp_path / "a")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        new.save(tmp_path / "a", overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        new.save(tmp_path / "b")
    assert names(tmp_path) == ["a"]
    assert_same(Adapter.load(tmp_path / "a"), old)


def test_a_folder_that_appears_while_saving_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = random_adapter(SMALL, seed=1), random_adapter(SMALL, seed=2)
    fsync = os.fsync

    def overtaken(fd: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        first.save(tmp_path / "a")

    monkeypatch.setattr(os, "fsync", overtaken)
    with pytest.raises(AdapterError, match="cannot write"):
        second.save(tmp_path / "a")
    assert_same(Adapter.load(tmp_path / "a"), first)
    assert names(tmp_path) == ["a"]
