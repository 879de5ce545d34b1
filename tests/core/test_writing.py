"""A folder that we write means the same to every reader: it has one rank, or patterns by plain names."""

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from making import SMALL, random_adapter
from merged_lora.adapters import Adapter
from merged_lora.engine import merge
from merged_lora.errors import AdapterError
from merged_lora.files.layout import CONFIG_NAME, RANKS_KEY, WEIGHTS_NAME
from merged_lora.files.patterns import patterns_of
from other_releases import RELEASES, folder_of
from reading_back import Shapes, assert_deltas, deltas_in, in_peft
from running import Run

RANKS = {name: rank for rank, name in enumerate(SMALL, start=3)}
SUFFIXES: Shapes = dict.fromkeys(
    ["head", "x.head", "a.b", "x.a.b", "x.y.a.b", "c.d", "x.c_d", "model.layers.1.q", "model.layers.11q"],
    (6, 8),
)
"""Modules whose names end in each other, also if a dot matches any character."""


def config_in(folder: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    return config


def ranks_in(folder: Path) -> dict[str, int]:
    """Ranks of the tensors in a file, by module name."""
    tensors = load_file(folder / WEIGHTS_NAME)
    ends = (".lora_A.weight", "base_model.model.")
    return {k.removesuffix(ends[0]).removeprefix(ends[1]): len(t) for k, t in tensors.items() if ends[0] in k}


def mixed_merge() -> Adapter:
    """A merge of attention alone, of rank 4, with all modules, of rank 8: two ranks, 12 and 8."""
    attention = {name: shape for name, shape in SMALL.items() if "self_attn" in name}
    merged = merge(
        "a + b", {"a": random_adapter(attention, 4, seed=1), "b": random_adapter(SMALL, 8, seed=2)}
    )
    assert {f.rank for f in merged.modules.values()} == {8, 12}
    return merged


def of_suffixes(scalings: bool = False) -> Adapter:
    """An adapter with another rank, and if asked for another scaling, in every module of SUFFIXES."""
    order = {name: at for at, name in enumerate(SUFFIXES, start=1)}
    return random_adapter(
        SUFFIXES, order, scaling={n: float(i) if scalings else 1.0 for n, i in order.items()}
    )


# One rank


def test_a_merge_of_several_ranks_is_scaled_by_one_whatever_a_reader_takes_for_rank_and_alpha(
    tmp_path: Path,
) -> None:
    mixed_merge().save(tmp_path / "a")
    config = config_in(tmp_path / "a")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}  # so older and newer PEFT read the same
    assert config["r"] == config["lora_alpha"] == 12  # vLLM before 0.32 divides these
    assert set(ranks_in(tmp_path / "a").values()) == {12}  # llama.cpp divides alpha by the rank of the tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_added_to_the_factors_is_zero_and_nothing_else_changes(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    adapter = random_adapter(SMALL, RANKS, dtype)
    adapter.save(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS_NAME)
    for name, f in adapter.modules.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert a.dtype == b.dtype == dtype
        assert len(a) == b.shape[1] == max(RANKS.values())
        assert torch.equal(a[: f.rank], f.a)
        assert torch.equal(b[:, : f.rank], f.b)
        assert not a[f.rank :].any()
        assert not b[:, f.rank :].any()


@pytest.mark.parametrize("keep_ranks", [False, True])
def test_several_ranks_reload_bit_for_bit(tmp_path: Path, keep_ranks: bool) -> None:
    adapter = replace(random_adapter(SMALL, RANKS, torch.bfloat16), metadata={"note": "x"})
    adapter.save(tmp_path / "a", keep_ranks=keep_ranks)
    loaded = Adapter.load(tmp_path / "a")
    assert {name: f.rank for name, f in loaded.modules.items()} == RANKS
    assert loaded.digest == adapter.digest
    assert loaded.metadata == {"note": "x"}
    assert all(f.a.is_contiguous() and f.b.is_contiguous() for f in loaded.modules.values())


def test_experts_of_several_ranks_reload_bit_for_bit_from_the_pair_that_they_share(tmp_path: Path) -> None:
    ranks = {f"model.layers.0.mlp.experts.down_proj[{expert}]": 2 + expert for expert in range(3)}
    adapter = random_adapter(dict.fromkeys(ranks, (8, 6)), ranks)
    adapter.save(tmp_path / "a")
    assert Adapter.load(tmp_path / "a").digest == adapter.digest


