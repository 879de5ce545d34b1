"""From a spec and its sources to one merged adapter."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping

from . import __version__
from .adapters import Adapter
from .backends import Progress, load_backend
from .errors import PlanError
from .plan import MergePlan, overflow
from .planning import check_names, make_plan
from .spec import MergeSpec, parse

logger = logging.getLogger(__name__)


def merge(
    spec: str | MergeSpec,
    adapters: Mapping[str, str | os.PathLike[str] | Adapter],
    backend: str = "auto",
    rank: int | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """The adapter that a spec names, with scaling 1 in every module.

    spec:     text such as ``ties(0.7*sql, 0.3*chat, density=0.5)``, or a parsed one.
    adapters: for every source name a PEFT folder or an :class:`Adapter`; further names are ignored.
    backend:  ``triton``, ``cpu``, ``numpy`` or ``auto``.
    rank:     largest rank of the result; ``cat`` and strategies on factors refuse to go beyond it, all others
              approximate.
    progress: called with the number of modules finished since the last call.

    Factors keep the sources' dtype (mixed: promoted).  The result's metadata tell the spec, the sources'
    digests and, where the rank was cut, the share of the squared norm kept, in all and by module; a warning
    is logged where that is under 90 %.  Raises MergeError.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    return run(plan(spec, adapters, rank), backend, progress)


def plan(
    spec: MergeSpec, adapters: Mapping[str, str | os.PathLike[str] | Adapter], rank: int | None = None
) -> MergePlan:
    """The checked plan of a merge; loads those sources that are given as folders.  Raises MergeError."""
    if rank is not None and rank < 1:
        raise PlanError(f"the rank limit must be at least 1, got {rank}")
    check_names(spec, adapters)
    given = {name: adapters[name] for name in spec.names}
    loaded = {n: value if isinstance(value, Adapter) else Adapter.load(value) for n, value in given.items()}
    return make_plan(spec, loaded, rank)


def run(plan: MergePlan, backend: str = "auto", progress: Progress | None = None) -> Adapter:
    """The adapter that a plan describes.  Raises PlanError where the result overflows its dtype."""
    for note in plan.notes:
        logger.warning("%s: %s", plan.spec, note)
    chosen = load_backend(backend)
    result = chosen.merge(plan, progress or (lambda _: None))
    metadata = {
        "merged_lora.version": __version__,
        "merged_lora.backend": chosen.name,
        "merged_lora.spec": str(plan.spec),
        "merged_lora.sources": json.dumps(plan.digests),
    }
    if result.energy:
        metadata["merged_lora.kept_energy"] = repr(result.kept_energy())
        shares = {name: round(share, 6) for name, share in result.kept_by_module().items()}
        metadata["merged_lora.kept_energy_by_module"] = json.dumps(shares)
    for note in result.notes():
        logger.warning("%s: %s", plan.spec, note)
    merged = Adapter(result.modules, plan.header, metadata)
    if merged.nonfinite:
        raise overflow(plan.spec, merged.nonfinite)
    return merged
