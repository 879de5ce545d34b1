"""Checks that ours, the reference and PEFT give the same merges: what does not agree is not worth timing.

The tests and the benchmarks share these checks.  They live here rather than in ``tests/`` because the tests
can import this package from anywhere, and a machine with a GPU may have no pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch

from merged_lora.adapters import Adapter
from merged_lora.backends import Backend, Result, load_backend
from merged_lora.factors import bits
from merged_lora.plan import FactorJob, FactorModule, MergePlan
from merged_lora.planning import make_plan
from merged_lora.spec import parse
from merged_lora.strategies import TABLE

from . import cases, peers

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Check:
    """A comparison that has not been made yet.

    what: what is compared.
    keys: a strategy and a dtype each, in one string: what a row of the benchmark needs an agreeing check of.
    find: makes the comparison and returns what is wrong, None if nothing is.
    """

    what: str
    keys: tuple[str, ...]
    find: Callable[[], str | None]


Group = tuple[str, Iterator[Check]]
"""A heading and the checks below it."""


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype without its module's."""
    return str(dtype).removeprefix("torch.")


def keys(strategies: Iterable[str], *dtypes: torch.dtype) -> tuple[str, ...]:
    """The keys of a check of these strategies in these dtypes."""
    return tuple(f"{strategy} {name_of(dtype)}" for strategy in strategies for dtype in dtypes)


def merge_by_reference(plan: MergePlan) -> Result:
    """The NumPy backend's result for a plan."""
    return load_backend("numpy").merge(plan)


def count_agreed(groups: Iterable[Group]) -> int | None:
    """Make all checks and print what came of each group; their number, or None if one has failed."""
    total, failed = 0, False
    for heading, checks in groups:
        found = [(check.what, check.find()) for check in checks]
        wrong = [f"{what}: {text}" for what, text in found if text]
        print(f"  {'WRONG' if wrong else 'ok':6}{len(found):>3}  {heading}", flush=True)
        for line in wrong:
            print(f"           WRONG {line}", flush=True)
        total, failed = total + len(found), failed or bool(wrong)
    if failed:
        print("not timed: fix the disagreements first")
    return None if failed else total


def factor_checks(backend: Backend) -> Group:
    """Small merges of factors, and a truncated sum."""
    return "small tensors: NumPy bit for bit, PEFT to rounding", _factor_checks(backend)


def entry_checks(backend: Backend) -> Group:
    """Every strategy in the spaces entries and core."""
    return "merges in the spaces entries and core: the dense reference", _entry_checks(backend)


def _factor_checks(backend: Backend) -> Iterator[Check]:
    for dtype in DTYPES:
        sources = cases.distinct_sources(cases.SMALL, 4, 8, dtype)
        for spec in (
            "linear(a, 0.5*b, -0.3*c, d)",
            "ties(a, 0.5*b, -0.3*c, d)",
            'ties(a, 0.5*b, -0.3*c, d, density=0.2, majority_sign_method="frequency")',
            "magnitude_prune(a, 0.5*b, -0.3*c, d)",
            "dare_linear(a, 0.5*b, -0.3*c, d)",
            "dare_ties(a, 0.5*b, -0.3*c, d)",
        ):
            plan = make_plan(parse(spec), sources)
            about = keys([plan.spec.strategy], dtype)
            ours = cache(partial(backend.merge, plan))
            what = f"{name_of(dtype)} {spec} ="
            yield Check(f"{what} NumPy, every bit", about, partial(differs_from_reference, plan, ours))
            if "dare" not in spec:  # PEFT draws its masks from a global generator
                find = partial(_beyond_rounding, plan, ours, sources)
                yield Check(f"{what} PEFT, to rounding", about, find)
    what = "float32 svd(a, 0.5*b, rank=6) as close as PEFT's"
    yield Check(what, keys(["svd"], torch.float32), partial(_worse_than_peft, backend))


def _entry_checks(backend: Backend) -> Iterator[Check]:
    drawn = cases.random_sources(cases.SMALL, 4, 6, torch.float32)
    sources = {name: cases.calibrated(adapter, seed) for seed, (name, adapter) in enumerate(drawn.items())}
    for strategy in (s for s in TABLE.values() if s.recipe.space in ("entries", "core", "outputs")):
        plan = make_plan(parse(f"{strategy.name}(a, 0.5*b, -0.3*c, d)"), sources)
        # Sources of another dtype have no check of their own, so this one counts for them too.
        about = keys([strategy.name], *DTYPES)
        yield Check(f"{plan.spec} as close as a rank allows", about, partial(_not_close, backend, plan))