def test_a_saved_merge_merges_like_the_merge_in_memory(tmp_path: Path) -> None:
    first, other = mixed_merge(), random_adapter(SMALL, 2, seed=3)
    first.save(tmp_path / "first")
    from_disk = merge("cat(first, other)", {"first": tmp_path / "first", "other": other})
    assert from_disk.rank == 14
    assert from_disk.digest == merge("cat(first, other)", {"first": first, "other": other}).digest


def test_one_rank_leaves_no_trace_in_the_file(tmp_path: Path) -> None:
    random_adapter(SMALL).save(tmp_path / "a")
    with safe_open(tmp_path / "a" / WEIGHTS_NAME, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def rewritten(folder: Path, change: Mapping[str, torch.Tensor], ranks: str | None = None) -> Path:
    """The folder with some tensors replaced, and what it says of ranks if that is given."""
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        metadata: dict[str, str] = file.metadata()
    metadata |= {} if ranks is None else {RANKS_KEY: ranks}
    save_file({**load_file(folder / WEIGHTS_NAME), **change}, folder / WEIGHTS_NAME, metadata)
    return folder


@pytest.mark.parametrize("side", ["A", "B"])
def test_padding_that_another_program_filled_is_read_as_it_is(tmp_path: Path, side: str) -> None:
    adapter = random_adapter(SMALL, RANKS)
    adapter.save(tmp_path / "a")
    name = next(iter(SMALL))
    key = f"base_model.model.{name}.lora_{side}.weight"
    tensor = load_file(tmp_path / "a" / WEIGHTS_NAME)[key]
    tensor[-1, -1] = 1e-30
    loaded = Adapter.load(rewritten(tmp_path / "a", {key: tensor}))
    assert loaded.modules[name].rank == max(RANKS.values())
    assert {n: f.rank for n, f in loaded.modules.items() if n != name} == {
        n: rank for n, rank in RANKS.items() if n != name
    }


@pytest.mark.parametrize("ranks", ["", "[]", "{", '{"a":0}', '{"a":1.5}', '{"a":true}', "[" * 100_000])
def test_ranks_before_padding_that_make_no_sense_are_refused(tmp_path: Path, ranks: str) -> None:
    random_adapter(SMALL).save(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"a: merged_lora\.ranks in its metadata: .* whole numbers"):
        Adapter.load(rewritten(tmp_path / "a", {}, ranks))


def test_an_adapter_of_several_scalings_that_is_merged_alone_has_one_alpha(tmp_path: Path) -> None:
    adapter = random_adapter(SMALL, 4, scaling={name: 1.0 + i for i, name in enumerate(SMALL)})
    merge("sum(a)", {"a": adapter}).save(tmp_path / "a")
    config = config_in(tmp_path / "a")
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (4, 4, {})


# Patterns


def test_kept_ranks_are_patterns_of_plain_names_in_a_smaller_file(tmp_path: Path) -> None:
    merged = mixed_merge()
    merged.save(tmp_path / "one")
    merged.save(tmp_path / "kept", keep_ranks=True)
    config = config_in(tmp_path / "kept")
    assert config["rank_pattern"] == config["alpha_pattern"] == {"model.layers.0.mlp.down_proj": 8}
    assert ranks_in(tmp_path / "kept") == {name: f.rank for name, f in merged.modules.items()}
    sizes = {
        n: sum(t.nbytes for t in load_file(tmp_path / n / WEIGHTS_NAME).values()) for n in ("one", "kept")
    }
    assert sizes["one"] - sizes["kept"] == 4 * (12 - 8) * (32 + 80)  # down_proj, float32


def test_the_command_keeps_ranks_on_request(run: Run, tmp_path: Path) -> None:
    random_adapter(SMALL, RANKS).save(tmp_path / "a")
    source = ("sum(a)", "--adapter", f"a={tmp_path / 'a'}", "--output")
    assert (
        run("merge", *source, tmp_path / "one")[0]
        == run("merge", *source, tmp_path / "k", "--keep-ranks")[0]
        == 0
    )
    assert set(ranks_in(tmp_path / "one").values()) == {max(RANKS.values())}
    assert ranks_in(tmp_path / "k") == RANKS


def found_by_peft_0_14(patterns: Iterable[str], name: str) -> str:
    """The key of a module by the rule of PEFT 0.14: after a dot, or else the name itself."""
    return next((key for key in patterns if re.match(rf".*\.{key}$", name)), name)


def found_by_vllm(patterns: Iterable[str], name: str) -> str | None:
    """The key of a module by the rule of vLLM since 0.32: as a whole or after a dot, or none."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)


NAMES = st.lists(st.text("ab_1", min_size=1, max_size=2), min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(NAMES, st.integers(1, 3), min_size=1, max_size=12), st.integers(1, 3))
@example({"head": 1, "x.head": 2}, 2)
@example({"head": 1, "x.head": 2}, 1)
@example({"a.b": 1, "x.a.b": 2, "y.x.a.b": 1}, 1)
@example({"a.b": 1, "a_b": 2, "x.a_b": 2}, 2)
def test_every_rule_of_matching_finds_the_value_of_every_module(values: dict[str, int], default: int) -> None:
    patterns = patterns_of(values, default)
    for name, value in values.items():
        assert patterns.get(found_by_peft_0_14(patterns, name), default) == value
        assert patterns.get(get_pattern_key(list(patterns), name), default) == value
        assert patterns.get(found_by_vllm(patterns, name) or "", default) == value


@given(st.dictionaries(NAMES, st.tuples(st.integers(1, 2), st.integers(1, 2)), min_size=1, max_size=12))
def test_peft_up_to_0_13_finds_rank_and_alpha_though_it_takes_one_key_for_both(
    values: dict[str, tuple[int, int]],
) -> None:
    ranks = patterns_of({name: rank for name, (rank, _) in values.items()}, 1)
    alphas = patterns_of({name: alpha for name, (_, alpha) in values.items()}, 1)
    for name, value in values.items():
        key = found_by_peft_0_14([*ranks, *alphas], name)
        assert (ranks.get(key, 1), alphas.get(key, 1)) == value


@pytest.mark.parametrize("name", ["model.a+b", "model.experts[3]", "model.(", "model.a|b", "model.é", "a+b"])
def test_a_name_with_special_characters_is_found_by_its_key(name: str) -> None:
    values = {name: 2, "model.other": 1}
    patterns = patterns_of(values, 1)
    assert patterns[get_pattern_key(list(patterns), name)] == 2
    assert patterns[found_by_vllm(patterns, name) or ""] == 2
    assert found_by_vllm(patterns, "model.other") is None


def test_names_that_no_other_ends_in_are_their_own_keys() -> None:
    names = [f"model.layers.{i}.{part}" for i in range(111) for part in ("mlp.up_proj", "self_attn.q-proj")]
    assert patterns_of(dict.fromkeys(names, 2) | {"lm_head": 1}, 1) == dict.fromkeys(names, 2)


# Readers


def reader(name: str, release: str) -> Path:
    """The folder of a release of ``tools/other_releases.py``.  Skips the test if it is not there."""
    folder = folder_of(Path(sys.prefix), name, release)
    if not folder.is_dir():
        pytest.skip(f"{name} {release} is not installed: make readers")
    return folder


@pytest.mark.parametrize("keep_ranks", [False, True])
@pytest.mark.parametrize("scalings", [False, True])
def test_peft_reads_modules_whose_names_end_in_each_other(
    tmp_path: Path, scalings: bool, keep_ranks: bool
) -> None:
    adapter = of_suffixes(scalings)
    adapter.save(tmp_path / "a", keep_ranks=keep_ranks)
    assert_deltas(in_peft(tmp_path / "a", SUFFIXES), adapter.modules)
    assert Adapter.load(tmp_path / "a").digest == adapter.digest


@pytest.mark.soak
@pytest.mark.parametrize("release", RELEASES["peft"])
def test_every_release_of_peft_reads_a_merge_and_an_adapter_of_any_scalings(
    tmp_path: Path, release: str
) -> None:
    folder = reader("peft", release)
    expected: dict[Path, Adapter] = {}
    for name, adapter in {"merge": mixed_merge(), "scaled": of_suffixes(scalings=True)}.items():
        for keep_ranks in (False, True):
            adapter.save(tmp_path / f"{name}-{keep_ranks}", keep_ranks=keep_ranks)
            expected[tmp_path / f"{name}-{keep_ranks}"] = adapter
    found = deltas_in("peft", list(expected), {**SMALL, **SUFFIXES}, tmp_path, folder)
    for deltas, adapter in zip(found, expected.values(), strict=True):
        assert_deltas(deltas, adapter.modules)


@pytest.mark.soak
@pytest.mark.parametrize("release", RELEASES["diffusers"])
def test_diffusers_reads_a_merge(tmp_path: Path, release: str) -> None:
    folder, merged = reader("diffusers", release), mixed_merge()
    merged.save(tmp_path / "merge")
    (found,) = deltas_in("diffusers", [tmp_path / "merge"], SMALL, tmp_path, folder)
    assert_deltas(found, merged.modules)
