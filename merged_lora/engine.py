"""From a spec and its sources to one merged adapter."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from . import __version__
from .adapters import Adapter
from .alignment import align
from .backends import Progress, Result, load_backend, no_progress
from .checks import ALL
from .choosing import chooser
from .errors import AdapterError, PlanError, SpecError, listed
from .plan import MergePlan, overflow
from .planning import check_names, make_plan
from .spec import MergeSpec, check_own_name, parse

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Merged:
    """A merge that was made.

    adapter: the merged adapter.
    result:  what the backend reported of it.
    """

    adapter: Adapter
    result: Result


def merge(
    spec: str | MergeSpec,
    adapters: Mapping[str, str | os.PathLike[str] | Adapter],
    backend: str = "auto",
    rank: int | None = None,
    progress: Progress | None = None,
    base_model: str | None = None,
) -> Adapter:
    """The adapter that a spec names, with scaling 1 in every module.

    spec:       text such as ``ties(0.7*sql, 0.3*chat, density=0.5)``, or a parsed one.
    adapters:   for every source name a PEFT folder, a location such as ``hf:org/repo``, or an
                :class:`Adapter`; further names are ignored.
    backend:    ``triton``, ``cpu``, ``numpy`` or ``auto``.
    rank:       largest rank of the result; ``cat`` and strategies on factors refuse to exceed it, all others
                approximate.
    progress:   called with the number of modules finished since the last call.
    base_model: name of the base model in the result's header; by default the one that most sources name.

    The factors have the dtype of the sources (promoted if they differ).  The result's metadata hold the spec,
    the digests of the sources and, if the rank was cut, the share of the squared norm that was kept, in total
    and by module; a warning is logged if that is below 90 %.  Raises MergeError.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    return run(plan(spec, adapters, rank, base_model), backend, progress).adapter


def plan(
    spec: MergeSpec,
    adapters: Mapping[str, str | os.PathLike[str] | Adapter],
    rank: int | None = None,
    base_model: str | None = None,
) -> MergePlan:
    """The checked plan of a merge; raises MergeError.

    spec:       the merge.
    adapters:   for every source name a PEFT folder, which is loaded, or an :class:`Adapter`.
    rank:       largest rank of the result, None for any.
    base_model: name of the base model in the result's header; by default the one that most sources name.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise PlanError(f"the rank limit must be a whole number, got {rank!r}")
    if rank is not None and rank < 1:
        raise PlanError(f"the rank limit must be at least 1, got {rank}")
    if base_model is not None and not (isinstance(base_model, str) and base_model.strip()):
        raise PlanError(f"the base model must be a name that is not blank, got {base_model!r}")
    return make_plan(spec, sources_of(spec, adapters), rank, base_model)


def sources_of(
    spec: MergeSpec, adapters: Mapping[str, str | os.PathLike[str] | Adapter]
) -> dict[str, Adapter]:
    """The sources of a merge by name, loaded, under names of modules that agree; raises MergeError.

    spec:     the merge.
    adapters: for every source name a PEFT folder, which is loaded, or an :class:`Adapter`.
    """
    if not isinstance(spec, MergeSpec):
        raise SpecError(f"a spec is text or a MergeSpec, not {type(spec).__name__}")
    if not isinstance(adapters, Mapping):
        raise AdapterError(f"adapters are a mapping from names to folders, not {type(adapters).__name__}")
    for name in adapters:
        check_own_name(name)
    check_names(spec, adapters)
    given = {name: adapters[name] for name in spec.names}
    sources = {n: v if isinstance(v, Adapter) else Adapter.load(v) for n, v in given.items()}
    modules, without = spec.choice
    stays = chooser(ALL, without)
    return align(sources, chosen=chooser(modules, without), left_out=lambda name: not stays(name))


def run(plan: MergePlan, backend: str = "auto", progress: Progress | None = None) -> Merged:
    """Make the merge that a plan describes.  Raises PlanError if the result overflows its dtype.

    plan:     the plan.
    backend:  ``triton``, ``cpu``, ``numpy`` or ``auto``.
    progress: called with the number of modules finished since the last call.
    """
    warn(plan.spec, plan.notes)
    whole = _whole(plan)
    chosen = load_backend(backend)
    result = chosen.merge(plan, progress or no_progress)
    metadata = {
        "merged_lora.version": __version__,
        "merged_lora.backend": chosen.name,
        "merged_lora.spec": str(plan.spec),
        "merged_lora.sources": json.dumps(plan.digests),
    }
    if plan.calibrations:
        metadata["merged_lora.calibrations"] = json.dumps(plan.calibrations)
    if result.energy:
        metadata["merged_lora.kept_energy"] = repr(result.kept_energy())
        metadata["merged_lora.kept_energy_by_module"] = json.dumps(result.kept_by_module())
    warn(plan.spec, result.notes())
    merged = Adapter(result.modules, plan.header, metadata, whole=whole)
    if merged.nonfinite:
        raise overflow(plan.spec, merged.nonfinite)
    return Merged(merged, result)


def _whole(plan: MergePlan) -> dict[str, Mapping[str, torch.Tensor]]:
    """What the result takes over from a source; raises PlanError if two sources have the same module."""
    taken: dict[str, Mapping[str, torch.Tensor]] = {}
    for source in plan.sources:
        twice = sorted(taken.keys() & source.whole.keys())
        if twice:
            raise PlanError(f"two sources have {listed(twice)} as a whole; take it from one of them")
        taken |= source.whole
    both = sorted(
        {name.rpartition(".")[0] for named in taken.values() for name in named} & plan.modules.keys()
    )
    if both:
        raise PlanError(
            f"{listed(both)} is taken whole from one source and has factors in another; leave the factors "
            f'out with without="{" ".join(both)}" (--without {" ".join(both)})'
        )
    return taken


def warn(spec: MergeSpec, notes: Iterable[str], log: logging.Logger = logger) -> None:
    """Log what a user should know of a merge: the notes of its plan, or those of its result.

    spec:  the merge.
    notes: one warning each.
    log:   the logger.
    """
    for note in notes:
        log.warning("%s: %s", spec, note)
