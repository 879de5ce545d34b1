"""From an adapter or a merge to the ``LoRAModel`` that vLLM holds in a worker.

``table.py`` lists the functions of vLLM that are wrapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.layers.linear import QKVParallelLinear

from merged_lora.adapters import Adapter
from merged_lora.backends import SlotBackend, StagedMerge
from merged_lora.calibration import Calibration
from merged_lora.errors import PlanError, listed
from merged_lora.factors import Factors
from merged_lora.files.writing import config_of, tensors_of
from merged_lora.plan import MergePlan
from merged_lora.vllm_plugin.worker.makers import outline

from .experts import completed, expert_of, expert_slots
from .names import names_of, parts_of
from .slots import DeviceSlotWriter, HostSlotWriter, SlotMap
from .wrapping import ATTRIBUTE

SHAPES = 64
"""Number of sets of shapes that are known to fit the model."""


def host_model(manager: Any, number: int, adapter: Adapter) -> LoRAModel:
    """The merge as vLLM holds it in host memory; raises PlanError if it does not fit the model.

    If vLLM's slots are in host memory too, a writer that fills all of them at once is attached: that takes
    less time than vLLM's way, layer by layer.
    """
    layers = manager._adapter_manager
    adapter = _with_experts(layers, adapter)
    if manager.device.type != "cpu":
        return lora_model(manager, number, adapter, "cpu")
    experts = any(expert_of(name) for name in adapter.modules)
    if experts or any(factors.embedding for factors in adapter.modules.values()) or _skips(layers):
        lora = lora_model(manager, number, adapter, "cpu")
    else:  # the same, without mapping every name again
        named, modules = _names(layers, adapter.modules), adapter.modules.values()
        dtype, direct = manager.lora_config.lora_dtype, slot_map_of(layers).direct

        def converted(x: torch.Tensor, theirs: str) -> torch.Tensor:
            # Our copy into a slot converts as well, and a conversion to a larger dtype takes memory and time.
            return x if theirs in direct and x.itemsize <= dtype.itemsize else x.to(dtype)

        weights = {
            theirs: LoRALayerWeights(
                theirs, f.rank, f.rank, converted(f.a, theirs), converted(f.b, theirs), f.scaling
            )
            for theirs, f in zip(named.values(), modules, strict=True)
        }
        lora = manager._lora_model_cls(number, adapter.rank, weights)
        # Merges of the same adapters differ in their values alone, and either all of them fit or none.
        shapes = tuple([(theirs, *f.kind) for theirs, f in zip(named.values(), modules, strict=True)])
        if slot_map_of(layers).fitting.use(shapes) is None:
            check_fit(layers, lora)
            slot_map_of(layers).fitting.add(shapes, True, SHAPES)
    slot_map = slot_map_of(layers)
    if not slot_map.unsupported_modules(lora):
        setattr(lora, ATTRIBUTE, HostSlotWriter(slot_map, slot_map.weights_of(lora)))
    return lora


def slot_model(manager: Any, number: int, plan: MergePlan) -> LoRAModel:
    """The merge as vLLM holds it until it is activated: shapes without values.

    Tensors on the device ``meta`` go through all of vLLM's own checks and packing, and take no memory.
    Raises PlanError if the merge does not fit the model.
    """
    outlines = {name: outline(module) for name, module in plan.modules.items()}
    layers = manager._adapter_manager
    lora = lora_model(manager, number, _with_experts(layers, Adapter(outlines, plan.header)), "meta")
    slot_map_of(layers).check(lora)
    return lora


def _with_experts(layers: Any, merged: Adapter) -> Adapter:
    """A merge with the modules of experts as vLLM's layers take them."""
    slot_map = slot_map_of(layers)
    if not slot_map.experts:
        return merged
    limit = layers.lora_config.max_lora_rank
    modules = completed(slot_map.experts, slot_map.names, merged.modules, limit)
    return Adapter(modules, merged.header, merged.metadata)


def attach_slot_writer(manager: Any, backend: SlotBackend, lora: LoRAModel, staged: StagedMerge) -> None:
    """Give a merge of :func:`slot_model` its values, and compile the kernels that write it into a slot."""
    layers = manager._adapter_manager
    slot_map = slot_map_of(layers)
    ours = {theirs: name for name, theirs in _names(layers, staged.modules).items()}
    modules = {part: ours[weights.module_name] for part, weights in slot_map.weights_of(lora).items()}
    writer = DeviceSlotWriter(backend, staged, slot_map, modules)
    writer.compile()
    setattr(lora, ATTRIBUTE, writer)


def slot_map_of(layers: Any) -> SlotMap:
    """The slots of the layers of one of vLLM's managers; made at the first call, when a worker starts."""
    slot_map: SlotMap | None = getattr(layers, ATTRIBUTE, None)
    if slot_map is None:
        slot_map = SlotMap(layers)
        setattr(layers, ATTRIBUTE, slot_map)
    return slot_map


