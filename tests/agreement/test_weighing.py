"""weights="auto": what it promises, seen in the lengths and sums of dense deltas."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from agreement.comparing import assert_same_bits, merged
from making import SMALL, random_adapter
from merged_lora import weighing
from merged_lora.adapters import Adapter
from merged_lora.errors import SpecError
from merged_lora.factors import Factors
from merged_lora.spec import parse
from merged_lora.strategies import TABLE
from merged_lora.weighing import auto_weights


def sources(*scalings: float) -> dict[str, Adapter]:
    pairs = zip("abcd", scalings, strict=False)
    return {name: random_adapter(SMALL, 4, seed=i, scaling=s) for i, (name, s) in enumerate(pairs)}


def scaled(adapter: Adapter, times: float) -> Adapter:
    modules = {n: Factors(f.a, f.b, f.scaling * times, f.embedding) for n, f in adapter.modules.items()}
    return Adapter(modules, adapter.header)


def length(result: Factors) -> float:
    return float(result.delta().norm())


def test_a_sum_has_about_the_length_of_one_source() -> None:
    adapters = sources(1.0, 3.0, 0.5)
    result = merged("sum(a, b, c, weights=auto)", adapters).modules
    for module, f in result.items():
        lengths = [length(adapter.modules[module]) for adapter in adapters.values()]
        # Deltas of random entries are not quite at right angles: the longer of the two counts.
        assert length(f) <= 1.001 * sum(lengths) / 3 / 3**0.2
        assert length(f) >= 0.8 * sum(lengths) / 3 / 3**0.2


def test_adapters_that_agree_do_not_add_up() -> None:
    one = random_adapter(SMALL, 4, scaling=2.0)
    result = merged("sum(a, b, weights=auto)", {"a": one, "b": one}).modules
    for module, f in result.items():
        assert length(f) == pytest.approx(length(one.modules[module]) / 2**0.2, rel=1e-5)


def test_adapters_that_cancel_are_not_blown_up() -> None:
    one = random_adapter(SMALL, 4, scaling=2.0)
    result = merged("sum(a, b, weights=auto)", {"a": one, "b": scaled(one, -0.99)}).modules
    for module, f in result.items():
        assert length(f) <= 0.02 * length(one.modules[module])


def test_one_source_keeps_its_length() -> None:
    adapters = sources(1.7)
    for strategy in ("sum", "linear", "core_linear", "ties_svd"):
        options = ", density=1" if TABLE[strategy].option("density") else ""
        result = merged(f"{strategy}(a, weights=auto{options})", adapters).modules
        for module, f in result.items():
            assert length(f) == pytest.approx(length(adapters["a"].modules[module]), rel=1e-4)


@pytest.mark.parametrize("strategy", ["knots", "core_ties", "ties_svd"])
def test_rules_that_average_see_deltas_of_one_length(strategy: str) -> None:
    # The strength of an adapter makes no difference to them, except for the length of the whole.
    weak, strong = sources(1.0, 1.0, 1.0), sources(1.0, 1.0, 1.0)
    strong["b"] = scaled(strong["b"], 8.0)
    one = merged(f"{strategy}(a, b, c, weights=auto)", weak).modules
    other = merged(f"{strategy}(a, b, c, weights=auto)", strong).modules
    for module in SMALL:
        x, y = one[module].delta(), other[module].delta()
        assert float((x / x.norm() - y / y.norm()).norm()) <= 1e-5
    plain = merged(f"{strategy}(a, b, c)", strong).modules
    apart = [p.delta() / length(p) - one[module].delta() / length(one[module]) for module, p in plain.items()]
    assert min(float(x.norm()) for x in apart) > 0.1


def test_weights_depend_on_nothing_but_the_contents() -> None:
    adapters = sources(1.0, 3.0)
    copies = {name: scaled(adapter, 1.0) for name, adapter in adapters.items()}
    first = auto_weights(list(adapters.values()), list(SMALL), True)
    weighing._CACHE.clear()
    assert auto_weights(list(copies.values()), list(SMALL), True) == first


def test_finding_weights_can_be_stopped_after_each_module_and_begun_anew() -> None:
    adapters = list(sources(1.0, 3.0).values())
    expected = auto_weights(adapters, list(SMALL), True)
    weighing._CACHE.clear()
    calls: list[int] = []

    def stop(count: int) -> None:
        calls.append(count)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        auto_weights(adapters, list(SMALL), True, stop)
    assert auto_weights(adapters, list(SMALL), True, calls.append) == expected
    assert calls == [0] * (2 + len(SMALL))


def test_weights_that_are_remembered_keep_no_adapter_alive() -> None:
    adapter = sources(1.0)["a"]
    auto_weights([adapter], list(SMALL), True)
    alive = weakref.ref(adapter)
    del adapter
    gc.collect()
    assert alive() is None


def test_a_module_of_one_source_and_a_delta_of_zeros() -> None:
    adapters = sources(1.0, 3.0)
    first = next(iter(SMALL))
    adapters["b"] = Adapter({first: adapters["b"].modules[first]})
    zeros = Factors(torch.zeros(4, 32), torch.zeros(48, 4), 1.0)
    adapters["a"] = Adapter({**adapters["a"].modules, first: zeros})
    weights = auto_weights([adapters["a"], adapters["b"]], list(SMALL), True)
    assert weights[first][1] == pytest.approx(1.0)
    assert {len(w) for name, w in weights.items() if name != first} == {1}
    assert all(w == pytest.approx((1.0,)) for name, w in weights.items() if name != first)


@pytest.mark.parametrize(
    "strategy", [s.name for s in TABLE.values() if s.recipe.blend in ("karcher", "model_stock")]
)
def test_means_find_lengths_themselves(strategy: str) -> None:
    adapters = sources(1.0, 3.0, 0.5)
    plain, auto = (merged(f"{strategy}(a, b, c{o})", adapters) for o in ("", ", weights=auto"))
    assert_same_bits(auto, plain)


@pytest.mark.parametrize("strategy", TABLE)
def test_every_strategy_takes_it(strategy: str) -> None:
    adapters = sources(1.0, 3.0)
    for backend in ("cpu", "numpy"):
        for f in merged(f"{strategy}(a, b, weights=auto)", adapters, backend).modules.values():
            assert f.a.isfinite().all()


def test_weights_beside_it_are_refused() -> None:
    with pytest.raises(SpecError, match="give none to the sources"):
        parse("ties(0.7*a, b, weights=auto)")
    with pytest.raises(SpecError, match="leave normalize out"):
        parse("ties(a, b, weights=auto, normalize=true)")
    with pytest.raises(SpecError, match="length of each delta"):
        parse('linear(a, b, weights=auto, compat="lorax")')
