"""Factors of experts that are stored in one pair: taken apart, and put together.

A parameter holds the matrices of all experts, such as ``mlp.experts.gate_up_proj``.  For E experts of rank r
PEFT (``ParamWrapper``) stores A ``[E r, in]``, one expert after the other, and B ``[out, r E]``, in which the
expert changes fastest.  Adapters for vLLM's ``--enable-moe-shared-loras`` have stacks of ``mlp.experts.w1``,
``w2`` and ``w3`` instead, A ``[E, r, in]`` and B ``[E, out, r]``, one of which all experts share and so is
``[1, ...]``.  Taken apart, each expert is a module: ``model.layers.0.mlp.experts.gate_up_proj[3]``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch

from merged_lora.errors import AdapterError, listed
from merged_lora.factors import Factors, bits

from .layout import CONFIG_NAME

IN_ORDER = ("gate_up_proj", "down_proj")
"""Names of parameters in the order in which models of transformers define them.  PEFT wraps the first one
first, so that it is the innermost."""

SHARED = {"w1": "A", "w2": "B", "w3": "A"}
"""Stacks of gate, down and up that vLLM reads, and the factor of which each has one for all experts."""

KEEPING = ("cat", "linear", "ties", "magnitude_prune", "breadcrumbs", "breadcrumbs_ties", "sce")
"""Strategies whose results share the factors that their sources share.  So do those of ``sum`` whose rank is
not cut."""

_NESTED = re.compile(r"(?P<holder>.+?)(?P<depth>(?:\.base_layer)*)")


def parameters_of(modules: Iterable[str], targets: Collection[str]) -> dict[str, str | None]:
    """The full name of the parameter, for every module of an adapter's file that is one.

    modules: names in the file: ``...experts``, and ``...experts.base_layer`` for what PEFT wrapped before.
    targets: the configuration's ``target_parameters``.  A name without its holder, as PEFT itself writes it,
             belongs to those modules that are named ``experts``, or hold another one.

    The name is None if it is not known which parameter of a holder is which.
    """
    nested: dict[str, dict[int, str]] = {}
    for module in modules:
        match = _NESTED.fullmatch(module)
        assert match is not None
        nested.setdefault(match["holder"], {})[match["depth"].count(".base_layer")] = module
    found: dict[str, str | None] = {}
    for holder, depths in nested.items():
        short: dict[str, None] = {}
        for target in targets:
            owner, _, name = target.rpartition(".")
            if f".{holder}".endswith(f".{owner}") if owner else _is_holder(holder, depths):
                short[name] = None
        if not short:
            continue
        ordered = sorted(short, key=lambda name: IN_ORDER.index(name) if name in IN_ORDER else -1)
        if len(ordered) != len(depths) or (len(ordered) > 1 and not set(ordered) <= set(IN_ORDER)):
            found |= dict.fromkeys(depths.values())
            continue
        # The innermost one, of the greatest depth, was wrapped first.
        found |= {
            depths[depth]: f"{holder}.{name}"
            for depth, name in zip(sorted(depths)[::-1], ordered, strict=True)
        }
    return found


def _is_holder(holder: str, depths: Mapping[int, str]) -> bool:
    return max(depths) > 0 or holder.rpartition(".")[2] == "experts"


def take_apart(
    folder: Path, parameter: str, rank: int, a: torch.Tensor, b: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Both factors of every expert, by the name of its module.

    folder:    for messages.
    parameter: its full name.
    rank:      the rank of one expert.
    a:         ``[experts * rank, in]``; with as many rows as one expert has, A is shared by all.
    b:         ``[out, rank * experts]``; likewise with columns.

    Raises AdapterError if the shapes do not fit the rank.
    """
    if a.shape[0] % rank or b.shape[1] % rank:
        raise AdapterError(
            f"{folder}: {parameter} has factors of shape {tuple(a.shape)} and {tuple(b.shape)}, which rank "
            f"{rank} does not divide into experts"
        )
    stacked = b.reshape(b.shape[0], rank, -1).permute(2, 0, 1)
    return unstack(folder, parameter, rank, a.reshape(-1, rank, a.shape[1]), stacked)


