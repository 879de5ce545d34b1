"""Shared by the agreement tests: merges by backend, results by their bits, tensors of every awkward kind."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from merged_lora.adapters import Adapter
from merged_lora.backends import Result, load_backend
from merged_lora.bench.agreement import find_different_bits
from merged_lora.factors import DTYPES, WORDS, Factors
from merged_lora.files.layout import Header
from merged_lora.plan import FactorJob, FactorModule, Keep, MergePlan, Rule, Sum
from merged_lora.planning import make_plan
from merged_lora.spec import parse
from merged_lora.strategies import find

BLOCK = 1024  # of the CPU backend, which cannot be imported without numba
NAMES = [chr(ord("a") + i) for i in range(16)]
SIZES = ((1, 7), (8, 9), (BLOCK - 1, BLOCK), (BLOCK + 1, 3001))
"""Shapes of deltas; at rank 1 these are the sizes of B and of A."""


def merged(
    spec: str, adapters: Mapping[str, Adapter], backend: str = "cpu", limit: int | None = None
) -> Result:
    """What a backend makes of a spec."""
    return run(make_plan(parse(spec), adapters, limit), backend)


def run(plan: MergePlan, backend: str = "cpu") -> Result:
    """What a backend makes of a plan."""
    return load_backend(backend).merge(plan)


def assert_same_bits(got: Result, expected: Result) -> None:
    """Every bit of every factor is the same, and none is NaN."""
    assert find_different_bits(got, expected) is None


def assert_backends_agree(plan: MergePlan, backend: str = "cpu") -> None:
    """The plan gives the same bits on this backend as on the NumPy backend."""
    assert_same_bits(run(plan, backend), run(plan, "numpy"))


def plan_of(tensor: torch.Tensor, keep: Keep) -> MergePlan:
    """A plan in which both factors of one module ``m`` are these entries, kept by this rule."""
    spec = parse("linear(a)")
    factors = Factors(tensor[None, :], tensor[:, None])
    jobs = [FactorJob((x,), Rule((1.0,), (keep,), Sum()), x.dtype) for x in (factors.a, factors.b)]
    module = FactorModule(jobs[0], jobs[1], (0,), False)
    return MergePlan(
        spec, find(spec.strategy).recipe, Header(), {"m": module}, (Adapter({"m": factors}),), ()
    )


def jobs(plan: MergePlan, result: Result) -> list[tuple[FactorJob, torch.Tensor]]:
    """The jobs of a plan in factors space, each with its result."""
    pairs = []
    for name, module in plan.modules.items():
        assert isinstance(module, FactorModule)
        pairs += [(module.a, result.modules[name].a), (module.b, result.modules[name].b)]
    return pairs


def _signs(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, (count,), generator=generator) * 2 - 1


def entries(family: str, count: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """That many entries of one of :data:`FAMILIES`."""
    if family == "normal":
        return torch.randn(count, generator=generator).to(dtype)
    if family == "few values":
        return torch.randint(-2, 3, (count,), generator=generator).to(dtype) / 4
    if family == "one value":
        return torch.full((count,), -0.375, dtype=dtype)
    if family == "zero":
        return torch.zeros(count, dtype=dtype)
    if family == "signed zeros":
        return torch.zeros(count, dtype=dtype) * _signs(count, generator)
    info = torch.finfo(dtype)
    if family == "subnormal":
        steps = round(1 / info.eps)  # subnormal numbers on either side of zero
        return (
            torch.randint(1 - steps, steps, (count,), generator=generator)
            .to(torch.float64)
            .mul(info.smallest_normal * info.eps)
            .to(dtype)
        )
    if family == "large":  # far enough from the largest for any sum of 16 sources, rescaled by 100
        size = torch.rand(count, generator=generator, dtype=torch.float64) * info.max * 2.0**-13
        return (size * _signs(count, generator)).to(dtype)
    assert family == "all exponents"
    words = torch.randint(0, 2**31 if dtype == torch.float32 else 2**15, (count,), generator=generator)
    anything = words.to(WORDS[dtype]).view(dtype)
    return torch.where(anything.abs() < info.max * 2.0**-13, anything, 0) * _signs(count, generator)


def awkward_views(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Adapter]:
    """Adapters ``a``, ``b`` and ``c`` of views: transposed, with gaps, and beginning between two words."""
    made = {}
    for name in "abc":
        wide = torch.randn(90, 33, generator=generator).to(dtype)
        flat = torch.randn(1 + 5 * 67, generator=generator).to(dtype)
        made[name] = Adapter(
            {
                "transposed": Factors(wide[:, :5].T, wide[:, 5:10], 2.0),
                "strided": Factors(wide[::18, ::2], wide[::2, 3:8], 2.0),
                "unaligned": Factors(flat[1:].view(5, 67), flat[1:].view(67, 5), 2.0),
            }
        )
    return made


def with_gaps(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The adapters, each without another third of their modules."""
    return {
        name: Adapter({k: f for j, (k, f) in enumerate(adapter.modules.items()) if (i + j) % 3})
        for i, (name, adapter) in enumerate(adapters.items())
    }


FAMILIES = (
    "normal",
    "few values",
    "one value",
    "zero",
    "signed zeros",
    "subnormal",
    "large",
    "all exponents",
)
COLUMNS = (*DTYPES, None)
"""dtypes of a module; None: another one for every source and factor."""


def awkward_adapters(count: int) -> dict[str, Adapter]:
    """Adapters with a module for every family and dtype; its size turns with the count of sources."""
    adapters = {}
    for i, name in enumerate(NAMES[:count]):
        generator = torch.Generator().manual_seed(i)
        modules = {}
        for x, family in enumerate(FAMILIES):
            for y, column in enumerate(COLUMNS):
                rows, columns = SIZES[(x + y + count) % len(SIZES)]
                a = entries(family, columns, column or DTYPES[i % 3], generator)
                b = entries(family, rows, column or DTYPES[(i + 1) % 3], generator)
                modules[f"{family} {column}"] = Factors(a[None, :], b[:, None], 2.0)
        adapters[name] = Adapter(modules)
    return adapters
