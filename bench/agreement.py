"""Whether ours, the reference and PEFT give the same merges: what does not agree is not worth timing."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch

from merged_lora.adapters import Adapter
from merged_lora.backends import Backend, Result, load_backend
from merged_lora.plan import FactorJob, FactorModule, MergePlan
from merged_lora.planning import make_plan
from merged_lora.spec import parse
from merged_lora.strategies import TABLE

from . import cases, peers

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WORDS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@dataclass(frozen=True)
class Check:
    """A comparison that is still to be made: what it compares, and what of it is vouched for where it agrees.

    strategies, dtypes: whose kernels it runs.  find: what is wrong, None where nothing is.
    """

    what: str
    strategies: frozenset[str]
    dtypes: frozenset[str]
    find: Callable[[], str | None]


def named(dtype: torch.dtype) -> str:
    """A dtype's name without its module's."""
    return str(dtype).removeprefix("torch.")


EVERY_DTYPE = frozenset(map(named, DTYPES))


def disagreements(backend: Backend) -> Iterator[Check]:
    """Small merges beside the NumPy backend's, bit for bit, and PEFT's, to rounding."""
    for dtype in DTYPES:
        sources = cases.distinct_sources(cases.SMALL, 4, 8, dtype)
        name = named(dtype)
        for spec in (
            "linear(a, 0.5*b, -0.3*c, d)",
            "ties(a, 0.5*b, -0.3*c, d)",
            'ties(a, 0.5*b, -0.3*c, d, density=0.2, majority_sign_method="frequency")',
            "magnitude_prune(a, 0.5*b, -0.3*c, d)",
            "dare_linear(a, 0.5*b, -0.3*c, d)",
            "dare_ties(a, 0.5*b, -0.3*c, d)",
        ):
            plan = make_plan(parse(spec), sources)
            about = frozenset({plan.spec.strategy}), frozenset({name})
            ours = cache(partial(backend.merge, plan, unseen))
            yield Check(f"{name} {spec} = NumPy, every bit", *about, partial(_different_bits, plan, ours))
            if "dare" not in spec:  # PEFT draws its masks from a global generator
                find = partial(_beyond_rounding, plan, ours, sources)
                yield Check(f"{name} {spec} = PEFT, to rounding", *about, find)
    what = "float32 svd(a, 0.5*b, rank=6) as close as PEFT's"
    yield Check(what, frozenset({"svd"}), frozenset({"float32"}), partial(_worse_than_peft, backend))


def entry_disagreements(backend: Backend) -> Iterator[Check]:
    """Every strategy in core space and on the entries of deltas beside the dense reference.

    In core space to 1e-5 of the delta; where a rank is cut, an error of at most 1.01 times the least.
    """
    sources = cases.random_sources(cases.SMALL, 4, 6, torch.float32)
    for strategy in (s for s in TABLE.values() if s.recipe.space in ("entries", "core")):
        plan = make_plan(parse(f"{strategy.name}(a, 0.5*b, -0.3*c, d)"), sources)
        what = f"{plan.spec} as close as a rank allows"
        # Sources of another dtype have no check of their own, so this vouches for them.
        yield Check(what, frozenset({strategy.name}), EVERY_DTYPE, partial(_not_close, backend, plan))


def _not_close(backend: Backend, plan: MergePlan) -> str | None:
    ours, theirs = (chosen.merge(plan, unseen) for chosen in (backend, load_backend("numpy")))
    wrong = None
    for module, expected in theirs.modules.items():
        apart = float((ours.modules[module].delta() - expected.delta()).norm() / expected.delta().norm())
        if plan.recipe.space == "core" and apart > 1e-5:
            wrong = f"{module} differs by {apart:.2g}"
        if plan.recipe.space == "entries":
            (kept, asked), (best, _) = ours.energy[module], theirs.energy[module]
            if asked - kept > 1.01**2 * (asked - best):
                wrong = f"{module} keeps {kept:.4g} of {asked:.4g}, {best:.4g} can be kept"
    return wrong


def count_agreed(checks: Iterable[Check]) -> int | None:
    """Print every check; how many there are, or None where something is wrong and nothing is worth timing."""
    found = [(check.what, check.find()) for check in checks]
    for what, wrong in found:
        print(f"  {'WRONG' if wrong else 'ok':6}{what}{': ' + wrong if wrong else ''}")
    if any(wrong for _, wrong in found):
        print("not timed: what disagrees must be mended first")
        return None
    return len(found)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The stored words of a tensor: unlike its values they tell 0.0 from -0.0."""
    return tensor.contiguous().view(_WORDS[tensor.dtype])


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


def peft_result(
    plan: MergePlan, sources: Mapping[str, Adapter]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """PEFT's factors by module, for a plan in factors space."""
    spec = plan.spec
    density = spec.option("density")
    merged = {}
    for module in plan.modules:
        present = {
            name: sources[name].modules[module] for name in spec.names if module in sources[name].modules
        }
        weights = [w for name, w in zip(spec.names, spec.weights(), strict=True) if name in present]
        merged[module] = peers.merge_factors(
            spec.strategy,
            present,
            weights,
            density if isinstance(density, float) else None,
            str(spec.option("majority_sign_method")),
        )
    return merged


def _different_bits(plan: MergePlan, ours: Callable[[], Result]) -> str | None:
    merged = ours().modules
    for module, f in load_backend("numpy").merge(plan, unseen).modules.items():
        got = merged[module]
        if not (torch.equal(bits(got.a), bits(f.a)) and torch.equal(bits(got.b), bits(f.b))):
            return f"{module} differs"
    return None


def _beyond_rounding(
    plan: MergePlan, ours: Callable[[], Result], sources: Mapping[str, Adapter]
) -> str | None:
    merged, theirs = ours().modules, peft_result(plan, sources)
    for module, entry in plan.modules.items():
        if not isinstance(entry, FactorModule):
            return f"{module} is not merged factor by factor"
        got, (a, b) = merged[module], theirs[module]
        for job, x, y in ((entry.a, got.a, a), (entry.b, got.b, b)):
            times = (x.double() - y.double()).abs() / allowed_difference(job, y)
            if not bool((times <= 1).all()):
                return f"{module} differs by {float(times.max()):.1f} times what rounding explains"
    return None


def _worse_than_peft(backend: Backend) -> str | None:
    sources = cases.random_sources(cases.SMALL, 2, 8, torch.float32)
    merged = backend.merge(make_plan(parse("svd(a, 0.5*b, rank=6)"), sources), unseen)
    for module, got in merged.modules.items():
        pair = {name: adapter.modules[module] for name, adapter in sources.items()}
        target = pair["a"].delta() + 0.5 * pair["b"].delta()
        a, b = peers.merge_svd(pair, [1.0, 0.5], 6)
        ours, theirs = (float((target - delta).norm()) for delta in (got.delta(), b.double() @ a.double()))
        if abs(ours - theirs) > 1e-4 * theirs:
            return f"{module} has an error of {ours}, PEFT's is {theirs}"
    return None


def unseen(_: int) -> None:
    """Progress that nobody watches."""
