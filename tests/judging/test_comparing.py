"""The numbers by which adapters are compared, against dense float64 deltas in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from making import SMALL, random_adapter
from merged_lora.adapters import Adapter
from merged_lora.calibration import Calibration
from merged_lora.factors import Factors
from merged_lora.judging import comparing
from merged_lora.judging.comparing import Comparison, compare
from running import program

Array = NDArray[np.float64]
ONE = "model.layers.0.self_attn.q_proj"


def sources() -> dict[str, Adapter]:
    """Three adapters of different ranks and dtypes: ``c`` lacks two modules, and has one that is zero."""
    few = dict(list(SMALL.items())[:2])
    found = {
        "a": random_adapter(SMALL, seed=1),
        "b": random_adapter(SMALL, 6, torch.bfloat16, seed=2, scaling=-0.5),
        "c": random_adapter(few, 3, torch.float16, seed=3),
    }
    zero = found["c"].modules[ONE]
    modules = {**found["c"].modules, ONE: replace(zero, b=torch.zeros_like(zero.b))}
    return found | {"c": Adapter(modules, calibration=found["c"].calibration)}


def delta(adapter: Adapter, module: str) -> Array:
    """The delta of a module ``[out, in]``, zero if the adapter lacks it."""
    if module not in adapter.modules:
        return np.zeros(SMALL[module])
    found: Array = adapter.modules[module].delta().numpy()
    return found


def basis(matrix: Array) -> Array:
    """An orthonormal basis of the columns of a matrix."""
    u, values, _ = np.linalg.svd(matrix, full_matrices=False)
    found: Array = u[:, values > 1e-9 * max(values[0], 1e-300)]
    return found


def overlap(x: Array, y: Array) -> float:
    """The mean squared cosine of the principal angles between two column spaces."""
    if min(x.shape[1], y.shape[1]) == 0:
        return 0.0
    return float(np.sum(np.linalg.svd(x.T @ y, compute_uv=False) ** 2) / min(x.shape[1], y.shape[1]))


@pytest.fixture(scope="module")
def found() -> Comparison:
    return compare(sources(), 0.3)


def each_pair(found: Comparison, expected: Callable[[Adapter, Adapter, str], float]) -> Array:
    adapters = sources().values()
    return np.array([[[expected(x, y, m) for y in adapters] for x in adapters] for m in found.modules])


def test_inner_products_are_those_of_the_deltas(found: Comparison) -> None:
    expected = each_pair(found, lambda x, y, m: float(np.sum(delta(x, m) * delta(y, m))))
    np.testing.assert_allclose(found.inner.numpy(), expected, rtol=1e-10, atol=1e-10)
    assert found.present.tolist() == [[True, True, True]] * 2 + [[True, True, False]] * 2


def test_spaces_overlap_by_the_angles_between_the_factors(found: Comparison) -> None:
    def of(side: str) -> Callable[[Adapter, Adapter, str], float]:
        def expected(x: Adapter, y: Adapter, module: str) -> float:
            if module not in x.modules or module not in y.modules:
                return 0.0
            f, g = x.modules[module], y.modules[module]
            pair = (f.a.T, g.a.T) if side == "a" else (f.b, g.b)
            return overlap(*(basis(t.double().numpy()) for t in pair))

        return expected

    np.testing.assert_allclose(found.rows.numpy(), each_pair(found, of("a")), atol=1e-9)
    np.testing.assert_allclose(found.columns.numpy(), each_pair(found, of("b")), atol=1e-9)


def test_the_squares_are_those_of_the_sum(found: Comparison) -> None:
    for i, module in enumerate(found.modules):
        total = sum(delta(x, module) for x in sources().values())
        expected = np.linalg.svd(total, compute_uv=False) ** 2
        count = min(len(expected), found.squares.shape[1])
        np.testing.assert_allclose(found.squares[i, :count], expected[:count], rtol=1e-8, atol=1e-8)


def test_signs_are_counted_among_the_largest_entries_of_both(found: Comparison) -> None:
    for i, module in enumerate(found.modules):
        kept = []
        for adapter in sources().values():
            values = delta(adapter, module).ravel()
            least = np.sort(np.abs(values))[len(values) - round(0.3 * len(values))]
            kept.append(np.where(np.abs(values) >= least, np.sign(values), 0.0))
        for j, x in enumerate(kept):
            for k, y in enumerate(kept):
                assert found.both[i, j, k] == pytest.approx(np.sum(x * y != 0), abs=1)
                assert found.opposite[i, j, k] == pytest.approx(np.sum(x * y < 0), abs=1)


def test_signs_of_a_large_delta_are_counted_on_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"m": (400, 50)}
    pair = {"a": random_adapter(shape, seed=1), "b": random_adapter(shape, seed=2)}
    whole = compare(pair, 0.5)
    monkeypatch.setattr(comparing, "SAMPLED", 100 * 50)
    some = compare(pair, 0.5)
    assert int(some.both[0, 0, 0]) == pytest.approx(0.5 * 100 * 50, abs=1)
    share = [float(x.opposite[0, 0, 1] / x.both[0, 0, 1]) for x in (whole, some)]
    assert share[1] == pytest.approx(share[0], abs=0.08)


def test_outputs_are_those_on_the_inputs_of_each_source(found: Comparison) -> None:
    adapters = list(sources().values())
    for m, module in enumerate(found.modules):
        for i, adapter in enumerate(adapters):
            calibration = adapter.calibration
            assert isinstance(calibration, Calibration)
            if module not in calibration.inputs:
                assert found.outputs[m, i].isnan().all()
                continue
            inputs = calibration.inputs[module]
            vectors = inputs.vectors.double().numpy()
            moment = (vectors.T * inputs.values.double().numpy()) @ vectors + np.diag(inputs.rest.double())
            for j, other in enumerate(adapters):
                expected = np.trace(delta(other, module) @ moment @ delta(other, module).T)
                assert float(found.outputs[m, i, j]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_source_without_a_calibration_has_no_outputs() -> None:
    named = sources()
    plain = Adapter(named["b"].modules)
    outputs = compare({"a": named["a"], "b": plain}, 0.3).outputs
    assert outputs[:, 1].isnan().all()
    assert not outputs[:, 0].isnan().any()


def test_modules_are_compared_a_few_at_a_time_with_the_same_result(
    found: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "STACK_BYTES", 1)
    done: list[int] = []
    alone = compare(sources(), 0.3, done.append)
    assert done == [1] * len(SMALL)
    for name in ("inner", "rows", "columns", "squares", "outputs"):
        torch.testing.assert_close(getattr(alone, name), getattr(found, name), equal_nan=True)


def test_factors_of_very_different_size_have_the_spaces_that_they_span() -> None:
    def scaled(seed: int, size: float) -> Adapter:
        f = random_adapter({"m": (40, 30)}, seed=seed).modules["m"]
        grown = torch.tensor([size, 1.0, 1.0, 1.0])
        return Adapter({"m": Factors(f.a * grown[:, None], f.b / grown, f.scaling)})

    even = compare({"a": scaled(1, 1.0), "b": scaled(2, 1.0)}, 0.5)
    odd = compare({"a": scaled(1, 1e6), "b": scaled(2, 1e-6)}, 0.5)
    torch.testing.assert_close(odd.rows, even.rows, rtol=0, atol=1e-6)
    torch.testing.assert_close(odd.columns, even.columns, rtol=0, atol=1e-6)
    torch.testing.assert_close(odd.squares, even.squares, rtol=1e-5, atol=0)


LARGE = """
import resource, sys
import torch
from merged_lora.adapters import Adapter
from merged_lora.factors import Factors
from merged_lora.judging.comparing import STACK_BYTES, compare, one_thread

SHAPES = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096),
          "gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}
def adapter(seed):
    g = torch.Generator().manual_seed(seed)
    one = {k: Factors(torch.randn(16, i, generator=g).bfloat16(), torch.randn(o, 16, generator=g).bfloat16())
           for k, (o, i) in SHAPES.items()}
    return Adapter({f"model.layers.{layer}.{k}": f for layer in range(80) for k, f in one.items()})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
sources = {name: adapter(i) for i, name in enumerate("abc")}
with one_thread():
    before = peak()
    compare(sources, 0.2)
grown = peak() - before
assert grown < 2 * STACK_BYTES, grown
"""


@pytest.mark.slow
def test_the_memory_for_80_layers_as_wide_as_those_of_llama_3_8b_is_bounded() -> None:
    process = program(LARGE)
    assert process.communicate()[1] == ""
    assert process.returncode == 0


def test_torch_has_its_threads_back_after_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = [3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    with comparing.one_thread():
        pass
    assert threads == [3, 1, 3]
