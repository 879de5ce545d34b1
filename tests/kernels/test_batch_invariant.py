"""No merge on a GPU calls an operator that vLLM replaces there when ``VLLM_BATCH_INVARIANT=1`` is set.

vLLM's kernels for these do not support float64, and round float32 differently than the original operators.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.library import _scoped_library

from agreement.comparing import assert_same_bits
from agreement.test_bits import spec_of
from making import random_adapter
from merged_lora.batched import multiplied
from merged_lora.plan import AgreeingMean, Largest, Rule
from merged_lora.planning import make_plan
from merged_lora.strategies import TABLE
from merged_lora.triton_kernels.backend import load
from merged_lora.triton_kernels.batched.tiles import TorchTiles

REPLACED = {
    *("mm", "mm.out", "addmm", "addmm.out", "bmm", "bmm.out", "matmul", "linear"),
    *("mean.dim", "softmax", "_softmax", "_log_softmax"),
}
"""The operators that vLLM 0.30 to 0.33 replaces on some kind of GPU."""
SHAPES = {"m.q": (24, 40), "m.down": (40, 24)}
RANK = 3  # of the results of strategies that can cut it


def vllm_folders() -> dict[str, Path]:
    """The folder of every vLLM installed here: the one that Python imports, and those next to it."""
    found = {path.name: path / "vllm" for path in sorted(Path(sys.prefix).glob("vllm-*"))}
    spec = importlib.util.find_spec("vllm")
    if spec is not None and spec.origin is not None:
        found["vllm"] = Path(spec.origin).parent
    return found


@contextmanager
def replaced() -> Iterator[None]:
    """Operators of REPLACED raise on this device, by the mechanism that vLLM replaces them with."""

    def refuse(*args: object, **given: object) -> None:
        raise NotImplementedError("replaced by vLLM")

    with warnings.catch_warnings(), _scoped_library("aten", "IMPL") as library:
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for name in sorted(REPLACED):
            library.impl(f"aten::{name}", refuse, load().device.type.upper(), allow_override=True)
        yield


def cases() -> list[tuple[str, int | None]]:
    """Every strategy without a rank, unless it always cuts one, and with a rank if it can cut one."""
    cutting = [s.name for s in TABLE.values() if s.recipe.space != "factors" and s.name != "cat"]
    uncut = [name for name in TABLE if not name.endswith("_svd")]
    return [(name, None) for name in uncut] + [(name, RANK) for name in cutting]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "limit"), cases())
def test_no_strategy_calls_what_vllm_replaces(strategy: str, limit: int | None) -> None:
    adapters = {name: random_adapter(SHAPES, 4, seed=i) for i, name in enumerate("ab")}
    plan = make_plan(spec_of(strategy, {}, 2), adapters, limit)
    backend = load()
    expected = backend.merge(plan)
    with replaced():
        got = backend.merge(plan)
        backend.stage(plan, torch.float32)
    assert_same_bits(got, expected)


@pytest.mark.parametrize(
    ("strategy", "options"), [("knots", {"scope": "model"}), ("sce_svd", {"select_topk": 0.3})]
)
def test_rules_that_look_at_all_entries_call_none_either(strategy: str, options: dict[str, object]) -> None:
    adapters = {name: random_adapter(SHAPES, 4, seed=i) for i, name in enumerate("ab")}
    plan = make_plan(spec_of(strategy, options, 2), adapters)
    with replaced():
        load().merge(plan)


def test_tiles_that_torch_forms_call_none_either() -> None:
    device = load().device
    a, b = (torch.ones(2, *shape, device=device) for shape in ((3, 40), (24, 3)))
    rule = Rule((1.0,), (Largest(100),), AgreeingMean(False, False))
    with replaced():
        tiles = TorchTiles([a], [b], torch.ones(2, 1, device=device), [rule, rule])
        tiles.times(a.new_ones(2, 40, 5))
        tiles.transposed_times(a.new_ones(2, 24, 5))


def test_what_is_refused_includes_every_way_to_write_a_product() -> None:
    device = load().device
    x = torch.ones(2, 3, 3, dtype=torch.float64, device=device)
    ways: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: x @ x,
        lambda: x[0] @ x[0, 0],
        lambda: torch.einsum("bij,bjk->bik", x, x),
    )
    for way in ways:
        way()
        with replaced(), pytest.raises(NotImplementedError):
            way()
        way()


@pytest.mark.parametrize("vllm", vllm_folders())
def test_vllm_replaces_no_other_operators(vllm: str) -> None:
    (file,) = vllm_folders()[vllm].rglob("batch_invariant.py")
    text = file.read_text(encoding="utf-8")
    names = set(re.findall(r'\.impl\(\s*"aten::([\w.]+)"', text))
    assert {"bmm", "matmul"} <= names <= REPLACED
    # Replacements made in any other way would be missed above.
    assert len(re.findall(r"\.impl\(", text)) == len(re.findall(r'\.impl\(\s*"aten::', text))
    assert set(re.findall(r"^\s+torch\.(\w+) = ", text, re.MULTILINE)) <= {"bmm"}


def test_a_product_is_that_of_its_factors_from_left_to_right() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, z = (
        torch.randint(-9, 10, (2, rows, columns), generator=generator).double()
        for rows, columns in ((3, 4), (5, 4), (5, 2))
    )
    expected = torch.tensor(  # integers: exact in any order
        [[[sum(x[m, i, k] * y[m, j, k] * z[m, j, n] for j in range(5) for k in range(4)) for n in range(2)]
          for i in range(3)] for m in range(2)]
    )  # fmt: skip
    assert torch.equal(multiplied(x, y.mT, z), expected.double())


@pytest.mark.parametrize("size", [1, 3, 40])
def test_what_the_memory_of_a_product_held_before_is_not_seen(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = torch.ones(2, size, size, dtype=torch.float64)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: empty(self, *shape).fill_(torch.nan))
    assert torch.equal(multiplied(one, one), torch.full_like(one, size))
