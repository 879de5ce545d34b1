"""Merges in the spaces entries and core against dense float64, on shapes up to 1024 x 4096."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from agreement.comparing import assert_same_bits, merged
from making import SMALL, random_adapter
from merged_lora.adapters import Adapter
from merged_lora.backends import Result
from merged_lora.bench.cases import calibrated
from merged_lora.cpu_kernels import backend as cpu
from merged_lora.cpu_kernels import tiles
from merged_lora.cpu_kernels.pool import Pool
from merged_lora.engine import merge
from merged_lora.errors import PlanError
from merged_lora.factors import Factors
from merged_lora.plan import EntryModule, Largest
from merged_lora.planning import make_plan
from merged_lora.reference import delta as dense
from merged_lora.reference import entries
from merged_lora.reference.backend import combine
from merged_lora.spec import parse
from merged_lora.strategies import TABLE

LARGE = {"m": (1024, 4096)}
WEIGHTS = {2: "a, -0.5*b", 4: "a, -0.5*b, 0.7*c, 2*d"}
EXACT = [
    s.name
    for s in TABLE.values()
    if s.recipe.space in ("core", "outputs") or (s.recipe.space == "sums" and s.recipe.blend != "sum")
]
ENTRYWISE = [s.name for s in TABLE.values() if s.recipe.space in ("entries", "core")]
STREAMED = [s.name for s in TABLE.values() if s.recipe.space == "entries"]
BACKENDS = ["cpu", "triton"]
SLOW_ON_TRITON = ["cpu", pytest.param("triton", marks=pytest.mark.slow)]
"""Backends for tests that take seconds under Triton's interpreter."""


@functools.cache
def adapters(large: bool) -> dict[str, Adapter]:
    """Four adapters of two ranks in float32, so that no rounding hides an error."""
    shapes = LARGE if large else SMALL
    return {name: random_adapter(shapes, 4 + i % 2, seed=i, scaling=0.5 + i) for i, name in enumerate("abcd")}


def spec_of(strategy: str, count: int, options: str = "") -> str:
    names = WEIGHTS[2 if TABLE[strategy].sources_max == 2 else count]
    return f"{strategy}({names.replace('-0.5', '0.5') if strategy in MEANS else names}{options})"


MEANS = ("nuslerp", "karcher", "multislerp", "model_stock")


def relative_error(got: Factors, expected: Factors) -> float:
    return float((got.delta() - expected.delta()).norm() / expected.delta().norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("strategy", EXACT)
def test_core_and_mean_strategies_equal_the_oracle(strategy: str, count: int, backend: str) -> None:
    spec = spec_of(strategy, count)
    ours, theirs = merged(spec, adapters(False), backend), merged(spec, adapters(False), "numpy")
    for module, expected in theirs.modules.items():
        assert relative_error(ours.modules[module], expected) <= 1e-5, module
    assert ours.energy.keys() == theirs.energy.keys()
    for module, pair in theirs.energy.items():
        assert ours.energy[module] == pytest.approx(pair, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "count"),
    [
        ("knots", 2),
        ("model_stock", 4),
        # The dense oracle takes most of a minute.
        *(
            pytest.param(name, 4, marks=pytest.mark.soak)
            for name in ("knots", "core_ties", "core_dare_linear")
        ),
        pytest.param("karcher", 4, marks=pytest.mark.soak),
        pytest.param("core_ties", 2, marks=pytest.mark.soak),
    ],
)
def test_the_same_on_a_matrix_of_1024_by_4096(strategy: str, count: int) -> None:
    spec = spec_of(strategy, count)
    ours, theirs = merged(spec, adapters(True)), merged(spec, adapters(True), "numpy")
    assert relative_error(ours.modules["m"], theirs.modules["m"]) <= 1e-5


def target_of(spec: str, sources: Mapping[str, Adapter], module: str) -> np.ndarray:
    """The merged delta before its rank is cut, dense, by the reference."""
    one = make_plan(parse(spec), sources).modules[module]
    assert isinstance(one, EntryModule)
    pairs = [(f.a.numpy(), f.b.numpy()) for f in one.sources]
    return combine(dense.dense(pairs, one.scalings), one.rule, np.float64)


def least_error(target: torch.Tensor, rank: int) -> float:
    """The Frobenius error of the best approximation of this rank: the norm without the largest values.

    The squared singular values are eigenvalues of the Gram matrix of the short side, which takes a tenth of
    the time of a decomposition; in float64 the error is wrong by at most about 1e-7 of the norm.
    """
    short = target if target.shape[0] <= target.shape[1] else target.T
    largest = torch.linalg.eigvalsh(short @ short.T)[-rank:]
    return float((target.square().sum() - largest.sum()).clamp(min=0).sqrt())