def unstack(
    folder: Path, parameter: str, rank: int, a: torch.Tensor, b: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Both factors of every expert, by the name of its module.  One that all experts share is one tensor.

    folder:    for messages.
    parameter: its full name.
    rank:      the rank of one expert.
    a:         ``[experts, rank, in]``, or ``[1, rank, in]`` if it is shared by all.
    b:         ``[experts, out, rank]``, or ``[1, out, rank]``.

    Raises AdapterError if the shapes do not fit each other or the rank.
    """
    if (a.shape[1], b.shape[2]) != (rank, rank):
        raise AdapterError(
            f"{folder}: {parameter} has factors of shape {tuple(a.shape)} and {tuple(b.shape)}, "
            f"but {CONFIG_NAME} says rank {rank}"
        )
    count = max(len(a), len(b))
    if min(len(a), len(b)) not in (1, count):
        raise AdapterError(f"{folder}: {parameter} has {len(a)} experts in lora_A and {len(b)} in lora_B")
    each_a, each_b = ([x.contiguous() for x in stack] * (count // len(stack)) for stack in (a, b))
    return {f"{parameter}[{i}]": pair for i, pair in enumerate(zip(each_a, each_b, strict=True))}


def check_counts(folder: Path, counts: Mapping[str, int]) -> None:
    """Raise AdapterError if the stacks of one holder are of different numbers of experts.

    folder: for messages.
    counts: number of experts by the name of the parameter.
    """
    first: dict[str, str] = {}
    for parameter, count in counts.items():
        other = first.setdefault(parameter.rpartition(".")[0], parameter)
        if counts[other] != count:
            raise AdapterError(f"{folder}: {other} has {counts[other]} experts, and {parameter} has {count}")


def put_together(modules: Mapping[str, Factors]) -> dict[str, Factors]:
    """The modules as they are stored, with one pair of factors for all experts of a parameter.

    modules: factors by name.

    The pair of ``mlp.experts.w1``, ``w2`` and ``w3`` are stacks, as vLLM reads them, and that of any other
    parameter is PEFT's.  Experts of lower rank are filled up with zeros.  Raises AdapterError if an expert is
    missing, if experts do not share what a stack has once, if a holder has parameters of both forms, or if it
    is not known how PEFT nests its parameters.
    """
    experts = _experts(modules)
    stored = {name: factors for name, factors in modules.items() if not name.endswith("]")}
    holders: dict[str, list[str]] = {}
    for parameter in experts:
        holder, _, name = parameter.rpartition(".")
        holders.setdefault(holder, []).append(name)
    for holder, names in holders.items():
        stacks = [name for name in names if is_stack(f"{holder}.{name}")]
        if stacks and len(stacks) < len(names):
            raise AdapterError(
                f"{holder}: {listed(sorted(names))} are experts in two forms, which no reader takes together"
            )
        if stacks:
            stored |= {f"{holder}.{name}": _stack(f"{holder}.{name}", experts) for name in stacks}
            continue
        if len(names) > 1 and not set(names) <= set(IN_ORDER):
            raise AdapterError(f"{holder}: the order of the parameters {listed(sorted(names))} is not known")
        last_first = sorted(names, key=lambda name: IN_ORDER.index(name) if name in IN_ORDER else 0)[::-1]
        for depth, name in enumerate(last_first):
            parameter, place = f"{holder}.{name}", holder + ".base_layer" * depth
            if place in stored:
                raise AdapterError(f"{place} would be both a module and the parameter {parameter}")
            stored[place] = _joined(parameter, experts[parameter])
    return stored


def described(modules: Mapping[str, Factors]) -> tuple[dict[str, Factors], set[str]]:
    """One module for all experts of a parameter, of the largest rank and under the parameter's name.

    Returns it with the other modules, and the names of the parameters that PEFT wraps.
    """
    experts = _experts(modules)
    found = {name: factors for name, factors in modules.items() if not name.endswith("]")}
    found |= {name: max(each.values(), key=lambda f: f.rank) for name, each in experts.items()}
    return found, {name for name in experts if not is_stack(name)}


def is_stack(parameter: str) -> bool:
    """Whether the experts of a parameter are stored as stacks."""
    holder, _, name = parameter.rpartition(".")
    return name in SHARED and holder.rpartition(".")[2] == "experts"


def check_shared(parameter: str, experts: Iterable[Factors]) -> None:
    """Raise AdapterError unless all experts share, bit for bit, the factor that their stack has once."""
    side = SHARED[parameter.rpartition(".")[2]]
    first, *others = [f.a if side == "A" else f.b for f in experts]
    # Tensors of shapes alone, which are on the device meta, have nothing to compare.
    if not all(x is first or x.is_meta or torch.equal(bits(x), bits(first)) for x in others):
        raise AdapterError(
            f"{parameter}: each expert has its own lora_{side}, and vLLM takes one for all "
            "(--enable-moe-shared-loras); if all sources share it, so does a result of sum whose rank is not "
            f"cut, or of {', '.join(KEEPING)}"
        )


def _experts(modules: Mapping[str, Factors]) -> dict[str, dict[int, Factors]]:
    """The factors of all experts, by the name of their parameter and by number."""
    experts: dict[str, dict[int, Factors]] = {}
    for name, factors in modules.items():
        if name.endswith("]"):  # no other name does, and most adapters have no experts
            parameter, _, expert = name[:-1].rpartition("[")
            experts.setdefault(parameter, {})[int(expert)] = factors
    return experts


def _joined(parameter: str, experts: Mapping[int, Factors]) -> Factors:
    """The pair of all experts as PEFT stores it."""
    a, b, scaling = _stacks(parameter, experts)
    return Factors(a.reshape(-1, a.shape[2]), b.permute(1, 2, 0).reshape(b.shape[1], -1), scaling)


def _stack(parameter: str, experts: Mapping[str, Mapping[int, Factors]]) -> Factors:
    """The pair of all experts as vLLM stacks it."""
    a, b, scaling = _stacks(parameter, experts[parameter])
    check_shared(parameter, [Factors(x, y) for x, y in zip(a, b, strict=True)])
    shares_a = SHARED[parameter.rpartition(".")[2]] == "A"
    return Factors(a[:1], b, scaling) if shares_a else Factors(a, b[:1], scaling)


def _stacks(parameter: str, experts: Mapping[int, Factors]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A ``[experts, rank, in]``, B ``[experts, out, rank]`` and the scaling of all experts."""
    if sorted(experts) != list(range(len(experts))):
        absent = sorted(set(range(max(experts) + 1)) - set(experts))
        raise AdapterError(f"{parameter}: the factors of expert {listed(map(str, absent))} are missing")
    in_order = [experts[i] for i in range(len(experts))]
    if len({f.scaling for f in in_order}) > 1:
        raise AdapterError(f"{parameter}: the experts have different scalings, and their file has one")
    rank = max(f.rank for f in in_order)
    a = _stacked((f.a for f in in_order), lambda x: (rank, x.shape[1]))
    b = _stacked((f.b for f in in_order), lambda x: (x.shape[0], rank))
    return a, b, in_order[0].scaling


def _stacked(parts: Iterable[torch.Tensor], shape: Callable[[torch.Tensor], tuple[int, int]]) -> torch.Tensor:
    """The matrices behind each other, each filled up with zeros to a shape."""
    filled = []
    for part in parts:
        rows, columns = shape(part)
        filled.append(torch.nn.functional.pad(part, (0, columns - part.shape[1], 0, rows - part.shape[0])))
    return torch.stack(filled)
