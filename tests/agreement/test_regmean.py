"""``regmean``: what the least squares fit promises, and its agreement with the dense reference."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from making import SMALL, random_adapter
from merged_lora.adapters import Adapter
from merged_lora.bench.cases import calibrated
from merged_lora.calibration import Calibration, Inputs
from merged_lora.engine import merge
from merged_lora.errors import CalibrationError
from merged_lora.factors import Factors
from merged_lora.reference import delta as dense
from merged_lora.regression import RIDGE, Moments, fitted

MODULE = "model.layers.0.self_attn.q_proj"
BACKENDS = ("numpy", "cpu")


def with_inputs(adapter: Adapter, inputs: dict[str, Inputs]) -> Adapter:
    """The adapter with a calibration of these inputs."""
    return replace(adapter, calibration=Calibration(inputs, adapter.digest, None, 4, (10, 5)))


def second_moment(inputs: Inputs) -> torch.Tensor:
    vectors = inputs.vectors.double()
    return vectors.mT @ (inputs.values.double()[:, None] * vectors) + inputs.rest.double().diag()


def one_module(seed: int, inputs: Inputs, shape: tuple[int, int] = (24, 32), rank: int = 4) -> Adapter:
    return with_inputs(random_adapter({MODULE: shape}, rank, seed=seed), {MODULE: inputs})


def random_inputs(width: int, k: int, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(width, max(k, 1), generator=generator))[0].mT[:k]
    return Inputs(
        torch.logspace(2, -2, k), vectors.contiguous().half(), torch.rand(width, generator=generator)
    )


def objective(delta: torch.Tensor, sources: list[Adapter], weights: list[float]) -> float:
    """The sum that regmean minimizes, without its ridge."""
    total = 0.0
    for adapter, weight in zip(sources, weights, strict=True):
        assert isinstance(adapter.calibration, Calibration)
        gram = second_moment(adapter.calibration.inputs[MODULE])
        target = adapter.modules[MODULE].delta()
        error = delta - weight * target
        total += float(torch.trace(error @ gram @ error.mT))
    return total


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    lacking=st.integers(0, 2),
    pairs=st.lists(st.integers(0, 12), min_size=6, max_size=6),
    shape=st.tuples(st.integers(3, 30), st.integers(3, 40)),
    cut=st.integers(0, 6),
    shrink=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    seed=st.integers(0, 1000),
)
def test_thin_products_equal_the_dense_solution(
    ranks: list[int],
    lacking: int,
    pairs: list[int],
    shape: tuple[int, int],
    cut: int,
    shrink: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    a = [torch.randn(2, r, columns, generator=generator) for r in ranks]
    b = [torch.randn(2, rows, r, generator=generator) for r in ranks]
    inputs = [
        [random_inputs(columns, min(k, columns), seed + 10 * i + j) for j in range(2)]
        for i, k in enumerate(pairs[: len(ranks) + lacking])
    ]
    moments = [
        Moments(*(torch.stack([getattr(x, part) for x in each]) for part in ("values", "vectors", "rest")))
        for each in inputs
    ]
    scalings = 0.5 + torch.rand(2, len(ranks), generator=generator, dtype=torch.float64)
    weights = torch.randn(2, len(ranks), generator=generator, dtype=torch.float64)
    rank = max(1, sum(ranks) - cut)
    new_a, new_b, _ = fitted(a, b, scalings, moments, weights, shrink, rank)
    for j in range(2):
        parts = [
            (x.values.double().numpy(), x.vectors.double().numpy(), x.rest.double().numpy())
            for x in (each[j] for each in inputs)
        ]
        found_a, found_b, _ = dense.fitted(
            [(x[j].numpy(), y[j].numpy()) for x, y in zip(a, b, strict=True)],
            parts,
            scalings[j].tolist(),
            weights[j].tolist(),
            shrink,
            rank,
        )
        expected, found = found_b @ found_a, (new_b[j] @ new_a[j]).numpy()
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_no_delta_of_any_rank_is_closer_to_the_outputs_of_the_sources() -> None:
    sources = [one_module(i, random_inputs(32, 8, i)) for i in range(3)]
    weights = [1.0, 0.5, -2.0]
    merged = merge("regmean(a, 0.5*b, -2*c, rank=12, shrink=1)", dict(zip("abc", sources, strict=True)))
    best = merged.modules[MODULE].delta()
    least = objective(best, sources, weights)
    generator = torch.Generator().manual_seed(7)
    for size in (1e-2, 0.1, 1.0):
        for _ in range(8):
            step = torch.randn(best.shape, generator=generator, dtype=torch.float64) * size * best.std()
            # The ridge moves the minimum by about its own share.
            assert objective(best + step, sources, weights) > least * (1 - 2 * RIDGE)


def test_the_cut_keeps_more_of_the_outputs_than_the_best_approximation_of_the_delta() -> None:
    sources = dict(zip("abc", (one_module(i, random_inputs(32, 8, i)) for i in range(3)), strict=True))
    whole = merge("regmean(a, b, c, rank=12)", sources).modules[MODULE].delta()
    cut = merge("regmean(a, b, c, rank=4)", sources).modules[MODULE].delta()
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    plain = left[:, :4] @ (values[:4, None] * right[:4])
    calibrations = [adapter.calibration for adapter in sources.values()]
    moments = [second_moment(c.inputs[MODULE]) for c in calibrations if isinstance(c, Calibration)]
    gram = torch.stack(moments).sum(0)

    def lost(delta: torch.Tensor) -> float:
        return float(torch.trace((whole - delta) @ gram @ (whole - delta).mT))

    assert lost(cut) < 0.9 * lost(plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sources_whose_inputs_have_nothing_in_common_keep_their_outputs(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64))[0].half()
    faint = torch.full((32,), 1e-6)
    sources = {
        name: one_module(i, Inputs(torch.ones(10), basis[10 * i : 10 * i + 10].contiguous(), faint))
        for i, name in enumerate("abc")
    }
    merged = merge("regmean(a, b, c, rank=12, shrink=1)", sources, backend).modules[MODULE].delta()
    for i, source in enumerate(sources.values()):
        inputs = basis[10 * i : 10 * i + 10].double().mT
        expected = source.modules[MODULE].delta() @ inputs
        assert float((merged @ inputs - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_sources_with_the_same_inputs_are_averaged_by_how_much_these_count(backend: str) -> None:
    inputs = random_inputs(32, 8, 0)
    thrice = Inputs(3 * inputs.values, inputs.vectors, 3 * inputs.rest)
    sources = {"a": one_module(0, inputs), "b": one_module(1, thrice)}
    merged = merge("regmean(a, b, rank=8, shrink=1)", sources, backend)
    a, b = (source.modules[MODULE].delta() for source in sources.values())
    gram = second_moment(inputs)
    expected = (a + 3 * b) / 4
    ridge = RIDGE * float(torch.trace(gram)) / 32
    expected = expected @ gram @ torch.linalg.inv(gram + ridge * torch.eye(32, dtype=torch.float64))
    bound = 1e-5 * float(expected.abs().max())
    assert torch.allclose(merged.modules[MODULE].delta(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_scales_what_a_source_asks_for(backend: str) -> None:
    sources = {name: random_adapter(SMALL, seed=i) for i, name in enumerate("ab")}
    whole, half = (merge(f"regmean({w}*a, {w}*b)", sources, backend) for w in (1, 0.5))
    only_a, only_b = (merge(f"regmean({x}, rank=8)", sources, backend) for x in ("a, 0*b", "0*a, b"))
    both = merge("regmean(a, b, rank=8)", sources, backend)
    for name in SMALL:
        assert torch.allclose(half.modules[name].delta(), 0.5 * whole.modules[name].delta(), atol=1e-5)
        total = only_a.modules[name].delta() + only_b.modules[name].delta()
        assert torch.allclose(both.modules[name].delta(), total, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_source_without_the_module_wants_its_inputs_left_alone(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64))[0].half()
    own, others = (
        Inputs(torch.ones(10), basis[i : i + 10].contiguous(), torch.full((32,), 1e-6)) for i in (0, 20)
    )
    speaking = one_module(0, own)
    lacking = random_adapter({"elsewhere": (4, 32)}, seed=1)
    lacking = with_inputs(lacking, {"elsewhere": own, MODULE: others})
    merged = merge("regmean(a, b)", {"a": speaking, "b": lacking}, backend).modules[MODULE].delta()
    delta = speaking.modules[MODULE].delta()
    kept, left = basis[:10].double().mT, basis[20:30].double().mT
    assert float((merged @ kept - delta @ kept).norm()) < 0.02 * float((delta @ kept).norm())
    assert float((merged @ left).norm()) < 0.02 * float((delta @ left).norm())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_source_without_the_module_is_one_whose_delta_is_zero(backend: str) -> None:
    inputs = [random_inputs(32, 8, i) for i in range(3)]
    sources = {name: one_module(i, inputs[i]) for i, name in enumerate("ab")}
    f = random_adapter({MODULE: (24, 32)}, seed=2).modules[MODULE]
    zero = with_inputs(Adapter({MODULE: Factors(f.a, torch.zeros_like(f.b))}), {MODULE: inputs[2]})
    lacking = with_inputs(random_adapter({"x": (4, 32)}, seed=2), {"x": inputs[0], MODULE: inputs[2]})
    one, other = (
        merge("regmean(a, b, c)", sources | {"c": third}, backend).modules[MODULE].delta()
        for third in (zero, lacking)
    )
    assert torch.allclose(one, other, rtol=0, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_source_whose_tokens_never_reach_the_module_has_no_say(backend: str) -> None:
    unseen = Inputs(torch.zeros(0), torch.zeros(0, 32, dtype=torch.float16), torch.zeros(32))
    speaking = one_module(0, random_inputs(32, 8, 0))
    alone = merge("regmean(a)", {"a": speaking}, backend).modules[MODULE].delta()
    lacking = with_inputs(random_adapter({"x": (4, 32)}), {"x": unseen, MODULE: unseen})
    for other in (one_module(2, unseen), lacking):
        merged = merge("regmean(a, b)", {"a": speaking, "b": other}, backend).modules[MODULE].delta()
        assert torch.allclose(merged, alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_that_no_token_reached_is_averaged_as_if_all_inputs_were_alike(backend: str) -> None:
    unseen = Inputs(torch.zeros(0), torch.zeros(0, 32, dtype=torch.float16), torch.zeros(32))
    everywhere = Inputs(torch.zeros(0), torch.zeros(0, 32, dtype=torch.float16), torch.ones(32))
    blind = merge("regmean(a, b)", {n: one_module(i, unseen) for i, n in enumerate("ab")}, backend)
    alike = merge("regmean(a, b)", {n: one_module(i, everywhere) for i, n in enumerate("ab")}, backend)
    assert torch.equal(blind.modules[MODULE].delta(), alike.modules[MODULE].delta())
    assert float(blind.modules[MODULE].delta().norm()) > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_sources_that_all_do_nothing_merge_to_zero(backend: str) -> None:
    f = random_adapter({MODULE: (24, 32)}).modules[MODULE]
    silent = calibrated(Adapter({MODULE: Factors(f.a, torch.zeros_like(f.b))}))
    merged = merge("regmean(a, b)", {"a": silent, "b": silent}, backend)
    assert not bool(merged.modules[MODULE].delta().any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_modules_that_some_sources_lack_are_fitted_to_the_others(backend: str) -> None:
    some = {name: shape for name, shape in SMALL.items() if "q_proj" in name}
    sources = {"a": random_adapter(SMALL, 4, seed=0), "b": random_adapter(some, 2, seed=1)}
    merged = merge("regmean(a, b)", sources, backend)
    alone = merge("regmean(a)", {"a": sources["a"]}, backend)
    down = "model.layers.0.mlp.down_proj"
    assert set(merged.modules) == set(SMALL)
    assert torch.equal(merged.modules[down].delta(), alone.modules[down].delta())


def test_a_merge_records_the_calibrations_that_it_used() -> None:
    sources = {name: random_adapter(SMALL, seed=i) for i, name in enumerate("ab")}
    merged = merge("regmean(a, b)", sources)
    assert all(
        s.calibration.digest in merged.metadata["merged_lora.calibrations"]  # type: ignore[union-attr]
        for s in sources.values()
    )
    assert "merged_lora.calibrations" not in merge("linear(a, b)", sources).metadata


def test_a_source_without_a_calibration_is_named_with_the_command_that_makes_one() -> None:
    plain = replace(random_adapter(SMALL), calibration=None)
    with pytest.raises(CalibrationError, match=r"but chat has none; .* merged-lora calibrate .* chat=PATH"):
        merge("regmean(sql, chat)", {"sql": random_adapter(SMALL, seed=1), "chat": plain})


def test_a_calibration_of_other_weights_is_refused() -> None:
    other = replace(random_adapter(SMALL), calibration=random_adapter(SMALL, seed=1).calibration)
    with pytest.raises(CalibrationError, match="calibration of sql: it was made for other weights"):
        merge("regmean(sql)", {"sql": other})