def assert_nearly_best(result: Result, spec: str, sources: Mapping[str, Adapter]) -> None:
    """At most 1.01 times the least possible error, and the energy that the factors have."""
    for module, got in result.modules.items():
        target = torch.from_numpy(target_of(spec, sources, module))
        least = least_error(target, got.rank)
        error = float((target - got.delta()).norm())
        # Tiles are float32: a relative 1e-6 of the whole if nothing has to be cut.
        assert error <= 1.01 * least + 1e-6 * float(target.norm()), module
        kept, asked = result.energy[module]
        assert asked == pytest.approx(float(target.square().sum()), rel=1e-5)
        assert kept == pytest.approx(float(got.delta().square().sum()), rel=1e-5)


@pytest.mark.parametrize("backend", SLOW_ON_TRITON)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("strategy", STREAMED)
def test_streamed_merges_are_as_close_as_a_rank_allows(strategy: str, count: int, backend: str) -> None:
    for options in ("", ", rank=9, scale=-0.7"):
        spec = spec_of(strategy, count, options)
        assert_nearly_best(merged(spec, adapters(False), backend), spec, adapters(False))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ties_svd", "dare_ties_svd"])
def test_the_same_on_a_streamed_matrix_of_1024_by_4096(strategy: str) -> None:
    for count in (2, 4):
        spec = spec_of(strategy, count)
        assert_nearly_best(merged(spec, adapters(True)), spec, adapters(True))


ONE_BY_ONE = ("ties_svd", "della_svd", "sce_svd", "arcee_fusion", "knots", "core_dare_ties")
"""Strategies of every kind of rule and basis."""


