"""How long a merge is expected to take: by its cost, by what was measured, by what was learned."""

from __future__ import annotations

import pytest
import torch

import tiny
from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.backends import load_backend
from merged_lora.cost import Cost, cost_of
from merged_lora.engine import plan
from merged_lora.errors import MergeError
from merged_lora.plan import MergePlan
from merged_lora.spec import parse
from merged_lora.strategies import TABLE
from merged_lora.vllm_plugin.worker.pace import MEASURED, Pace, too_long

SHAPES = {f"layers.{i}.{name}": (96, 64) for i in range(3) for name in ("up", "down")}


def sources(rank: int = 8, dtype: torch.dtype = torch.float32, scale: int = 1) -> dict[str, Adapter]:
    """Three adapters of SHAPES, ``scale`` times as wide."""
    shapes = {name: (out * scale, width * scale) for name, (out, width) in SHAPES.items()}
    return {name: random_adapter(shapes, rank, dtype, seed) for seed, name in enumerate("abc")}


def planned(spec: str, **more: int) -> MergePlan:
    return plan(parse(spec), sources(**more), 64)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "strategy", [s for s in TABLE if TABLE[s].sources_max is None and TABLE[s].recipe.space != "outputs"]
)
def test_more_work_costs_more_whatever_the_strategy(strategy: str) -> None:
    small = cost_of(planned(f"{strategy}(a, b)"))
    assert small.operations > 0
    for larger in (f"{strategy}(a, b, c)",):
        assert cost_of(planned(larger)).operations > small.operations
        assert cost_of(planned(larger)).nbytes > small.nbytes
    wide = cost_of(planned(f"{strategy}(a, b)", scale=3))
    decomposed = TABLE[strategy].recipe.space in ("sums", "core")  # whatever the width
    assert wide.operations > (1 if decomposed else 3) * small.operations * (1 - 1e-9)
    assert wide.nbytes == 3 * small.nbytes


def test_bytes_are_those_that_are_read_and_written() -> None:
    given = sources()
    each = sum(f.nbytes for f in given["a"].modules.values())
    assert cost_of(planned("linear(a, b)")).nbytes == 3 * each
    assert cost_of(planned("sum(a, b)")).nbytes == 4 * each  # the result has both ranks
    assert cost_of(planned("svd(a, b)")).nbytes == 3 * each


def test_costs_add_up() -> None:
    assert Cost(1.0, 2.0) + Cost(3.0, 4.0) == Cost(4.0, 6.0)


def test_deltas_cost_more_than_coordinates_and_these_more_than_factors() -> None:
    wide = {"scale": 16}
    found = [
        cost_of(planned(f"{name}(a, b)", **wide)).operations for name in ("ties", "core_ties", "ties_svd")
    ]
    assert found[0] < found[1] < found[2]
    assert found[2] > 20 * found[1]


def test_what_was_measured_is_what_is_announced() -> None:
    pace = Pace()
    assert pace.seconds(planned("ties(a, b)")) == 0.0
    backend = load_backend("cpu")
    pace.measure(backend)
    small, large = planned("ties_svd(a, b)"), planned("ties_svd(a, b)", scale=4)
    assert 0 < pace.seconds(small) < pace.seconds(large) < 60
    known = {name: pace.seconds(planned(f"{name}(a, b)")) for name in MEASURED}
    assert all(known.values())
    # Strategies that were not timed are as fast as the one that is most like them.
    assert pace._rate_at_start("dare_ties_svd") == pace._rate_at_start("ties_svd")
    assert pace._rate_at_start("core_linear") == pace._rate_at_start("core_ties")
    assert pace._rate_at_start("karcher") == pace._rate_at_start("sum")


def test_every_merge_corrects_the_rate_of_its_strategy() -> None:
    pace, made = Pace(), planned("ties(a, b)")
    pace._measured["ties"] = 1e-9
    for _ in range(60):
        pace.correct(made, 3.0)
    assert pace.seconds(made) == pytest.approx(3.0, rel=1e-3)
    assert pace._measured == {"ties": 1e-9}


