"""Whether the sources of a merge fit together, and what a user should know of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch

from .adapters import Adapter
from .errors import PlanError, listed
from .factors import Factors
from .files.layout import Header
from .files.parts import TOKEN_HEADS

ALIKE = 0.5
"""Cosine above which the A of two sources count as alike.  Random ones are at right angles; trainings with
one seed begin with the same A."""

Sources = Mapping[str, Adapter]
"""The sources of a merge by name, in the order of its spec."""


def header_of(
    sources: Sources, names: Collection[str], base_model: str | None = None
) -> tuple[Header, list[str]]:
    """The header of the result, and what a user should know of it; raises PlanError.

    names:      of the modules that are merged.
    base_model: the base model that it names; None for the one that most sources name.
    """
    headers = [adapter.header for adapter in sources.values()]
    if len({h.fan_in_fan_out for h in headers}) > 1:
        raise PlanError("the sources disagree about fan_in_fan_out: they were trained on different layouts")
    notes = []
    bases = Counter(h.base_model for h in headers if h.base_model)
    if bases and base_model is None:
        base_model = min(bases, key=lambda name: (-bases[name], _is_path(name), name))
        if len(bases) > 1:
            notes.append(
                f"the sources name different base models: {listed(sorted(bases))}; the result takes "
                f"{base_model}, base_model (--base-model) chooses another"
            )
    _check_copies(sources, names)
    headed = [adapter.header for adapter in sources.values() if adapter.whole]
    tasks = {h.task_type for h in headed or headers if h.task_type}
    return Header(
        base_model=base_model,
        task_type=tasks.pop() if len(tasks) == 1 else None,
        fan_in_fan_out=headers[0].fan_in_fan_out,
        auto_mapping=headers[0].auto_mapping if len({repr(h.auto_mapping) for h in headers}) == 1 else None,
        parameters=tuple(sorted({name for h in headers for name in h.parameters})),
    ), notes


def _check_copies(sources: Sources, names: Collection[str]) -> None:
    """Raise PlanError if the sources hold copies of one tensor of a merged module that differ."""
    if not any(adapter.header.base_copies for adapter in sources.values()):
        return
    merged, seen = set(names), dict[str, tuple[str, str]]()
    for source, adapter in sources.items():
        for name, digest in adapter.header.base_copies.items():
            if name.rpartition(".base_layer.")[0] not in merged:
                continue
            first, known = seen.setdefault(name, (source, digest))
            if known != digest:
                raise PlanError(
                    f"{first} and {source} hold different copies of {name}, so they were trained on "
                    "different base models; if that is meant, leave the copies out with --drop base_copies "
                    "of the command merged-lora"
                )


def check_experts(sources: Sources, names: Collection[str]) -> None:
    """Raise PlanError if the sources have different numbers of experts, or some experts alone are chosen.

    names: of the modules that are merged.
    """
    counts: dict[str, dict[str, int]] = {}
    for source, adapter in sources.items():
        for parameter, count in _experts(adapter.modules).items():
            counts.setdefault(parameter, {})[source] = count
    chosen = _experts(names)
    for parameter, found in counts.items():
        if len(set(found.values())) > 1:
            each = listed(f"{count} in {source}" for source, count in found.items())
            raise PlanError(f"{parameter} has different numbers of experts: {each}")
        if chosen[parameter] not in (0, *found.values()):
            raise PlanError(
                f"{parameter} is chosen for some experts alone; PEFT keeps those of one parameter together, "
                "so choose all of them or none"
            )


def _experts(names: Iterable[str]) -> Counter[str]:
    """The number of experts of each parameter among modules."""
    return Counter(name.rpartition("[")[0] for name in names if name.endswith("]"))


def _is_path(name: str) -> bool:
    """Whether the name of a base model is a path on some disk, and not a name on a hub."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def check_shapes(sources: Sources, names: Sequence[str]) -> None:
    """Raise PlanError unless each of these modules has one shape in all sources that have it."""
    factors = {name: {s: a.modules[name] for s, a in sources.items() if name in a.modules} for name in names}
    wrong = {n: own for n, own in factors.items() if len({(f.shape, f.embedding) for f in own.values()}) > 1}
    if not wrong:
        return
    per_token = [name for name, own in wrong.items() if _counts_tokens(name, own)]
    name = next((name for name in wrong if name not in per_token), min(wrong))
    shown = listed(f"{f.shape} in {source}" for source, f in wrong[name].items())
    reason, way_out = "these adapters belong to different base models", ""
    if len(per_token) == len(wrong):
        ends = " ".join(sorted({name.rpartition(".")[2] for name in per_token}))
        reason = f"tokens were added before one of them was trained, or {reason}"
        way_out = f'; to merge the other modules, leave out these: without="{ends}" (--without {ends})'
    raise PlanError(f"{name} has delta shapes {shown}: {reason}{way_out}")


def _counts_tokens(name: str, factors: Mapping[str, Factors]) -> bool:
    """Whether a module has a row or a column for each token, and differs in nothing else."""
    if name.rpartition(".")[2] not in TOKEN_HEADS and not any(f.embedding for f in factors.values()):
        return False
    return any(len({f.shape[side] for f in factors.values()}) == 1 for side in (0, 1))


def zero_notes(sources: Sources, names: Sequence[str]) -> list[str]:
    """What a user should know of each source whose delta is zero in all of these modules."""
    # A source that has an effect is known after its first module, as a rule.
    notes = []
    for source, adapter in sources.items():
        reasons: set[str] = set()
        for name in names:
            reason = adapter.modules[name].why_zero if name in adapter.modules else None
            if reason:
                reasons.add(reason)
            elif name in adapter.modules:
                break
        else:
            if reasons:
                notes.append(f"the delta of {source} is zero, because {' or '.join(sorted(reasons))}")
    return notes


def cross_term_notes(strategy: str, sources: Sources, names: Sequence[str]) -> list[str]:
    """What a user should know of a sum of factors whose cross terms count as much as the deltas.

    strategy: adds up A and B, each on its own.
    sources:  those whose weight is not 0, of equal ranks.
    names:    of the modules; the first one that two sources have is looked at.
    """
    shared = (name for name in names if sum(name in a.modules for a in sources.values()) > 1)
    module = next(shared, None)
    if module is None:
        return []
    own = {source: a.modules[module].a for source, a in sources.items() if module in a.modules}
    rows = torch.stack([a.flatten().float() for a in own.values()])  # [sources, rank * in]
    cosines = torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(rows).T
    cosines.fill_diagonal_(0.0)
    alike = [source for source, cosine in zip(own, cosines.amax(1).tolist(), strict=True) if cosine > ALIKE]
    if not alike:
        return []
    highest = f"cosine {float(cosines.max()):.2f} in {module}"
    return [
        f"the A of {listed(alike)} are alike ({highest}): {strategy} adds A and B apart, which makes up to "
        f"{len(alike)} times the weighted sum of their deltas; use sum or svd"
    ]


def missing_notes(sources: Sources, names: Sequence[str]) -> list[str]:
    """What a user should know of these modules if not all sources have all of them."""
    notes, total = [], len(names)
    for source, adapter in sources.items():
        missing = sum(name not in adapter.modules for name in names)
        if missing == total:
            notes.append(f"{source} has none of the chosen modules; it takes no part")
        elif missing:
            notes.append(
                f"{missing} of {total} modules are not in {source}; they are merged from the other sources"
            )
    return notes
