"""Strategies with mergekit's names merge as mergekit 0.1.5 does, where the conventions coincide.

The values come from its own functions, see mergekit_values.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agreement.comparing import merged
from merged_lora.adapters import Adapter
from merged_lora.factors import Factors
from merged_lora.reference import entries

VALUES = load_file(Path(__file__).with_name("mergekit_values.safetensors"))
FULL = 24
"""Rank at which nothing of a merged delta is cut."""
SUMS = {"breadcrumbs": "gamma=0.05", "breadcrumbs_ties": "gamma=0.05", "sce": "select_topk=0.4"}


def sources() -> dict[str, Adapter]:
    return {
        name: Adapter({"m": Factors(VALUES[f"a{i}"], VALUES[f"b{i}"], 1.0)}) for i, name in enumerate("abc")
    }


def assert_close(got: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    assert float((got.double() - expected).norm()) <= relative * float(expected.norm())


@pytest.mark.parametrize("backend", ["cpu", "numpy"])
@pytest.mark.parametrize("strategy", SUMS)
def test_merges_of_entries_in_delta_space(strategy: str, backend: str) -> None:
    spec = f"{strategy}_svd(a, b, c, {SUMS[strategy]}, rank={FULL})"
    # Sums of four products in float32, and the factors that they are brought into.
    assert_close(merged(spec, sources(), backend).modules["m"].delta(), VALUES[f"delta {strategy}"], 1e-5)


@pytest.mark.parametrize("backend", ["cpu", "numpy"])
@pytest.mark.parametrize("strategy", SUMS)
def test_merges_of_entries_in_factors_space(strategy: str, backend: str) -> None:
    result = merged(f"{strategy}(a, b, c, {SUMS[strategy]})", sources(), backend).modules["m"]
    for side, got in (("a", result.a), ("b", result.b)):
        assert_close(got, VALUES[f"{side} {strategy}"], 1e-6)  # a handful of float32 roundings


@pytest.mark.parametrize("backend", ["cpu", "numpy", "triton"])
@pytest.mark.parametrize(("name", "index"), [("a", 0), ("b", 1), ("c", 2)])
def test_arcee_fusion_over_a_base_of_zeros(name: str, index: int, backend: str) -> None:
    small = {n: Adapter({"m": replace(s.modules["m"], scaling=0.1)}) for n, s in sources().items()}
    got = merged(f"arcee_fusion({name}, rank={FULL})", small, backend).modules["m"].delta()
    expected = VALUES[f"arcee_fusion {index}"]
    assert 0.05 < (expected != 0).double().mean() < 0.5  # the rule leaves something out, and something in
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("backend", ["cpu", "numpy"])
@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("karcher(0.5*a, 0.3*b, 0.2*c)", "karcher"),
        ("multislerp(0.5*a, 0.3*b, 0.2*c)", "multislerp"),
        ("nuslerp(0.7*a, 0.3*b)", "nuslerp"),
        ("model_stock(a, b, c)", "model_stock"),
    ],
)
def test_means(spec: str, name: str, backend: str) -> None:
    # Factors are rounded to float32 once; mergekit adds 1e-8 to the lengths it divides by.
    assert_close(merged(spec, sources(), backend).modules["m"].delta(), VALUES[name], 1e-6)


def test_della_keeps_each_entry_with_the_same_chance() -> None:
    for side in "ab":
        for i in range(3):
            shares = entries.shares(VALUES[f"{side}{i}"].numpy(), share=32768, spread=9830)
            chances = VALUES[f"della {side}{i}"].double().numpy() * entries.SHARES
            # 0.15 is not a whole number of 65536ths, and each share is rounded to one.
            assert np.abs(shares - chances).max() <= 1.0