def test_what_many_merges_that_were_announced_together_teach_does_not_add_up() -> None:
    pace, made = Pace(), planned("ties(a, b)")
    pace._measured["ties"] = 1e-9
    known = pace.seconds(made)
    for _ in range(40):
        pace.correct(made, 3 * known)
    assert pace.seconds(made) == pytest.approx(3 * known, rel=1e-3)


def test_one_merge_in_a_busy_moment_teaches_little() -> None:
    pace, made = Pace(), planned("ties(a, b)")
    pace._measured["ties"] = 1e-9
    known = pace.seconds(made)
    pace.correct(made, 1e6 * known)
    assert known < pace.seconds(made) < 2 * known


def test_small_merges_teach_nothing_of_large_ones() -> None:
    pace, large = Pace(), planned("ties(a, b)", scale=16)
    pace._measured["ties"] = 1e-9
    known = pace.seconds(large)
    for modules in ('"*.up"', "layers.0.up"):
        small = planned(f"ties(a, b, modules={modules})")
        for _ in range(40):
            pace.correct(small, 1e3 * pace.seconds(small))
    assert pace.seconds(large) == known


def test_the_time_that_it_takes_to_find_weights_is_learned_for_itself() -> None:
    pace = Pace()
    pace._measured["ties"] = 1e-9
    plain, automatic = planned("ties(a, b)"), planned("ties(a, b, weights=auto)")
    known = pace.seconds(plain)
    for _ in range(60):
        pace.correct(automatic, 3.0)
    assert pace.seconds(automatic) == pytest.approx(3.0, rel=1e-3)
    assert pace.seconds(plain) == known


def test_what_is_refused_for_what_was_learned_in_a_busy_hour_is_tried_again() -> None:
    pace, made = Pace(), planned("ties(a, b)")
    pace._measured["ties"] = 1e-9
    limit = 1.5 * pace.seconds(made)
    for _ in range(20):
        pace.correct(made, 3 * limit)
    assert pace.seconds(made) > limit
    refusals = 0
    while pace.seconds(made) > limit:
        pace.doubt(made)
        refusals += 1
    assert refusals < 10
    for _ in range(4):
        pace.correct(made, 1.2 * limit)  # given up at the limit
    assert pace.seconds(made) > limit


def test_what_is_refused_by_what_was_measured_stays_refused() -> None:
    pace, made = Pace(), planned("ties(a, b)")
    pace._measured["ties"] = 1e-9
    known = pace.seconds(made)
    pace.doubt(made)
    assert pace.seconds(made) == known
    pace.correct(made, 0.5 * known)  # faster than was measured
    for _ in range(10):
        pace.doubt(made)
    assert pace.seconds(made) < known


def test_nothing_is_learned_as_long_as_nothing_was_measured() -> None:
    pace = Pace()
    pace.correct(planned("ties(a, b)"), 5.0)
    assert pace._learned == {}


def test_a_reference_and_a_simulated_device_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("timed")

    backend = load_backend("numpy")
    monkeypatch.setattr(backend, "merge", fail)
    pace = Pace()
    pace.measure(backend)
    assert pace._learned == {}


def test_a_refusal_names_only_strategies_that_take_these_sources_and_less_time() -> None:
    class Known(Pace):
        def seconds(self, plan: MergePlan) -> float:
            return {"ties_svd": 50.0, "core_ties": 2.0, "knots": 30.0}.get(plan.spec.strategy, 1.0)

    given = {"a": tiny.make_adapter(1, rank=4), "b": tiny.make_adapter(2, rank=8)}  # no strategy on factors
    made = plan(parse('ties_svd(a, "b")'), given, 8)
    error = too_long(made, 10.0, Known(), 8)
    assert isinstance(error, MergeError)
    assert "ties_svd of these sources takes about 50 s here" in str(error)
    assert "these would do: core_ties (2 s)" in str(error)
    assert "knots" not in str(error)
    assert " ties (" not in str(error)


def test_a_refusal_names_strategies_by_what_they_take_for_the_chosen_modules() -> None:
    class Counting(Pace):
        def seconds(self, plan: MergePlan) -> float:
            return 50.0 if plan.spec.strategy == "ties_svd" else float(len(plan.modules))

    made = plan(parse("ties_svd(a, b, modules=up, without=layers.0)"), sources(), 64)
    assert "these would do: ties (2 s)" in str(too_long(made, 10.0, Counting(), 64))
