"""How an adapter, or a merge, becomes what vLLM holds of it in a worker.

The table of what is wrapped stands in ``table.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.layers.linear import QKVParallelLinear

from merged_lora.adapters import Adapter
from merged_lora.backends import SlotBackend
from merged_lora.errors import PlanError, listed
from merged_lora.peft_files import config_of, tensors_of
from merged_lora.plan import MergePlan
from merged_lora.vllm_plugin.worker.makers import outline

from .slots import DeviceFilling, HostFilling, Layout, names_of, parts_of
from .wrapping import ATTRIBUTE


def host_model(manager: Any, number: int, adapter: Adapter) -> LoRAModel:
    """The adapter as vLLM holds it, in host memory; raises PlanError where it does not fit the model.

    Where vLLM's slots are in host memory too, it also holds what fills them all at once, which takes less
    time than vLLM's way, layer by layer.
    """
    if manager.device.type != "cpu":
        return lora_model(manager, number, adapter, "cpu")
    layers = manager._adapter_manager
    if any(factors.embedding for factors in adapter.modules.values()) or _skips(layers):
        lora = lora_model(manager, number, adapter, "cpu")
    else:  # the same, without looking at every name again
        named, dtype = _names(layers, adapter), manager.lora_config.lora_dtype
        weights = {
            named[name]: LoRALayerWeights(
                named[name], f.rank, f.rank, f.a.to(dtype), f.b.to(dtype), f.scaling
            )
            for name, f in adapter.modules.items()
        }
        lora = manager._lora_model_cls(number, adapter.rank, weights)
        check_fit(layers, lora)
    layout = _layout(layers)
    if not layout.strangers(lora):
        setattr(lora, ATTRIBUTE, HostFilling(layout, layout.found(lora)))
    return lora


def slot_model(manager: Any, backend: SlotBackend, number: int, plan: MergePlan) -> LoRAModel:
    """The merge as vLLM holds it: shapes, and what fills its slot.

    Tensors without values go through all of vLLM's own checks and packing, and take no memory.  Raises
    PlanError where the merge does not fit the model.
    """
    outlines = {name: outline(module) for name, module in plan.modules.items()}
    adapter = Adapter(outlines, plan.header)
    lora = lora_model(manager, number, adapter, "meta")
    layers = manager._adapter_manager
    layout = _layout(layers)
    layout.check(lora)
    ours = {theirs: name for name, theirs in _names(layers, adapter).items()}
    modules = {part: ours[weights.module_name] for part, weights in layout.found(lora).items()}
    setattr(lora, ATTRIBUTE, DeviceFilling(backend, plan, layout, modules))
    return lora


def compile_filling(lora: LoRAModel) -> None:
    """Compile what filling a slot with a merge of :func:`slot_model` will launch."""
    filling: DeviceFilling = getattr(lora, ATTRIBUTE)
    filling.compile()


def _layout(layers: Any) -> Layout:
    layout: Layout | None = getattr(layers, ATTRIBUTE, None)
    if layout is None:  # made late, because vLLM makes the layers after their manager
        layout = Layout(layers)
        setattr(layers, ATTRIBUTE, layout)
    return layout


def _names(layers: Any, adapter: Adapter) -> dict[str, str]:
    """vLLM's name for each module of an adapter."""
    known: dict[tuple[str, bool], str] = _layout(layers).names
    mapper = _mapper(layers.model)
    found = {}
    for name, factors in adapter.modules.items():
        key = name, factors.embedding
        if key not in known:
            known[key] = parse_fine_tuned_lora_name(next(iter(tensors_of({name: factors}))), mapper)[0]
        found[name] = known[key]
    return found


def _skips(layers: Any) -> Any:
    return getattr(layers.model, "lora_skip_prefixes", None)


def lora_model(manager: Any, number: int, adapter: Adapter, device: str) -> LoRAModel:
    """The adapter as vLLM makes it of tensors; raises PlanError where it does not fit the model."""
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
        weights_mapper=_mapper(layers.model),
        skip_prefixes=_skips(layers),
    )
    check_fit(layers, lora)
    return lora


def _mapper(model: Any) -> Any:
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return mapper.get_rename_mapper() if mapper is not None else None


def check_fit(layers: Any, lora: LoRAModel) -> None:
    """Raise PlanError for modules the model does not have, or has in another shape, or of too large a rank.

    vLLM finds most of this only when it copies an adapter into a slot, in a step.
    """
    limit: int = layers.lora_config.max_lora_rank
    packed: Mapping[str, list[str]] = layers.packed_modules_mapping
    kinds = {part for kind in layers.supported_lora_modules for part in packed.get(kind) or [kind]}
    strangers = sorted(name for name in lora.loras if name.rsplit(".", 1)[-1] not in kinds)
    if strangers:
        raise PlanError(f"the model has no module {listed(strangers)} that takes LoRA")
    for name, layer in layers.modules.items():
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
                f"{name} keeps {len(parts)} modules in {len(shapes)} slices; such a layer takes no merge"
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


def _check_name(layers: Any, lora: LoRAModel, part: str) -> None:
    """Raise PlanError where two modules of an adapter are this one of the model: vLLM takes the first."""
    found = [name for name in names_of(layers, part) if lora.check_lora_name(name)]
    if len(found) > 1:
        raise PlanError(
            f"{listed(found)} are one module of the model; all sources of a merge must name it alike"
        )


def _shapes(layer: Any, count: int) -> list[tuple[int, int]] | None:
    """Shapes ``(out, in)`` of the deltas that a layer takes, over all ranks; None where they are unknown."""
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
        if isinstance(base, QKVParallelLinear) and len(outs) == 3:  # its own sizes count copies of K and V
            heads, kv_heads = base.total_num_heads, base.total_num_kv_heads
            outs = [heads * base.head_size, kv_heads * base.head_size, kv_heads * base.v_head_size]
    if count == 1:
        outs = [sum(outs)]
    return [(out, width) for out in outs]


def largest_adapter(layers: Any) -> tuple[int, int]:
    """How many modules of the model take LoRA, and the bytes of an adapter of all of them, over all ranks.

    Of the rank ``--max-lora-rank`` and in the dtype of vLLM's slots.
    """
    rank, dtype = layers.lora_config.max_lora_rank, layers.lora_config.lora_dtype
    shapes = [
        shape
        for name, layer in layers.modules.items()
        for shape in _shapes(layer, len(parts_of(layers.packed_modules, name))) or ()
    ]
    return len(shapes), sum(rank * (out + width) for out, width in shapes) * dtype.itemsize


def _is_padded(layer: Any, given: tuple[int, int], slot: tuple[int, int]) -> bool:
    """Whether an adapter's output head has fewer tokens than vLLM's, which vLLM fills up."""
    return isinstance(layer, LogitsProcessorWithLoRA) and given[0] < slot[0] and given[1] == slot[1]