@pytest.mark.parametrize("strategy", [*ONE_BY_ONE, "svd", "karcher", "iso", "regmean", "sum"])
def test_modules_of_any_kinds_are_merged_together_as_one_by_one(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four alike, of which one is zero in a source, one that a source lacks, one of another rank or dtype."""
    shapes = {f"m{i}": (24, 40) for i in range(7)} | {"wide": (1, 40), "tall": (40, 24)}
    ranks = dict.fromkeys(shapes, 3) | {"m5": 2}
    sources = {n: random_adapter(shapes, ranks, seed=i, embeddings=("m6",)) for i, n in enumerate("ab")}
    first = dict(sources["a"].modules)
    first["m3"] = replace(first["m3"], b=torch.zeros(24, 3))
    first["m1"] = replace(first["m1"], a=first["m1"].a.half(), b=first["m1"].b.bfloat16())
    second = {name: f for name, f in sources["b"].modules.items() if name != "m4"}
    sources = {"a": calibrated(Adapter(first), 0), "b": calibrated(Adapter(second), 1)}
    spec = f"{strategy}(a, b{', rank=2' if strategy in ('svd', 'iso') else ''})"
    together = merged(spec, sources)
    if strategy in STREAMED:  # the best of a rank is only approximated, which the oracle does not do
        monkeypatch.setattr(cpu, "WHOLE_BYTES", 1)
        expected = merged(spec, sources)
    else:
        expected = merged(spec, sources, "numpy")
    assert list(together.modules) == sorted(shapes)
    assert together.energy.keys() == expected.energy.keys()
    for name, f in together.modules.items():
        assert f.embedding == (name == "m6")
        assert relative_error(f, expected.modules[name]) <= (1e-4 if strategy in STREAMED else 1e-5), name
        if name in expected.energy:
            assert together.energy[name] == pytest.approx(expected.energy[name], rel=1e-5)


@pytest.mark.parametrize("strategy", STREAMED)
def test_tiles_of_few_rows_give_the_merge_of_one_tile(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(strategy, 4, ", select_topk=0.4" if "sce" in strategy else "")
    whole = merged(spec, adapters(False))
    monkeypatch.setattr(cpu, "WHOLE_BYTES", 0)
    monkeypatch.setattr(tiles, "TILE_BYTES", 1)  # eight rows
    for kept in (0, 4 * 80 * 20, 1 << 30):  # of the merged delta: nothing, some of its rows, all
        monkeypatch.setattr(tiles, "MERGED_BYTES", kept)
        parts = merged(spec, adapters(False))
        assert_nearly_best(parts, spec, adapters(False))
        for module, f in whole.modules.items():
            assert relative_error(parts.modules[module], f) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.5, 0.2, 1e-3, 0.999])
def test_exactly_as_many_entries_are_kept_as_asked_and_those_of_the_oracle(density: float) -> None:
    """Except for entries as close to the threshold as the products are rounded."""
    sources = adapters(True)
    module = make_plan(parse(f"ties_svd(a, b, density={density})"), sources).modules["m"]
    assert isinstance(module, EntryModule)
    numba_tiles = tiles.NumbaTiles(module, Pool())
    pairs = [(f.a.numpy(), f.b.numpy()) for f in module.sources]
    streamed = np.zeros((2, *LARGE["m"]), np.float32)

    def visit(_: int, buffers: tiles.TileBuffers, start: int, rows: int) -> None:
        streamed[:, start : start + rows] = buffers.tile[:, :rows].numpy()

    numba_tiles.walk(visit)
    for i, x in enumerate(dense.dense(pairs, module.scalings)):
        factors, keep, ((thr, cut),) = module.sources[i], module.rule.keeps[i], numba_tiles.thresholds[i]
        assert isinstance(keep, Largest)
        assert keep.count == int(density * x.size)
        mags = streamed[i].view(np.int32).reshape(-1).astype(np.int64) & 0x7FFFFFFF
        kept = (mags > thr) | ((mags == thr) & (np.arange(mags.size) < cut))
        assert kept.sum() == keep.count
        expected = entries.largest(x, keep.count).reshape(-1)
        magnitudes = np.abs(x).reshape(-1)
        threshold = np.sort(magnitudes)[-keep.count]
        scale = np.abs(factors.b.double().numpy()) @ np.abs(factors.a.double().numpy())
        slack = 2 * (factors.rank + 2) * 2.0**-24 * factors.scaling * scale.reshape(-1)
        assert (np.abs(magnitudes - threshold) <= slack)[kept != expected].all()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("density", [0.5, 0.1, 1.0])
def test_a_scope_of_the_whole_model_is_that_of_the_oracle(density: float, backend: str) -> None:
    sources = dict(adapters(False))
    first = next(iter(SMALL))
    sources["b"] = Adapter({name: f for name, f in sources["b"].modules.items() if name != first})
    spec = f"knots(a, -0.5*b, c, density={density}, scope=model)"
    ours, theirs = merged(spec, sources, backend), merged(spec, sources, "numpy")
    for module, expected in theirs.modules.items():
        assert relative_error(ours.modules[module], expected) <= 1e-5, module
    if density < 1.0:
        plain = merged(spec.replace("model", "module"), sources, "numpy")
        assert max(relative_error(plain.modules[m], f) for m, f in theirs.modules.items()) > 1e-3


@pytest.mark.parametrize(("stack", "kept"), [(1, 1), (1, 1 << 30), (1 << 30, 1)])
def test_coordinates_that_are_too_many_to_be_kept_are_computed_again(
    stack: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "STACK_BYTES", stack)
    monkeypatch.setattr(cpu, "KEPT_BYTES", kept)
    spec = "knots(a, -0.5*b, c, density=0.3, scope=model)"
    ours, theirs = merged(spec, adapters(False)), merged(spec, adapters(False), "numpy")
    for module, expected in theirs.modules.items():
        assert relative_error(ours.modules[module], expected) <= 1e-5, module


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("density", [0.1, 0.37, 0.9])
def test_equal_entries_of_several_modules_are_kept_in_the_order_of_the_modules(
    density: float, backend: str
) -> None:
    same = {name: random_adapter({"m": (12, 20)}, 3, seed=i).modules["m"] for i, name in enumerate("ab")}
    sources = {name: Adapter(dict.fromkeys(("m0", "m1", "m2"), f)) for name, f in same.items()}
    spec = f"knots(a, b, density={density}, scope=model)"
    ours, theirs = merged(spec, sources, backend), merged(spec, sources, "numpy")
    for module, expected in theirs.modules.items():
        assert relative_error(ours.modules[module], expected) <= 1e-5, module


def test_the_basis_of_knots_does_not_depend_on_how_factors_are_scaled() -> None:
    twins = {
        name: Adapter({m: Factors(f.a * 8, f.b / 8, f.scaling) for m, f in adapter.modules.items()})
        for name, adapter in adapters(False).items()
    }
    for strategy in ("knots", "core_ties", "ties_svd"):
        spec = spec_of(strategy, 4)
        one, other = merged(spec, adapters(False)), merged(spec, twins)
        for module, f in one.modules.items():
            assert relative_error(other.modules[module], f) <= 1e-5


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_singular_values_that_repeat_are_handled_and_reported(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Two sources at right angles and of one length: their basis is theirs only because one comes first.
    eye = torch.eye(8, 20)
    apart = {
        "a": Adapter({"m": Factors(eye[:2] * torch.tensor([[3.0], [2.0]]), torch.eye(12)[:, :2], 1.0)}),
        "b": Adapter({"m": Factors(eye[2:4] * torch.tensor([[3.0], [2.0]]), torch.eye(12)[:, 2:4], 1.0)}),
    }
    for strategy in ("knots", "core_ties"):
        result = merged(f"{strategy}(a, b{', rank=4' if strategy == 'core_ties' else ''})", apart, backend)
        assert result.repeated == ("m",)
        assert any("singular values repeat in m" in note for note in result.notes())
        oracle = merged(f"{strategy}(a, b{', rank=4' if strategy == 'core_ties' else ''})", apart, "numpy")
        assert relative_error(result.modules["m"], oracle.modules["m"]) <= 1e-5
    merge("knots(a, b)", apart, backend)
    assert "the basis they are merged in is one of many" in caplog.text
    assert merged("knots(a, b)", adapters(False), backend).repeated == ()


def test_a_merge_that_keeps_little_says_so(caplog: pytest.LogCaptureFixture) -> None:
    merge("ties_svd(a, b, rank=1)", adapters(False))
    assert "of the squared norm is kept" in caplog.text
    caplog.clear()
    merge("svd(a, b, rank=9)", adapters(False))
    assert "squared norm" not in caplog.text


@pytest.mark.parametrize("strategy", ["core_ties", "knots", "ties_svd", "della_svd", "sce_svd", "karcher"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_deltas_of_zeros_merge_to_zeros(strategy: str, backend: str) -> None:
    zeros = Adapter({"m": Factors(torch.zeros(3, 20), torch.zeros(12, 3), 1.0)})
    for f in merged(f"{strategy}(a, b)", {"a": zeros, "b": zeros}, backend).modules.values():
        assert not f.delta().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", ENTRYWISE)
def test_shapes_of_one_row_or_one_column_and_ranks_beyond_them(strategy: str, backend: str) -> None:
    for shape in ((1, 9), (9, 1), (3, 5)):
        few = {name: random_adapter({"m": shape}, 4, seed=i) for i, name in enumerate("ab")}
        result = merged(f"{strategy}(a, b)", few, backend).modules["m"]
        oracle = merged(f"{strategy}(a, b)", few, "numpy").modules["m"]
        assert result.shape == shape
        assert float((result.delta() - oracle.delta()).norm()) <= 1e-4 * (1 + float(oracle.delta().norm()))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("strategy", ["ties_svd", "sce_svd", "knots", "core_ties", "core_linear"])
def test_what_overflows_on_the_way_is_refused_by_name(strategy: str, backend: str) -> None:
    large = Factors(torch.full((2, 9), 3e19), torch.full((8, 2), 3e19), 1.0)
    pair = {"a": Adapter({"up_proj": large}), "b": Adapter({"up_proj": large})}
    # core_ties has one coordinate here and must keep it.
    options = ", density=1" if strategy == "core_ties" else ""
    with pytest.raises(PlanError, match="overflows its dtype in up_proj; use smaller weights"):
        merge(f"{strategy}(a, b{options})", pair, backend, rank=1)


@pytest.mark.parametrize("backend", SLOW_ON_TRITON)
@pytest.mark.parametrize("strategy", ["della", "della_linear"])
def test_a_source_of_density_1_is_whole_whatever_the_others_are(strategy: str, backend: str) -> None:
    spec = f"{strategy}(a, c, density=[1.0, 0.5], epsilon=0)"
    assert_same_bits(merged(spec, adapters(False), backend), merged(spec, adapters(False), "numpy"))
    spec = f"{strategy}_svd(a, c, density=[1.0, 0.5], epsilon=0)"
    assert_nearly_best(merged(spec, adapters(False), backend), spec, adapters(False))


def test_weights_that_cancel_among_those_that_have_a_module_are_refused() -> None:
    sources = dict(adapters(False))
    first = next(iter(SMALL))
    sources["c"] = Adapter({name: f for name, f in sources["c"].modules.items() if name != first})
    with pytest.raises(PlanError, match=f"those sources that have {first} add up to 0"):
        merge("karcher(a, -1*b, c)", sources)


@pytest.mark.parametrize("weight", [1e22, 1e-20])
def test_the_energy_is_reported_at_any_size(weight: float) -> None:
    plain = merged("ties_svd(a, b)", adapters(False)).kept_energy()
    assert merged(f"ties_svd({weight}*a, {weight}*b)", adapters(False)).kept_energy() == pytest.approx(plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_overflow_is_not_hidden_by_a_rule_that_leaves_entries_out(backend: str) -> None:
    large = Factors(torch.full((1, 9), 1e20), torch.full((5, 1), 1e20), 1.0)
    small = Factors(torch.full((1, 9), 1e-3), torch.arange(5.0)[:, None], 1.0)
    with pytest.raises(PlanError, match="the result overflows its dtype in m"):
        merge("arcee_fusion(a, b)", {"a": Adapter({"m": large}), "b": Adapter({"m": small})}, backend)
