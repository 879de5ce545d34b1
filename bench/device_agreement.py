"""Checks that the backend on a device gives the reference's merges.

They add to ``agreement``, which every backend must pass, what a device may get wrong: any number of sources,
subnormal numbers, slots of any rank and stride, trims cut into spans, batched factorisations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial

import numpy as np
import torch

from merged_lora import lowrank
from merged_lora.adapters import Adapter
from merged_lora.backends import Result, Slot
from merged_lora.factors import Factors, bits
from merged_lora.plan import MergePlan, SumModule
from merged_lora.planning import make_plan
from merged_lora.reference import delta as dense
from merged_lora.spec import parse
from merged_lora.strategies import TABLE
from merged_lora.triton_kernels.backend import TritonBackend
from merged_lora.triton_kernels.kernels.trim import LARGE

from . import cases
from .agreement import (
    DTYPES,
    Check,
    Group,
    differs_from_reference,
    entry_checks,
    factor_checks,
    keys,
    merge_by_reference,
    name_of,
)

COUNTS = (1, 2, 3, 4, 8, 9, 16)
SLOT_RANK = 16
ALIKE = {f"alike.{i}": (48, 80) for i in range(5)} | cases.SMALL
"""Modules of one shape, so that there is a batch, and others."""
USUAL = ("linear", "ties", "dare_ties")

RESOLUTION = 1e-7
"""The error that ``lowrank.merge_stack`` promises, relative to the largest singular value."""
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""The unit roundoff of each dtype."""
HALF_STEP = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
"""Half of each dtype's smallest subnormal number: what rounding may add to a number too small for UNIT."""


def groups(backend: TritonBackend) -> Iterator[Group]:
    """All checks, in groups with a heading each."""
    counts = f"{', '.join(map(str, COUNTS[:-1]))} and {COUNTS[-1]}"
    yield factor_checks(backend)
    yield f"{counts} sources of any bits, every strategy: NumPy bit for bit", _any(backend)
    yield "slots of other rank, stride and dtype: NumPy bit for bit, zeros beyond", _slots(backend)
    yield f"trims of more than {LARGE} entries: NumPy bit for bit", _spans(backend)
    yield "merges in the space sums: the best approximation of a float64 delta", _deltas(backend)
    yield entry_checks(backend)
    yield "torch.linalg.eigh, batched, float64: the CPU's eigenvalues", eigenvalues(backend.device)


def _spec(strategy: str, count: int) -> str:
    weighted = [f"{w}*{name}" for w, name in zip((1, 0.5, -0.3, 1) * 4, cases.names(count), strict=False)]
    return f"{strategy}({', '.join(weighted)})"


def _any(backend: TritonBackend) -> Iterator[Check]:
    rows = [s for s in TABLE.values() if s.recipe.space == "factors"]
    for count in COUNTS:
        for dtype in DTYPES if count == 4 else DTYPES[:1]:
            sources = cases.awkward_sources(cases.SMALL, count, 8, dtype)
            for strategy in (s.name for s in rows if s.sources_min <= count):
                yield _same_bits(backend, _spec(strategy, count), sources, name_of(dtype))
    one_each = [cases.awkward_sources(cases.SMALL, 3, 8, dtype) for dtype in DTYPES]
    mixed = {name: sources[name] for name, sources in zip(cases.names(3), one_each, strict=True)}
    for strategy in (s.name for s in rows):
        yield _same_bits(backend, _spec(strategy, 3), mixed, "mixed dtypes")


def _same_bits(backend: TritonBackend, spec: str, sources: Mapping[str, Adapter], dtype: str) -> Check:
    plan = make_plan(parse(spec), sources)
    find = partial(differs_from_reference, plan, partial(backend.merge, plan))
    return Check(f"{dtype} {spec}", (f"{plan.spec.strategy} {dtype}",), find)


def _slots(backend: TritonBackend) -> Iterator[Check]:
    for rank in (8, 5):  # whole groups of eight columns, and not
        sources = cases.awkward_sources(cases.SMALL, 3, rank, torch.bfloat16)
        less = {name: Adapter({"small.wide": a.modules["small.wide"]}) for name, a in sources.items()}
        for target in (torch.bfloat16, torch.float32):
            for strategy in USUAL:
                plan = make_plan(parse(_spec(strategy, 3)), sources)
                for transposed in (False, True):
                    what = f"rank {rank} {plan.spec} into {target}{', transposed' if transposed else ''}"
                    find = partial(_wrong_slots, backend, plan, target, transposed)
                    yield Check(what, keys([strategy], torch.bfloat16), find)
            find = partial(_wrong_absent, backend, make_plan(parse(_spec("ties", 3)), less), target)
            what = f"rank {rank} into {target}, a module that no source has"
            yield Check(what, keys(USUAL, torch.bfloat16), find)