def _names(layers: Any, modules: Mapping[str, Factors]) -> dict[str, str]:
    """vLLM's name for each module of an adapter."""
    names = slot_map_of(layers).names
    return {name: names.theirs(name) for name in modules}


def _skips(layers: Any) -> Any:
    return getattr(layers.model, "lora_skip_prefixes", None)


def fitted_adapter(layers: Any, adapter: Adapter) -> Adapter:
    """The adapter with the modules of the model, each under the one name that all adapters get for it.

    So adapters that name a module differently are merged there as they should be.  A module in one piece that
    vLLM has in several is split.  Raises PlanError if a module is none of the model's that takes LoRA, which
    vLLM ignores without a word, or if two are the same one.
    """
    names = slot_map_of(layers).names
    modules: dict[str, Factors] = {}
    origins: dict[str, list[str]] = {}
    unsupported = []
    for name, factors in adapter.modules.items():
        fitted = _fitted(layers, name, factors)
        if not fitted and not names.is_unused(name):
            unsupported.append(name.partition("[")[0])
        for new, part in (fitted or {name: factors}).items():
            if new in modules:
                (other,) = (old for old, news in origins.items() if new in news)
                raise PlanError(f"{other} and {name} are one module of the model")
            modules[new] = part
            origins.setdefault(name, []).append(new)
    if unsupported:
        raise PlanError(
            f"the model has no module {listed(dict.fromkeys(unsupported))} that takes LoRA; make a copy of "
            "the adapter without, with merged-lora merge and --without PATTERN"
        )
    if modules.keys() == adapter.modules.keys():
        return adapter
    known = adapter.calibration.inputs if isinstance(adapter.calibration, Calibration) else {}
    return adapter.renamed(modules, {name: _spellings(layers, name) or [name] for name in known} | origins)


def _fitted(layers: Any, name: str, factors: Factors) -> dict[str, Factors]:
    """The modules of the model that a module of an adapter is, by their names; empty if there are none.

    The parts of a module that is split share A, and each has its rows of B.  Raises PlanError if there are
    not as many rows as the parts have.
    """
    spellings = _spellings(layers, name)
    if len(spellings) <= 1:
        return dict.fromkeys(spellings, factors)
    slot_map = slot_map_of(layers)
    shapes = _shapes(slot_map.layers.get(slot_map.names.module(name) or ""), len(spellings)) or ()
    outs = [out for out, _ in shapes]
    if len(outs) != len(spellings) or sum(outs) != factors.shape[0]:
        raise PlanError(
            f"{name} has {factors.shape[0]} rows, which are not those of {listed(spellings)} in the model"
        )
    rows = zip(spellings, torch.split_with_sizes(factors.b, outs), strict=True)
    return {new: replace(factors, b=b.contiguous()) for new, b in rows}


def _spellings(layers: Any, name: str) -> list[str]:
    """The names that a module of an adapter gets: its own one, or those of its parts; empty if it is none.

    An expert of a parameter of transformers stays one, also where vLLM has its modules apart.
    """
    slot_map = slot_map_of(layers)
    names, parts = slot_map.names, slot_map.names.parts(name)
    expert = expert_of(name)
    if expert is not None:
        holder = expert[0]
        slots = expert_slots(slot_map.experts, names, name)
        return [names.spelling(slots.layer, holder) + name[len(holder) :]] if slots is not None else []
    module = names.module(name) or ""
    slots = slot_map.experts.get(module) or slot_map.experts.get(module.rpartition(".")[0])
    if slots is not None and not slots.parts:
        return []  # a parameter, which has no factors besides those of its experts
    if len(parts) == 1:
        return [names.spelling(parts[0], name)]
    prefix = name.rpartition(".")[0]
    return [names.spelling(part, f"{prefix}.{part.rpartition('.')[2]}") for part in parts]


def lora_model(manager: Any, number: int, adapter: Adapter, device: str) -> LoRAModel:
    """The adapter as vLLM builds it from tensors; raises PlanError if it does not fit the model."""
    layers = manager._adapter_manager
    config = {k: v for k, v in config_of(adapter.modules, adapter.header).items() if v is not None}
    helper = PEFTHelper.from_dict({**config, "vllm_max_position_embeddings": manager.max_position_embeddings})
    try:
        helper.validate_legal(manager.lora_config)
    except ValueError as error:
        raise PlanError(str(error)) from None
    lora: LoRAModel = manager._lora_model_cls.from_lora_tensors(
        number,
        tensors_of(adapter.modules),
        helper,
        device=device,
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=slot_map_of(layers).names.mapper,
        skip_prefixes=_skips(layers),
    )
    check_fit(layers, lora)
    return lora


