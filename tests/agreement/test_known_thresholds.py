"""Thresholds that the CPU backend keeps from one merge to the next of the same sources."""

from __future__ import annotations

import pytest
import torch

from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.backends import load_backend
from merged_lora.cpu_kernels.backend import CpuBackend
from merged_lora.engine import plan
from merged_lora.factors import bits
from merged_lora.spec import parse

SHAPES = {"layers.0.up": (96, 64), "layers.0.down": (64, 96), "layers.1.up": (40, 24)}
ONE = {"layers.1.up": (40, 24)}
ALIKE = {"layers.0.up": (40, 24), "layers.1.up": (40, 24)}


@pytest.fixture(scope="module")
def sources() -> dict[str, Adapter]:
    """Adapters of several dtypes; one has one module, one is of equal entries, so that ties are cut."""
    found = {
        "a": random_adapter(SHAPES, 8, torch.bfloat16, 1),
        "b": random_adapter(SHAPES, 8, torch.float32, 2),
        "c": random_adapter(SHAPES, 8, torch.float16, 3),
        "one": random_adapter(ONE, 8, torch.float32, 4),
        "even": random_adapter(SHAPES, 8, torch.bfloat16, 5),
        "x": random_adapter(ALIKE, 8, torch.bfloat16, 6),
        "y": random_adapter(ALIKE, 8, torch.bfloat16, 7),
    }
    for f in found["even"].modules.values():
        f.a.fill_(0.5)
        f.b.fill_(-0.25)
    return found


def assert_right(backend: CpuBackend, spec: str, sources: dict[str, Adapter]) -> None:
    """The merge has the bits of the reference."""
    planned = plan(parse(spec), sources)
    got, expected = (each.merge(planned).modules for each in (backend, load_backend("numpy")))
    for name, f in expected.items():
        assert torch.equal(bits(got[name].a), bits(f.a)), (spec, name)
        assert torch.equal(bits(got[name].b), bits(f.b)), (spec, name)


def test_other_weights_on_the_same_sources_use_the_same_thresholds(sources: dict[str, Adapter]) -> None:
    backend = CpuBackend()
    for weight in (0.3, 0.7, -1.5):
        assert_right(backend, f"ties({weight}*a, b, even, density=0.3)", sources)
        assert_right(backend, f"magnitude_prune(a, {weight}*b, even, density=0.3)", sources)
    assert len(backend._known._known) == 1


@pytest.mark.parametrize(
    "others",
    [
        ("ties(a, b, density=0.3)", "ties(a, c, density=0.3)"),
        ("ties(a, b, density=0.3)", "ties(a, b, density=0.31)"),
        ("ties(a, b, density=[0.3, 0.6])", "ties(a, b, density=[0.6, 0.3])"),
        ("ties(a, b, density=0.3)", "ties(a, b, one, density=0.3)"),
        ("ties(a, b, density=0.3)", "ties(a, even, density=0.3)"),
        ("ties(a, b, density=0.3)", "ties(a, b, density=[0.3, 1.0])"),
        ("ties(a, b, density=0.00001)", "ties(a, b, density=0.3)"),
        ("ties(a, b, density=0.3, modules=up)", "ties(a, b, density=0.3, modules=layers.0)"),
        ("ties(x, y, density=0.3, modules=layers.0)", "ties(x, y, density=0.3, modules=layers.1)"),
    ],
)
def test_what_is_known_of_one_merge_is_not_used_for_another(
    sources: dict[str, Adapter], others: tuple[str, str]
) -> None:
    backend = CpuBackend()
    for spec in (*others, *others):
        assert_right(backend, spec, sources)


def test_a_merge_that_was_stopped_leaves_nothing_behind(sources: dict[str, Adapter]) -> None:
    class StoppedError(Exception):
        pass

    def stop(count: int) -> None:
        raise StoppedError

    backend = CpuBackend()
    with pytest.raises(StoppedError):
        backend.merge(plan(parse("ties(a, b, density=0.3)"), sources), stop)
    assert len(backend._known._known) == 0
    assert_right(backend, "ties(a, b, density=0.3)", sources)


def test_a_bounded_number_of_merges_is_known(
    sources: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merged_lora.cpu_kernels.combine.KNOWN", 3)
    backend = CpuBackend()
    for percent in range(10, 20):
        assert_right(backend, f"ties(a, b, density=0.{percent})", sources)
    assert len(backend._known._known) == 3
