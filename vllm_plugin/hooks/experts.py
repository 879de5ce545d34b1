"""Experts of a mixture: from the modules of an adapter to those that vLLM's layers for experts take.

An adapter has the modules of an expert apart (``mlp.experts.3.gate_proj``), or those of all experts in the
parameters of transformers, of which each expert is a module here (``mlp.experts.gate_up_proj[3]``; see
``merged_lora/files/experts.py``).  Some models of vLLM take the first form, and some the second.  With
``--enable-moe-shared-loras`` all take parameters w1, w2 and w3, of which experts share a factor.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA

from merged_lora.errors import AdapterError, PlanError, listed
from merged_lora.factors import Factors
from merged_lora.files.experts import SHARED, check_shared

from .names import ModelNames

GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
"""Parameters of transformers that hold all experts."""

_EXPERT = re.compile(r"(?P<holder>.+)\.(?P<parameter>\w+)\[(?P<number>\d+)\]")


@dataclass(frozen=True)
class ExpertSlots:
    """What a layer of vLLM takes of an adapter's experts.

    layer:       its name.
    count:       number of experts, over all ranks.
    shapes:      shape ``(out, in)`` of each module of one expert, by the parameter that it belongs to.
    parts:       names of the modules of every expert, in the order of ``shapes``; empty if the layer takes
                 parameters.
    interleaved: whether the rows of gate and up alternate in their parameter.
    shared:      whether the parameters are those of ``SHARED``, of which all experts share a factor.
    """

    layer: str
    count: int
    shapes: tuple[tuple[str, tuple[int, int]], ...]
    parts: tuple[str, ...]
    interleaved: bool
    shared: bool

    @classmethod
    def of(cls, layers: Any, name: str) -> ExpertSlots | None:
        """What a layer of one of vLLM's managers takes; None if it has no experts that take LoRA."""
        layer = layers.modules[name]
        if not isinstance(layer, FusedMoEWithLoRA):
            return None
        config, shared = layer.moe_config, layer.enable_moe_shared_loras
        if shared and not config.is_act_and_mul:
            return None  # vLLM wants factors of w3 that such a layer does not have
        inner = config.intermediate_size_per_partition_unpadded * layer.tp_size
        up, down = (inner, config.hidden_dim), (config.hidden_dim, inner)
        parts = () if shared else tuple(layers.packed_modules.get(name, ()))
        if shared:
            shapes: tuple[Any, ...] = tuple((each, down if each == "w2" else up) for each in SHARED)
        elif isinstance(layer, FusedMoE3DWithLoRA):
            shapes = ((GATE_UP, (2 * inner, config.hidden_dim)), (DOWN, down))
        elif config.is_act_and_mul:
            shapes = (GATE_UP, up), (DOWN, down), (GATE_UP, up)
        else:
            shapes = (UP, up), (DOWN, down)
        interleaved = "GptOssForCausalLM" in (layers.model.config.architectures or ())
        return cls(name, layer.global_num_experts, shapes, parts, interleaved, shared)

    def takes(self, parameter: str, number: int) -> bool:
        """Whether a parameter's expert is one of the layer's."""
        return number < self.count and parameter in dict(self.shapes)

    def modules(self, parameter: str, number: int, factors: Factors) -> dict[str, Factors]:
        """The modules of one expert of a parameter, by the names that the layer takes.

        Where it takes gate and up apart, they share A, and each has its rows of B.
        """
        if not self.parts:
            return {f"{self.layer}.{parameter}[{number}]": factors}
        own = [i for i, (owner, _) in enumerate(self.shapes) if owner == parameter]
        if len(own) == 1:
            halves = [factors.b]
        elif self.interleaved:
            halves = [factors.b[0::2], factors.b[1::2]]
        else:
            halves = list(factors.b.tensor_split(2))
        parts = self.parts[number * len(self.shapes) :]
        return {parts[i]: replace(factors, b=b.contiguous()) for i, b in zip(own, halves, strict=True)}


def expert_of(name: str) -> tuple[str, str, int] | None:
    """Holder, parameter and number of an expert of a parameter of transformers; None for any other module."""
    match = _EXPERT.fullmatch(name)
    return (match["holder"], match["parameter"], int(match["number"])) if match is not None else None


def expert_slots(slots: Mapping[str, ExpertSlots], names: ModelNames, name: str) -> ExpertSlots | None:
    """The slots for a module of an adapter that is an expert of a parameter; None if the model has none."""
    expert = expert_of(name)
    found = slots.get(names.module(expert[0]) or "") if expert is not None else None
    return found if found is not None and expert is not None and found.takes(*expert[1:]) else None


