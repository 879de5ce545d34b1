"""What PEFT builds is merged, carried over, left out on request or refused, as the table says.

A merge is read back by PEFT on the same model, and its deltas are compared in float64 with those of PEFT.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from formats import building
from formats.building import Build, Built, merge
from formats.kinds import ODD_KINDS
from formats.odd import ODD, OF
from formats.table import ROWS
from merged_lora.adapters import Adapter
from merged_lora.errors import AdapterError

MERGED = [name for name, row in ROWS.items() if row.of.outcome != "refused"]
CARRIED = [name for name, row in ROWS.items() if row.of.outcome == "carried over"]
DROPPED = [name for name, row in ROWS.items() if row.drop]
REFUSED = [name for name, row in ROWS.items() if row.of.outcome == "refused"]

MAX_RANK = 16
"""No rank in the table is greater."""
EXACT = 2.0**-53 * (2 * MAX_RANK + 2)
"""What float64 rounds of a delta of rank r, relative to its magnitude: r products, r - 1 sums, the scaling
(Higham, Accuracy and Stability, eq. 3.12), and one more for the terms of second order."""
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
LEAST = {"float32": 0.0, "float16": 2.0**-25, "bfloat16": 0.0}
"""Half the distance of the smallest numbers, for entries below the normal range, if any get there."""


def assert_half_the_sum(built: Built, found: dict[str, torch.Tensor]) -> None:
    """The deltas are half the sum of those of the sources, to within what the merge rounds.

    ``A`` is multiplied by weight and scaling: that factor is rounded to float32, the product too, and then to
    the dtype of the result; ``B`` is copied. Entries of ``B`` are below 6 SPREAD, MAX_RANK of them in a sum.
    """
    a, b = built.deltas.values()
    assert sorted(found) == sorted(a)
    size, least = ROUNDOFF[built.row.dtype] + 2 * 2.0**-24, LEAST[built.row.dtype]
    for name, delta in found.items():
        magnitude = 0.5 * (built.magnitudes["a"][name] + built.magnitudes["b"][name])
        bound = (size * (1 + 2.0**-7) + 4 * EXACT) * magnitude + 2 * MAX_RANK * 6 * building.SPREAD * least
        assert bool(((delta - 0.5 * (a[name] + b[name])).abs() <= bound).all()), name
        assert bool(delta.any()), name


@pytest.mark.parametrize("name", MERGED)
def test_an_adapter_is_read_with_peft_s_own_deltas(built: Build, name: str) -> None:
    of = built(name)
    for source, folder in of.folders.items():
        adapter = Adapter.load(folder, drop=of.row.drop)
        assert sorted(adapter.modules) == sorted(of.deltas[source])
        for module, factors in adapter.modules.items():
            bound = 2 * EXACT * of.magnitudes[source][module]
            error = (factors.delta() - of.deltas[source][module]).abs()
            assert bool((error <= bound).all()), module


@pytest.mark.parametrize("name", MERGED)
def test_peft_reads_half_the_sum_from_a_saved_merge(
    built: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    of = built(name)
    drop = ("--drop", *of.row.drop) if of.row.drop else ()
    assert merge(of, tmp_path / "merged", *drop) == 0, capsys.readouterr().err
    model = building.load(of.row, tmp_path / "merged")
    assert_half_the_sum(of, building.deltas(model))
    saved = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in saved.values()} == {f"torch.{of.row.dtype}"}
    assert all(key.endswith(building.FACTORS) for key in saved)


@pytest.mark.parametrize("kind", [kind for kind in ODD if ODD_KINDS[kind].outcome != "refused"])
def test_odd_files_are_read_with_the_deltas_they_were_made_of(
    built: Build, tmp_path: Path, kind: str
) -> None:
    of, flag = built(OF), ODD_KINDS[kind].flag
    adapter = Adapter.load(
        ODD[kind](of.folders["a"], tmp_path), drop=[flag] if flag else [], allow_pickle=True
    )
    assert sorted(adapter.modules) == sorted(of.deltas["a"])
    for module, factors in adapter.modules.items():
        bound = (2 * EXACT + ROUNDOFF["float32"]) * of.magnitudes["a"][module]  # mergekit scales A itself
        assert bool(((factors.delta() - of.deltas["a"][module]).abs() <= bound).all()), module


@pytest.mark.parametrize("kind", [kind for kind in ODD if ODD_KINDS[kind].outcome == "refused"])
def test_odd_files_of_no_adapter_are_refused_by_name(built: Build, tmp_path: Path, kind: str) -> None:
    with pytest.raises(AdapterError, match=str(ODD_KINDS[kind].reason)):
        Adapter.load(ODD[kind](built(OF).folders["a"], tmp_path))


@pytest.mark.parametrize("name", CARRIED)
def test_peft_reads_the_head_of_one_source_from_a_saved_merge(
    built: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    of = built(name)
    assert merge(of, tmp_path / "merged", "--take", f"{of.row.of.flag}=b") == 0, capsys.readouterr().err
    model = building.load(of.row, tmp_path / "merged")
    found = building.beside_factors(model)
    assert found.keys() == of.others["b"].keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in of.others["b"].items())
    assert_half_the_sum(of, building.deltas(model))


@pytest.mark.parametrize("name", DROPPED)
def test_a_refusal_names_what_leaves_the_part_out(built: Build, name: str) -> None:
    of = built(name)
    with pytest.raises(AdapterError, match="--drop") as caught:
        Adapter.load(of.folders["a"])
    proposed = re.findall(r"--drop ((?:[a-z_]+ ?)+)", str(caught.value))
    assert {word for words in proposed for word in words.split()} >= set(of.row.drop)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_merge_supports_is_refused_by_name(built: Build, name: str) -> None:
    reason = ROWS[name].of.reason
    assert reason
    with pytest.raises(AdapterError, match=re.escape(reason)):
        Adapter.load(built(name).folders["a"], drop=("heads", "embeddings", "biases"))