def find_different_bits(got: Result, expected: Result) -> str | None:
    """The first factor that has another dtype, shape or bit than expected, or that is expected to be NaN."""
    if got.modules.keys() != expected.modules.keys():
        return f"modules {list(got.modules)}, not {list(expected.modules)}"
    for module, f in expected.modules.items():
        for side, x, y in (("A", got.modules[module].a, f.a), ("B", got.modules[module].b, f.b)):
            if (x.dtype, x.shape) != (y.dtype, y.shape):
                return f"{module} differs: {side} is {x.dtype} {list(x.shape)}, not {y.dtype} {list(y.shape)}"
            if y.isnan().any():
                return f"{module}: {side} should be NaN"
            different = int((bits(x) != bits(y)).sum())
            if different:
                return f"{module} differs: {different} of {x.numel()} entries of {side}"
    return None


def differs_from_reference(plan: MergePlan, ours: Callable[[], Result]) -> str | None:
    """The first factor of our result that is not the NumPy backend's, bit for bit."""
    return find_different_bits(ours(), merge_by_reference(plan))


def allowed_difference(job: FactorJob, merged: torch.Tensor) -> torch.Tensor:
    """How far apart two float32 implementations of one job may lie, entry by entry, when their votes agree.

    Each adds n products in some order: n - 1 roundings of at most 2^-24 of the sum of magnitudes (the
    products themselves are rounded alike; dividing by the same count shrinks what came before and rounds
    once more).  Then each rounds once to the stored dtype, subnormal numbers to a fixed spacing.
    """
    terms = zip(job.inputs, job.rule.weights, job.rule.keeps, strict=True)
    magnitude = torch.stack([x.double().abs() * abs(w) * keep.rescale for x, w, keep in terms]).sum(0)
    stored = torch.finfo(job.dtype)
    spacing = merged.double().abs().clamp(min=stored.smallest_normal) * stored.eps
    return 2 * len(job.inputs) * 2.0**-24 * magnitude + spacing * (1 + stored.eps)


def _beyond_rounding(
    plan: MergePlan, ours: Callable[[], Result], sources: Mapping[str, Adapter]
) -> str | None:
    """The first module that lies further from PEFT's than two roundings in another order explain."""
    spec, density = plan.spec, plan.spec.option("density")
    for module, entry in plan.modules.items():
        assert isinstance(entry, FactorModule)
        a, b = peers.merge_factors(
            spec.strategy,
            {name: sources[name].modules[module] for name in spec.names},
            spec.weights(),
            density if isinstance(density, float) else None,
            str(spec.option("majority_sign_method")),
        )
        got = ours().modules[module]
        for job, x, y in ((entry.a, got.a, a), (entry.b, got.b, b)):
            times = (x.double() - y.double()).abs() / allowed_difference(job, y)
            if not bool((times <= 1).all()):
                return f"{module} differs by {float(times.max()):.1f} times what rounding explains"
    return None


def _worse_than_peft(backend: Backend) -> str | None:
    """The first module whose truncated sum has another error than PEFT's."""
    sources = cases.random_sources(cases.SMALL, 2, 8, torch.float32)
    merged = backend.merge(make_plan(parse("svd(a, 0.5*b, rank=6)"), sources))
    for module, got in merged.modules.items():
        pair = {name: adapter.modules[module] for name, adapter in sources.items()}
        target = pair["a"].delta() + 0.5 * pair["b"].delta()
        a, b = peers.merge_svd(pair, [1.0, 0.5], 6)
        ours, theirs = (float((target - delta).norm()) for delta in (got.delta(), b.double() @ a.double()))
        if abs(ours - theirs) > 1e-4 * theirs:
            return f"{module} has an error of {ours}, PEFT's is {theirs}"
    return None


def _not_close(backend: Backend, plan: MergePlan) -> str | None:
    """A module that is not the dense reference's.

    In spaces core and outputs they are equal to 1e-5 of the delta; if a rank is cut in entries, the error is
    at most 1.01 times the least one.
    """
    ours, theirs = backend.merge(plan), merge_by_reference(plan)
    for module, expected in theirs.modules.items():
        apart = float((ours.modules[module].delta() - expected.delta()).norm() / expected.delta().norm())
        if plan.recipe.space != "entries" and apart > 1e-5:
            return f"{module} differs by {apart:.2g}"
        if plan.recipe.space == "entries":
            (kept, whole), (best, _) = ours.energy[module], theirs.energy[module]
            if whole - kept > 1.01**2 * (whole - best):
                return f"{module} keeps {kept:.4g} of {whole:.4g}, {best:.4g} can be kept"
    return None