def _wrong_slots(
    backend: TritonBackend, plan: MergePlan, target: torch.dtype, transposed: bool
) -> str | None:
    expected = merge_by_reference(plan)
    for what, fill in _ways(backend, plan, target).items():
        slots = _poisoned(SLOT_RANK, target, backend.device, transposed)
        fill(slots, [])
        wrong = find_wrong_slot(slots, expected)
        if wrong:
            return f"{what}: {wrong}"
    return None


def _ways(
    backend: TritonBackend, plan: MergePlan, target: torch.dtype
) -> dict[str, Callable[[Mapping[str, Slot], Sequence[Slot]], object]]:
    """The ways in which a merge gets into slots: written there, or staged and placed as a server does."""
    staged = backend.stage(plan, target)
    return {"written": partial(backend.write, plan), "placed": partial(backend.place, staged)}


def find_wrong_slot(slots: Mapping[str, Slot], expected: Result) -> str | None:
    """The first module whose slot does not hold the expected bits, and zeros beyond its rank."""
    for name, merged in expected.modules.items():
        slot, rank = slots[name], merged.rank
        for got, want in ((slot.a[:rank], merged.a), (slot.b[:, :rank], merged.b)):
            if not torch.equal(bits(got.cpu()), bits(want.to(got.dtype))):
                return f"{name} differs"
        if any(bool(bits(rest.cpu()).any()) for rest in (slot.a[rank:], slot.b[:, rank:])):
            return f"{name} has more than zeros beyond its rank"
    return None


def _wrong_absent(backend: TritonBackend, plan: MergePlan, target: torch.dtype) -> str | None:
    for what, fill in _ways(backend, plan, target).items():
        slots = _poisoned(SLOT_RANK, target, backend.device, True)
        absent = slots.pop("small.tall")
        fill(slots, [absent])
        if bool(bits(absent.a.cpu()).any() or bits(absent.b.cpu()).any()):
            return f"{what}: its slot is not zero"
    return None


def _poisoned(rank: int, dtype: torch.dtype, device: torch.device, transposed: bool) -> dict[str, Slot]:
    """Slots full of NaN for the small modules."""

    def full(*shape: int) -> torch.Tensor:
        turned = torch.full(shape[::-1], torch.nan, dtype=dtype, device=device)
        return turned.T if transposed else turned.T.contiguous()

    return {
        name: Slot(full(rank, columns), full(rows, rank)) for name, (rows, columns) in cases.SMALL.items()
    }