def check_fit(layers: Any, lora: LoRAModel) -> None:
    """Raise PlanError for a module that the model lacks or has in another shape, or of too large a rank.

    vLLM notices most of this only when it copies an adapter into a slot, during a step.
    """
    limit: int = layers.lora_config.max_lora_rank
    packed: Mapping[str, list[str]] = layers.packed_modules_mapping
    kinds = {part for kind in layers.supported_lora_modules for part in packed.get(kind) or [kind]}
    if "experts" in layers.supported_lora_modules:
        kinds |= {"experts", "experts.base_layer"}
    unsupported = sorted(name for name in lora.loras if _kind(name) not in kinds)
    if unsupported:
        raise PlanError(f"the model has no module {listed(unsupported)} that takes LoRA")
    # Not vLLM's own list, of which a step takes layers out while another thread checks an adapter.
    for name, layer in slot_map_of(layers).layers.items():
        parts = parts_of(layers.packed_modules, name)
        found = [layers._get_lora_layer_weights(lora, part) for part in parts]
        for part, weights in zip(parts, found, strict=True):
            if weights is not None:
                _check_name(layers, lora, part)
        shapes = _shapes(layer, len(parts)) if any(weights is not None for weights in found) else None
        if shapes is None:
            continue
        if len(shapes) != len(parts):
            raise PlanError(
                f"{name} stores {len(parts)} modules in {len(shapes)} slices; such a layer takes no merge"
            )
        for part, weights, (out, width) in zip(parts, found, shapes, strict=True):
            if weights is None:
                continue
            if weights.lora_a.shape[0] > limit or weights.lora_b.shape[1] > limit:
                raise PlanError(
                    f"{part} has rank {weights.lora_a.shape[0]} in the adapter, the limit is {limit} "
                    "(--max-lora-rank)"
                )
            given = weights.lora_b.shape[0], weights.lora_a.shape[1]
            if given != (out, width) and not _is_padded(layer, given, (out, width)):
                raise PlanError(f"{part} has shape {(out, width)} in the model, another one in the adapters")


def _kind(name: str) -> str:
    """The end of a module's name by which vLLM knows whether it takes LoRA."""
    start = name.find(".experts")
    return name[start + 1 :] if start >= 0 else name.rpartition(".")[2]


def _check_name(layers: Any, lora: LoRAModel, part: str) -> None:
    """Raise PlanError if two modules of an adapter are the same one of the model: vLLM takes the first."""
    found = [name for name in names_of(layers, part) if lora.check_lora_name(name)]
    if len(found) > 1:
        raise PlanError(
            f"{listed(found)} are one module of the model; all sources of a merge must name it alike"
        )


def _shapes(layer: Any, count: int) -> list[tuple[int, int]] | None:
    """Shapes ``(out, in)`` of the deltas that a layer takes, over all ranks; None if they are unknown."""
    if isinstance(layer, VocabParallelEmbeddingWithLoRA):
        return [(layer.lora_b_stacked.shape[-2], layer.lora_a_stacked.shape[1])]
    if isinstance(layer, LogitsProcessorWithLoRA):
        return [(layer.lora_b_stacked.shape[-2], layer.lora_a_stacked.shape[-1])]
    if not isinstance(layer, BaseLinearLayerWithLoRA):
        return None
    base = layer.base_layer
    if layer.tp_size == 1:
        outs = [slot.shape[-2] for slot in layer.lora_b_stacked]
        width = layer.lora_a_stacked[0].shape[-1]
    else:
        outs, width = getattr(base, "output_sizes", [base.output_size]), base.input_size
        if isinstance(base, QKVParallelLinear) and len(outs) == 3:  # output_sizes counts copies of K and V
            heads, kv_heads = base.total_num_heads, base.total_num_kv_heads
            outs = [heads * base.head_size, kv_heads * base.head_size, kv_heads * base.v_head_size]
    if count == 1:
        outs = [sum(outs)]
    return [(out, width) for out in outs]


def largest_adapter(layers: Any) -> tuple[int, int]:
    """The number of modules that take LoRA, and the bytes of an adapter of all of them, over all ranks.

    The adapter has the rank ``--max-lora-rank`` and the dtype of vLLM's slots.
    """
    rank, dtype = layers.lora_config.max_lora_rank, layers.lora_config.lora_dtype
    shapes = [
        shape
        for name, layer in layers.modules.items()
        for shape in _shapes(layer, len(parts_of(layers.packed_modules, name))) or ()
    ]
    for slots in slot_map_of(layers).experts.values():
        shapes += [shape for _, shape in slots.shapes] * slots.count
    return len(shapes), sum(rank * (out + width) for out, width in shapes) * dtype.itemsize


def _is_padded(layer: Any, given: tuple[int, int], slot: tuple[int, int]) -> bool:
    """Whether this is an output head for fewer tokens than vLLM's: vLLM pads it."""
    return isinstance(layer, LogitsProcessorWithLoRA) and given[0] < slot[0] and given[1] == slot[1]
