"""Looks at adapters before they are merged: may they be, which merges fit, and what will hurt.

Makes no merge and runs no model, and reads the weights of none.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from merged_lora.adapters import Adapter
from merged_lora.alignment import align
from merged_lora.calibration import Calibration
from merged_lora.engine import plan
from merged_lora.errors import AdapterError, MergeError, PlanError, SpecError
from merged_lora.files.parts import Choice
from merged_lora.fitting import check_experts, check_shapes, header_of
from merged_lora.lowrank import gram_of
from merged_lora.recipe import Value
from merged_lora.spec import MergeSpec, Source, check_own_name

from .advice import ADVISED
from .comparing import Comparison, compare, one_thread
from .hosting import Host, serving_of
from .inspection import Fact, Fit, Inspection, kind_of

DENSITY = 0.2
"""Share of the entries whose signs are compared by default, as in the ``ties`` of docs/quality.md."""
CANDIDATES: tuple[tuple[str, Mapping[str, Value]], ...] = (
    *ADVISED,
    ("linear", {}),
    ("sum", {}),
    ("cat", {}),
)
"""Merges of all sources, the advised ones first."""


def inspect(
    adapters: Mapping[str, str | os.PathLike[str] | Adapter],
    *,
    density: float = DENSITY,
    model: str | os.PathLike[str] | None = None,
    drop: Iterable[str] = (),
    allow_pickle: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> Inspection:
    """Look at adapters that are to be merged.

    An adapter that cannot be read, one that does not fit the base model, and adapters that do not go together
    are a part of what is found.

    adapters: by source name a PEFT folder, a location such as ``hf:org/repo``, or an :class:`Adapter`.
    density:  share of the entries of each delta, the largest ones, whose signs are compared.
    model:    folder or name of the base model, of which the configuration alone is read; needs transformers,
              of the extra ``calibrate``.
    drop:     parts to leave out of the adapters, as :meth:`Adapter.load` takes them.
    allow_pickle: read pickled weights if there are no others.
    progress: called with the number of modules that were compared since the last call.

    Raises SpecError for names that no source may have, and for a density that is none; CalibrationError for a
    model that cannot be read.
    """
    if not isinstance(adapters, Mapping) or not adapters:
        raise AdapterError("adapters are a mapping from names to folders, with at least one")
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0.0 < density <= 1.0:
        raise SpecError(f"the density must be a number above 0 and at most 1, got {density!r}")
    drop = sorted(Choice.of(drop, (), None).drop)  # which raises for words that are none
    for name in adapters:
        check_own_name(name)
    host = Host(model) if model is not None else None
    read, unread = dict[str, Adapter](), dict[str, str]()
    refused, comparison = None, None
    with one_thread():
        for name, place in adapters.items():
            try:
                read[name] = _read(place, drop, allow_pickle)
            except MergeError as error:
                unread[name] = str(error)
        if len(read) > 1:
            try:
                comparison = compare(_together(read), density, progress)
            except PlanError as error:
                refused = str(error)
        lengths = _lengths(read, comparison)
        facts = []
        for name, place in adapters.items():
            fact = Fact(name, "" if isinstance(place, Adapter) else os.fspath(place), unread.get(name))
            if name in read:
                as_it_is = _why_refused(place) if drop or allow_pickle else None
                fact = _described(fact, read[name], lengths[name], host, as_it_is)
            facts.append(fact)
        fits = () if comparison is None else tuple(_fit(*each, read) for each in CANDIDATES)
    return Inspection(tuple(facts), refused, fits, comparison, density, host.name if host else None)


def _read(place: str | os.PathLike[str] | Adapter, drop: Iterable[str], allow_pickle: bool) -> Adapter:
    if isinstance(place, Adapter):
        return place
    return Adapter.load(place, drop=drop, allow_pickle=allow_pickle)


def _why_refused(place: str | os.PathLike[str] | Adapter) -> str | None:
    """Why an adapter cannot be read without leaving anything out; None if it can."""
    try:
        _read(place, (), False)
    except MergeError as error:
        return str(error)
    return None


def _together(read: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The sources under names that agree; raises PlanError if they do not go together."""
    sources = align(read)
    names = sorted({name for adapter in sources.values() for name in adapter.modules})
    check_shapes(sources, names)
    check_experts(sources, names)
    header_of(sources, names)
    return sources


def _lengths(read: Mapping[str, Adapter], comparison: Comparison | None) -> dict[str, float]:
    """The Frobenius norm of all deltas together, by source."""
    if comparison is not None:
        squares = comparison.inner.diagonal(dim1=1, dim2=2).sum(0)
        return dict(zip(comparison.sources, squares.clamp(min=0.0).sqrt().tolist(), strict=True))
    return {
        name: math.sqrt(max(0.0, sum(float(gram_of([f], [f.scaling])) for f in adapter.modules.values())))
        for name, adapter in read.items()
    }


def _described(fact: Fact, adapter: Adapter, length: float, host: Host | None, refused: str | None) -> Fact:
    """All that is known of a source; ``refused``: why a server cannot merge it as it is."""
    factors = list(adapter.modules.values())
    ranks, scalings = [f.rank for f in factors], [f.scaling for f in factors]
    return replace(
        fact,
        base_model=adapter.header.base_model,
        modules=len(factors),
        kinds=tuple(dict.fromkeys(map(kind_of, adapter.modules))),
        ranks=(min(ranks), max(ranks)),
        scalings=(min(scalings), max(scalings)),
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for f in factors for t in (f.a, f.b)})),
        nbytes=sum(f.nbytes for f in factors),
        length=length,
        zero=sum(f.why_zero is not None for f in factors),
        calibration=adapter.calibration
        if isinstance(adapter.calibration, str)
        else isinstance(adapter.calibration, Calibration),
        vllm=serving_of(adapter, refused),
        misfit=host.misfit(adapter) if host else None,
        named=host.is_named_by(adapter) if host else None,
    )


def _fit(strategy: str, options: Mapping[str, Value], sources: Mapping[str, Adapter]) -> Fit:
    spec = MergeSpec(strategy, tuple(map(Source, sources)), tuple(options.items()))
    try:
        planned = plan(spec, sources)
    except MergeError as error:
        return Fit(str(spec), str(error))
    rank = max(module.results[0][0][0] for module in planned.modules.values())
    return Fit(str(spec), None, rank, planned.notes)