def _spans(backend: TritonBackend) -> Iterator[Check]:
    for dtype in DTYPES:
        sources = cases.random_sources({"large": (LARGE // 16 + 8, 16)}, 1, 16, dtype)
        yield _same_bits(backend, "magnitude_prune(a, density=0.3)", sources, name_of(dtype))


def _deltas(backend: TritonBackend) -> Iterator[Check]:
    for dtype in DTYPES:
        for count, rank, spec in (
            (2, 8, "svd(a, 0.5*b, rank=6)"),
            (4, 8, "svd(a, 0.5*b, -0.3*c, d, rank=8)"),
            (4, 16, "svd(a, 0.5*b, -0.3*c, d, rank=16)"),  # 64 ranks in all: another way through cuSOLVER
            (2, 8, "sum(a, 0.5*b)"),
            (2, 8, "cat(a, 0.5*b)"),
            (2, 8, "slerp(a, b, t=0.3)"),
        ):
            plan = make_plan(parse(spec), cases.random_sources(ALIKE, count, rank, dtype))
            what = f"{name_of(dtype)} rank {rank} {spec}"
            yield Check(what, keys([plan.spec.strategy], dtype), partial(_not_all_best, backend, plan))


def _not_all_best(backend: TritonBackend, plan: MergePlan) -> str | None:
    merged = backend.merge(plan).modules
    wrong = (not_best(module, merged[name]) for name, module in plan.modules.items())
    return next((text for text in wrong if text), None)


def not_best(module: object, merged: Factors) -> str | None:
    """What is wrong with factors that are further from a module's dense float64 delta than they must be.

    The bound is Eckart and Young's error, the promised resolution, and what rounding both factors adds.
    """
    assert isinstance(module, SumModule)
    pairs = [(f.a.double().numpy(), f.b.double().numpy()) for f in module.sources]
    deltas = dense.dense(pairs, module.weights)
    if module.mean is None:
        target = np.asarray(np.sum(deltas, axis=0))
    else:
        target = dense.MEANS[module.mean.rule](deltas, module.mean.shares, module.mean.count)
    values = np.linalg.svd(target, compute_uv=False)
    error = float(np.linalg.norm(target - merged.delta().numpy()))
    best = float(np.linalg.norm(values[module.rank :]))
    if not error <= best + RESOLUTION * float(values[0]) + _rounding(merged):
        return f"an error of {error:.3g}, the best is {best:.3g}"
    return None


def find_different_truncation(plan: MergePlan, names: Sequence[str], slots: Mapping[str, Slot]) -> str | None:
    """The first of these modules whose slot is not, to rounding, what ``merged_lora.lowrank`` makes.

    Both are the best approximation, so their products differ by the resolution and by two roundings.  The
    products are too large to be formed; norms come from the Gram matrices of their factors.
    """
    for name in names:
        module = plan.modules[name]
        assert isinstance(module, SumModule)
        slot = slots[name]
        ours = Factors(slot.a[: module.rank].cpu(), slot.b[:, : module.rank].cpu())
        (merged,) = lowrank.merge_modules([module])
        theirs = merged.factors
        a = torch.cat([ours.a.double(), theirs.a.double()])
        b = torch.cat([ours.b.double(), -theirs.b.double()], dim=1)
        apart, size = _norm(a, b), _norm(theirs.a.double(), theirs.b.double())
        allowed = _rounding(ours) + _rounding(theirs) + 2 * RESOLUTION * size
        if not apart <= allowed:
            return f"{name} differs from the CPU's by {apart:.3g}, rounding explains {allowed:.3g}"
    return None


def _rounding(merged: Factors) -> float:
    """Norm of what rounding A and B to their dtype may change in ``B A``: 2 u of the magnitudes' product."""
    unit, step = UNIT[merged.a.dtype], HALF_STEP[merged.a.dtype]
    a, b = merged.a.double().abs(), merged.b.double().abs()
    rows, columns = b.shape[0], a.shape[1]
    small = step * (float(b.sum(1).norm()) * math.sqrt(columns) + float(a.sum(0).norm()) * math.sqrt(rows))
    return 2.02 * unit * _norm(a, b) + small


def _norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frobenius norm of ``b @ a``."""
    return float(((b.T @ b) * (a @ a.T)).sum().abs().sqrt())


def eigenvalues(device: torch.device) -> Iterator[Check]:
    """Checks of ``eigh``: its values against the CPU's, and its vectors by what defines them.

    A stable method is off by ``p(n) eps`` of the largest eigenvalue with a modest polynomial ``p`` (LAPACK
    Users' Guide, section 4.7); ``n^2`` is taken for it.
    """
    decomposing = [s.name for s in TABLE.values() if s.recipe.space != "factors"]
    for n in (8, 32, 33, 64):
        errors = cache(partial(_eigen_errors, n, device))
        for name in ("eigenvalues", "residual", "orthogonality"):
            find = partial(_beyond_bound, errors, name, n)
            yield Check(f"{name} of 9 matrices {n} x {n}", keys(decomposing, *DTYPES), find)


def _eigen_errors(n: int, device: torch.device) -> dict[str, float]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(9, n, 3 * n, generator=generator, dtype=torch.float64)
    x[1, 1:] = x[1, :1]  # of rank one
    x[2] *= 10.0 ** -torch.arange(n, dtype=torch.float64)[:, None].clamp(max=12)
    gram = x @ x.mT
    values, vectors = (y.cpu() for y in torch.linalg.eigh(gram.to(device)))
    expected = torch.linalg.eigvalsh(gram)
    size = expected[:, -1]
    errors = {
        "eigenvalues": (values - expected).abs().amax(1) / size,
        "residual": (gram @ vectors - vectors * values[:, None, :]).flatten(1).norm(dim=1) / size,
        "orthogonality": (vectors.mT @ vectors - torch.eye(n)).flatten(1).norm(dim=1),
    }
    return {name: float(error.max()) for name, error in errors.items()}


def _beyond_bound(errors: Callable[[], dict[str, float]], name: str, n: int) -> str | None:
    times = errors()[name] / (n * n * 2.0**-52)
    return None if times <= 1 else f"{times:.3g} times the bound"