def completed(
    slots: Mapping[str, ExpertSlots], names: ModelNames, modules: Mapping[str, Factors], limit: int
) -> dict[str, Factors]:
    """The modules of a merge, with those of experts as vLLM's layers take them.

    slots:   by the name of the layer.
    names:   of the model's modules in adapters.
    modules: of the merge.
    limit:   largest rank.

    vLLM ends with an error, in a step, if a layer has some experts of an adapter and not all, or if their
    ranks differ.  What is missing is zero here, and lower ranks are filled up with zeros.  Raises PlanError
    if an expert is there twice, does not fit, or exceeds the largest rank.
    """
    result: dict[str, Factors] = {}
    found: dict[str, dict[str, Factors]] = {}
    spelled: dict[str, str] = {}
    owners = {part: layer for layer, each in slots.items() for part in each.parts}
    for name, factors in modules.items():
        expert, layer = expert_of(name), owners.get(names.module(name) or "")
        if expert is not None:
            taking = expert_slots(slots, names, name)
            if taking is None:
                raise PlanError(f"the model has no experts {name} that take LoRA")
            layer, new = taking.layer, taking.modules(*expert[1:], factors)
            spelled.setdefault(layer, expert[0])
        elif layer is not None:
            new = {names.parts(name)[0]: factors}
        else:
            result[name] = factors
            continue
        _add(found.setdefault(layer, {}), new)
    for layer, given in found.items():
        for module, factors in _filled(slots[layer], given, limit).items():
            if slots[layer].parts:
                result[names.spelling(module, module)] = factors
            else:
                result[names.spelling(layer, spelled[layer]) + module[len(layer) :]] = factors
    return result


def _add(given: dict[str, Factors], new: Mapping[str, Factors]) -> None:
    """Add modules of experts to those of their layer; raises PlanError if one is there already."""
    twice = given.keys() & new.keys()
    if twice:
        raise PlanError(
            f"{listed(sorted(twice))} {'is' if len(twice) == 1 else 'are'} in one source with the other "
            "experts in one parameter, and in another source apart; such sources cannot be merged"
        )
    given |= new


def _filled(slots: ExpertSlots, given: Mapping[str, Factors], limit: int) -> dict[str, Factors]:
    """All modules of all experts of a layer, of one rank for each kind of them, and zero if not given."""
    like = next(iter(given.values()))
    filled: dict[str, Factors] = {}
    for i, (parameter, (out, width)) in enumerate(slots.shapes):
        wanted = slots.parts[i :: len(slots.shapes)] or [
            f"{slots.layer}.{parameter}[{number}]" for number in range(slots.count)
        ]
        for module in wanted:
            factors = given.get(module)
            if factors is not None and factors.shape != (out, width):
                raise PlanError(
                    f"{module} has shape {(out, width)} in the model, another one in the adapters"
                )
            if factors is not None and factors.rank > limit:
                raise PlanError(
                    f"{module} has rank {factors.rank} in the adapter, the limit is {limit} (--max-lora-rank)"
                )
        rank = max((given[module].rank for module in wanted if module in given), default=1)
        known = {module: _of_rank(given[module], rank) for module in wanted if module in given}
        nothing = Factors(like.a.new_zeros(rank, width), like.b.new_zeros(out, rank))
        if slots.shared and known:
            nothing = _shared(f"{slots.layer}.{parameter}", known.values(), nothing)
        filled |= {module: known.get(module, nothing) for module in wanted}
    return filled


def _shared(parameter: str, experts: Collection[Factors], nothing: Factors) -> Factors:
    """An expert that shares a factor with the others, and has zeros for the other one.

    Raises PlanError if the others do not share it: vLLM would take that of the first one for all.
    """
    try:
        check_shared(parameter, experts)
    except AdapterError as error:
        raise PlanError(str(error)) from None
    first = next(iter(experts))
    shares_a = SHARED[parameter.rpartition(".")[2]] == "A"
    return replace(first, b=nothing.b) if shares_a else replace(first, a=nothing.a)


def _of_rank(factors: Factors, rank: int) -> Factors:
    """The same delta with factors of a larger rank."""
    if factors.rank == rank:
        return factors
    more = rank - factors.rank
    a = torch.nn.functional.pad(factors.a, (0, 0, 0, more))
    return replace(factors, a=a, b=torch.nn.functional.pad(factors.b, (0, more)))
