"""The float32 path stays within rounding of the same rules in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agreement.comparing import NAMES, jobs, run
from merged_lora.adapters import Adapter
from merged_lora.factors import Factors
from merged_lora.plan import AgreeingMean, FactorJob
from merged_lora.planning import make_plan
from merged_lora.reference import backend as reference
from merged_lora.reference.backend import to_bits
from merged_lora.reference.numbers import Array, widen
from merged_lora.spec import parse

U = 2.0**-24
"""Unit roundoff of float32."""

WEIGHTED = ", ".join(
    f"{w}*{name}" for w, name in zip((1, 0.5, 0.25, 2, 0.7, 1.5, 0.1, 1), NAMES, strict=False)
)
WITH_NEGATIVES = WEIGHTED.replace("0.5*b", "-0.5*b").replace("0.7*e", "-0.7*e")


def inputs_of(job: FactorJob) -> list[Array]:
    return [widen(*to_bits(tensor)).astype(np.float64) for tensor in job.inputs]


def oracle(job: FactorJob) -> torch.Tensor:
    """The job in float64."""
    return torch.from_numpy(reference.combine(inputs_of(job), job.rule, np.float64))


def kept_entries(job: FactorJob) -> list[torch.Tensor]:
    """The entries of each source that take part, in float64, rescaled."""
    return [torch.from_numpy(x) for x in reference.kept_values(inputs_of(job), job.rule.keeps)]


def bound(job: FactorJob) -> torch.Tensor:
    """Largest error of the float32 path, entry by entry, where its vote cannot have gone the other way.

    With n sources every term w*x is rounded at most twice (rescale, weight) and then takes part in at most
    n - 1 additions and one division that round: relative error at most (n + 2) u / (1 - (n + 2) u) of the
    sum of magnitudes (Higham, Accuracy and Stability, 2nd edition, lemma 3.1).  Dividing by the count only
    makes it smaller.
    """
    roundings = (len(job.inputs) + 2) * U
    terms = [abs(w) * x.abs() for w, x in zip(job.rule.weights, kept_entries(job), strict=True)]
    return roundings / (1 - roundings) * torch.stack(terms).sum(0)


def close_votes(job: FactorJob) -> torch.Tensor:
    """Entries whose total is so near zero that float32 may elect the other sign, by the same lemma."""
    blend = job.rule.blend
    if not isinstance(blend, AgreeingMean) or blend.frequency:
        return torch.zeros(job.inputs[0].shape, dtype=torch.bool)
    values = kept_entries(job)
    if blend.weighted:
        values = [w * x for w, x in zip(job.rule.weights, values, strict=True)]
    stacked = torch.stack(values)
    roundings = (len(values) + 2) * U
    total = stacked.sum(0).abs()
    return (total > 0) & (total <= roundings / (1 - roundings) * stacked.abs().sum(0))


@pytest.mark.parametrize("weights", [WEIGHTED, WITH_NEGATIVES], ids=["positive", "mixed"])
@pytest.mark.parametrize(
    "call",
    [
        "linear({})",
        "ties({})",
        "ties({}, density=0.1)",
        'ties({}, majority_sign_method="frequency")',
        'ties({}, elect="weighted", density=1)',
        "magnitude_prune({})",
        "dare_linear({}, density=0.3)",
        "dare_ties({}, density=0.3)",
        'dare_ties({}, density=0.9, elect="weighted", majority_sign_method="frequency")',
    ],
)
def test_float32_stays_within_its_rounding_of_float64(call: str, weights: str) -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = {
        name: Adapter(
            {"m": Factors(torch.randn(5, 700, generator=generator), torch.randn(900, 5, generator=generator))}
        )
        for name in NAMES[:8]
    }
    plan = make_plan(parse(call.format(weights)), adapters)
    for job, result in jobs(plan, run(plan)):
        decided = ~close_votes(job)
        assert decided.double().mean() > 0.999
        error = (result.double() - oracle(job)).abs()
        assert (error <= bound(job))[decided].all()
        assert error.max() > 0  # float32 does round: equal results would mean that both are one path
