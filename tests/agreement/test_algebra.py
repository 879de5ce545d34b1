"""What must hold whatever the numbers are."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from peft.utils import merge_utils

from agreement.comparing import assert_same_bits, jobs, merged, run
from making import SMALL, random_adapter
from merged_lora.adapters import Adapter
from merged_lora.bench import cases
from merged_lora.bench.agreement import allowed_difference
from merged_lora.factors import Factors
from merged_lora.planning import make_plan
from merged_lora.spec import parse
from merged_lora.strategies import TABLE

U = 2.0**-24
"""Unit roundoff of float32."""
IN_FACTORS = [strategy.name for strategy in TABLE.values() if strategy.recipe.space == "factors"]
MASKLESS = [name for name in IN_FACTORS if not TABLE[name].option("seed")]
ONE_SOURCE = [
    s.name
    for s in TABLE.values()
    if s.sources_min == 1
    and not (s.recipe.keep == "important" or s.recipe.flat or s.recipe.space == "outputs")
]
"""Strategies that take one source and can keep it as it is."""


def sources(names: str = "abc") -> dict[str, Adapter]:
    return {name: random_adapter(SMALL, 4, seed=i, scaling=0.3 + i) for i, name in enumerate(names)}


def kept_whole(strategy: str) -> str:
    """An option that makes a strategy keep every entry, if it takes one."""
    return ", density=1" if TABLE[strategy].option("density") else ""


def is_streamed(strategy: str) -> bool:
    """Whether it merges the entries of the deltas themselves, in float32 tiles."""
    return TABLE[strategy].recipe.space == "entries"


def assert_streamed(got: Factors, expected: Factors, times: float) -> None:
    """As :func:`assert_delta`, by norms: tiles are products of float32, added up over rows and columns.

    A product of inner dimension n is off by at most n u of its magnitudes; here that is the rank for a tile,
    and ``in`` and ``out`` for what is multiplied with it, twice each.
    """
    apart = (got.delta() - times * expected.delta()).norm()
    terms = expected.rank + 2 * sum(expected.shape)
    assert apart <= terms * U * abs(times) * magnitudes(expected).norm()


def magnitudes(f: Factors) -> torch.Tensor:
    """The sum of magnitudes behind every entry of the delta."""
    return abs(f.scaling) * (f.b.double().abs() @ f.a.double().abs())


def assert_delta(got: Factors, expected: Factors, times: float, roundings: int) -> None:
    """The delta of ``got`` is ``times`` that of ``expected``.

    roundings: how often an entry of A or of B is rounded to float32 on the way, together; each shifts the
    product by at most u of the magnitudes that it adds up, and the matrix products in float64 by 2^-53 a
    term more.  svd finds other factors of the same product, so the larger magnitudes count.
    """
    magnitude = torch.maximum(abs(times) * magnitudes(expected), magnitudes(got))
    allowed = (1.01 * roundings * U + 4 * got.rank * 2.0**-53) * magnitude
    assert ((got.delta() - times * expected.delta()).abs() <= allowed).all()


@pytest.mark.parametrize("strategy", ["sum", "cat", "linear"])
def test_weights_1_and_0_return_the_source(strategy: str) -> None:
    adapters = sources()
    result = merged(f"{strategy}(a, 0*b, 0*c)", adapters).modules
    for module, f in adapters["a"].modules.items():
        # linear rounds sqrt(s) and its product, on A and on B; sum rounds s and its product, on A alone.
        assert_delta(result[module], f, 1, roundings=4)


@pytest.mark.parametrize("strategy", ONE_SOURCE)
def test_the_weight_of_a_single_source_applies(strategy: str) -> None:
    adapters = sources("a")
    result = merged(f"{strategy}(-0.3*a{kept_whole(strategy)})", adapters).modules
    for module, f in adapters["a"].modules.items():
        if is_streamed(strategy):
            assert_streamed(result[module], f, -0.3)
        else:
            # As above; svd finds factors in float64 and rounds each once.
            assert_delta(result[module], f, -0.3, roundings=4)


@pytest.mark.parametrize("strategy", [strategy.name for strategy in TABLE.values() if not strategy.ordered])
def test_permuting_the_sources_of_a_spec_changes_nothing(strategy: str) -> None:
    adapters = sources()
    terms = ["2*a", "b", "-1*c"][: TABLE[strategy].sources_max]
    forth, back = (f"{strategy}({', '.join(order)})" for order in (terms, terms[::-1]))
    assert_same_bits(merged(forth, adapters), merged(back, adapters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", IN_FACTORS)
def test_the_order_of_names_changes_nothing_but_rounding(strategy: str, dtype: torch.dtype) -> None:
    x, y, z = cases.distinct_sources(cases.SMALL, 3, 8, dtype).values()
    forth = make_plan(parse(f"{strategy}(2*a, b, -0.3*c)"), {"a": x, "b": y, "c": z})
    back = make_plan(parse(f"{strategy}(-0.3*a, b, 2*c)"), {"a": z, "b": y, "c": x})
    for (job, one), (_, other) in zip(jobs(forth, run(forth)), jobs(back, run(back)), strict=True):
        assert ((one.double() - other.double()).abs() <= allowed_difference(job, one)).all()


def test_density_1_does_not_trim() -> None:
    adapters = sources()
    linear = merged("linear(a, 0.5*b, -1*c)", adapters)
    assert_same_bits(merged("magnitude_prune(a, 0.5*b, -1*c, density=1)", adapters), linear)
    assert_same_bits(merged("ties(a, density=1)", adapters), merged("linear(a)", adapters))


@pytest.mark.parametrize("strategy", ["sum", "cat", "svd", "slerp"])
def test_half_of_an_adapter_and_half_of_its_copy_are_the_adapter(strategy: str) -> None:
    one = random_adapter(SMALL, 4, scaling=0.3)
    # slerp interpolates between the weighted deltas: there the weights stay 1.
    spec = "slerp(a, b, t=0.3)" if strategy == "slerp" else f"{strategy}(0.5*a, 0.5*b)"
    result = merged(spec, {"a": one, "b": one}).modules
    for module, f in one.modules.items():
        assert_delta(result[module], f, 1, roundings=4)


def test_factors_carry_the_root_of_a_weight_so_two_quarters_make_the_whole() -> None:
    # (sqrt(1/4) + sqrt(1/4))^2 = 1; weights of 1/2 would double the delta: that is what cross terms do.
    one = random_adapter(SMALL, 4, scaling=0.3)
    quarters = merged("linear(0.25*a, 0.25*b)", {"a": one, "b": one}).modules
    halves = merged("linear(0.5*a, 0.5*b)", {"a": one, "b": one}).modules
    for module, f in one.modules.items():
        assert_delta(
            quarters[module], f, 1, roundings=6
        )  # as for one source, and one addition on each factor
        assert_delta(halves[module], f, 2, roundings=6)


@pytest.mark.parametrize("elect", ["unweighted", "weighted"])
@pytest.mark.parametrize("method", ["total", "frequency"])
def test_ties_of_an_adapter_with_its_copy_is_the_adapter(method: str, elect: str) -> None:
    one = random_adapter(SMALL, 4, scaling=0.3)
    options = f'density=1, majority_sign_method="{method}", elect="{elect}"'
    result = merged(f"ties(a, b, {options})", {"a": one, "b": one}).modules
    for module, f in one.modules.items():
        assert_delta(result[module], f, 1, roundings=4)  # adding x to x and halving round nothing


@pytest.mark.parametrize("scale", [4.0, -4.0, 0.0625])
@pytest.mark.parametrize("strategy", TABLE)
def test_scale_multiplies_the_delta(strategy: str, scale: float) -> None:
    # Powers of four: their roots scale float32 numbers without rounding.  What remains is svd, which rounds
    # the factors it finds once each, in both merges.
    adapters = sources("ab")
    plain = merged(f"{strategy}(a, -0.5*b)", adapters).modules
    scaled = merged(f"{strategy}(a, -0.5*b, scale={scale})", adapters).modules
    for module, f in plain.items():
        assert_delta(scaled[module], f, scale, roundings=4)


@pytest.mark.parametrize("strategy", TABLE)
def test_normalize_divides_the_weights_by_their_sum(strategy: str) -> None:
    adapters = sources("ab")
    assert_same_bits(
        merged(f"{strategy}(3*a, b, normalize=true)", adapters),
        merged(f"{strategy}(0.75*a, 0.25*b)", adapters),
    )


@pytest.mark.parametrize("strategy", MASKLESS)
def test_equal_adapters_under_other_weights_differ(strategy: str) -> None:
    adapters = sources("ab")
    one, other = merged(f"{strategy}(a, b)", adapters), merged(f"{strategy}(a, 0.9*b)", adapters)
    assert not torch.equal(one.modules[next(iter(SMALL))].a, other.modules[next(iter(SMALL))].a)


def lorax(
    adapters: Mapping[str, Adapter], weights: Mapping[str, float], module: str, density: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """LoRAX's delta and its sum of magnitudes: the raw weight on A and on B, the first source's scaling."""
    first = next(iter(weights))
    factors = [adapters[name].modules[module] for name in weights]
    raw = torch.tensor(list(weights.values()), dtype=torch.float64)
    sides = []
    for tensors in ([f.a.double() for f in factors], [f.b.double() for f in factors]):
        if density is None:
            total = merge_utils.task_arithmetic(tensors, raw)
        else:
            total = merge_utils.ties(tensors, raw, density)
        size = sum(abs(w) * x.abs() for w, x in zip(raw, tensors, strict=True))
        sides.append((total, size))
    (a, size_a), (b, size_b) = sides
    scaling = adapters[first].modules[module].scaling
    return scaling * b @ a, scaling * size_b @ size_a


@pytest.mark.parametrize(
    "weights", [{"a": 0.5, "b": -1.0, "c": 0.3}, {"c": 0.5, "a": 2.0, "b": 1.0}], ids=str
)
@pytest.mark.parametrize("density", [None, 0.5])
def test_compat_lorax_puts_raw_weights_on_both_factors(
    density: float | None, weights: dict[str, float]
) -> None:
    adapters = sources()
    terms = ", ".join(f"{w}*{name}" for name, w in weights.items())
    call = f"linear({terms}" if density is None else f"ties({terms}, density={density}"
    result = merged(f'{call}, compat="lorax")', adapters).modules
    for module in SMALL:
        expected, magnitude = lorax(adapters, weights, module, density)
        # On each factor: weight, product, two additions, a division: five roundings.
        assert ((result[module].delta() - expected).abs() <= 10.1 * U * magnitude).all()


def test_in_lorax_a_half_acts_as_a_quarter_and_minus_1_as_plus_1() -> None:
    adapters = sources("a")
    half = merged('linear(0.5*a, compat="lorax")', adapters).modules
    negative = merged('linear(-1*a, compat="lorax")', adapters).modules
    for module, f in adapters["a"].modules.items():
        assert_delta(half[module], f, 0.25, roundings=4)
        assert_delta(negative[module], f, 1, roundings=4)


def test_results_have_scaling_1_and_the_dtype_of_their_sources() -> None:
    half = {name: random_adapter(SMALL, 4, torch.bfloat16, seed=i) for i, name in enumerate("ab")}
    mixed = {**half, "b": random_adapter(SMALL, 4, torch.float16, seed=1)}
    for strategy in TABLE:
        for adapters, dtype in ((half, torch.bfloat16), (mixed, torch.float32)):
            for f in merged(f"{strategy}(a, b)", adapters).modules.values():
                assert (f.scaling, f.a.dtype, f.b.dtype) == (1.0, dtype, dtype)
