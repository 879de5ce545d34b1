"""How merges get into the slots of vLLM's layers: written there by a backend, or copied from host memory.

The table of what is wrapped stands in ``table.py``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from vllm.lora import layers as lora_layers
from vllm.lora.layers import MergedColumnParallelLinearWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel

from merged_lora.backends import Slot, SlotBackend
from merged_lora.errors import PlanError, listed
from merged_lora.plan import MergePlan

logger = logging.getLogger("vllm.merged_lora")

ClassificationHead: Any = getattr(  # 0.33 made it the base of two kinds, 0.31 brought the first
    lora_layers, "BaseClassificationHeadWithLoRA", getattr(lora_layers, "ClassificationHeadWithLoRA", ())
)

KNOWN_LAYERS = frozenset(
    f"{name}WithLoRA"
    for name in (
        *("ClassificationHead", "ColumnParallelLinear", "LogitsProcessor", "MergedColumnParallelLinear"),
        *("MergedColumnParallelLinearVariableSlice", "MergedQKVParallelLinear", "QKVParallelLinear"),
        *("ReplicatedLinear", "RowParallelLinear", "TokenClassificationHead", "VocabParallelEmbedding"),
    )
) | {
    f"{name}WithShardedLoRA"
    for name in (
        *("ColumnParallelLinear", "MergedColumnParallelLinear", "MergedQKVParallelLinear"),
        *("QKVParallelLinear", "RowParallelLinear"),
    )
}
"""Classes of ``vllm.lora.layers`` that were read; one derived from them may keep more of an adapter."""

Begin = tuple[int, int]
"""Row and column of a tensor at which a part of it begins."""

Pair = tuple[torch.Tensor | None, torch.Tensor | None]
"""A and B of one module; None twice where an adapter lacks it."""


class Filling(Protocol):
    """Fills slots with one merge."""

    @property
    def layout(self) -> Layout:
        """Where the slots are."""
        ...

    def fill(self, index: int) -> None:
        """Write the merge into every layer of the model, over what the slot held before."""
        ...


def parts_of(packed: Mapping[str, list[str]], name: str) -> list[str]:
    """The modules that vLLM packs into this one, by their full names; itself where it packs none."""
    return packed.get(name) or [name]


def names_of(layers: Any, part: str) -> list[str]:
    """The names by which vLLM finds a module in an adapter.

    Since 0.33, an adapter of the text model alone fits a multimodal one, whose names have a prefix.
    """
    others = getattr(layers, "_get_text_lora_names", None)
    return [part, *(others(part) if others is not None else ())]


class Layout:
    """Where the layers of a model keep their adapters.

    direct: for each module of an adapter that a backend can write itself, by vLLM's name, its stacked slots
    ``[slots, 1, rank, in]`` and ``[slots, 1, out, rank]``.  others: layers that take whole tensors through
    vLLM's own code, because they are sharded or keep them in another form.  shards: of those, by name, the
    layers of which a backend on a device can write this rank's shard itself: where A and B of each of their
    modules begin.  left_to_vllm: layers of a kind that is not known here; vLLM's own activation empties them,
    or fills them.  parts: all modules of these.
    names: vLLM's for each module seen so far, by its own name and whether it is an embedding.  used: for
    slots whose content is known, the rank beyond which all is zero.
    """

    def __init__(self, layers: Any) -> None:
        self.direct: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.others: dict[str, Any] = {}
        self.left_to_vllm: dict[str, Any] = {}
        self.shards: dict[str, list[tuple[Begin, Begin]]] = {}
        self.parts: dict[str, None] = {}
        self.names: dict[tuple[str, bool], str] = {}
        self.used: dict[int, int] = {}
        self.packed: Mapping[str, list[str]] = layers.packed_modules
        self.dtype: torch.dtype = layers.lora_config.lora_dtype
        self._slots: dict[int, dict[str, Slot]] = {}
        self._sharded: dict[int, dict[str, Slot]] = {}
        self._layers = layers
        for name, layer in layers.modules.items():
            parts = parts_of(layers.packed_modules, name)
            self.parts |= dict.fromkeys(parts)
            if _is_direct(layer, len(parts)):
                slots = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
                self.direct |= dict(zip(parts, slots, strict=True))
            elif is_known(layer):
                self.others[name] = layer
                begins = _begins(layer, len(parts))
                if begins is not None:
                    self.shards[name] = begins
            else:
                self.left_to_vllm[name] = layer

    def check(self, lora: LoRAModel) -> None:
        """Raise PlanError where a merge holds what no backend can hand to vLLM: experts, for one."""
        inside = self.strangers(lora)
        if inside:
            raise PlanError(
                f"{listed(inside)} cannot be merged on a device; "
                "start the server with --merged-lora-backend cpu"
            )

    def strangers(self, lora: LoRAModel) -> list[str]:
        """The modules of an adapter that stand in layers of a kind which is not known here."""
        parts = {part for name in self.left_to_vllm for part in (name, *parts_of(self.packed, name))}
        inside = tuple(f"{name}." for part in parts for name in names_of(self._layers, part))
        return sorted(module for module in lora.loras if f"{module}.".startswith(inside))

    def found(self, lora: LoRAModel) -> dict[str, Any]:
        """An adapter's weights for each module that it has, before vLLM packs them."""
        found = {part: self._layers._get_lora_layer_weights(lora, part) for part in self.parts}
        return {part: weights for part, weights in found.items() if weights is not None}

    def at(self, index: int) -> dict[str, Slot]:
        """The slots of that index, one for every module in ``direct``."""
        if index not in self._slots:
            self._slots[index] = {
                part: Slot(a[index, 0], b[index, 0]) for part, (a, b) in self.direct.items()
            }
        return self._slots[index]

    def sharded_at(self, index: int) -> dict[str, Slot]:
        """The slots of that index of the modules of the layers in ``shards``."""
        if index not in self._sharded:
            self._sharded[index] = {
                part: Slot(a[index, 0], b[index, 0], begin_a=begin_a, begin_b=begin_b)
                for name, shards in self.shards.items()
                for part, a, b, (begin_a, begin_b) in zip(
                    parts_of(self.packed, name),
                    self.others[name].lora_a_stacked,
                    self.others[name].lora_b_stacked,
                    shards,
                    strict=True,
                )
            }
        return self._sharded[index]

    def set(self, name: str, index: int, pairs: Sequence[Pair]) -> None:
        """Let vLLM's own code take the factors of one of the other layers, a pair for each of its modules."""
        layer = self.others[name]
        if isinstance(layer, ClassificationHead):
            layer.reset_module_to_save(index)
        a, b = [a for a, _ in pairs], [b for _, b in pairs]
        if all(factor is None for factor in a):
            layer.reset_lora(index)
        elif name in self.packed:
            layer.set_lora(index, a, b)
        else:
            layer.set_lora(index, a[0], b[0])


def is_known(layer: Any) -> bool:
    """Whether a layer is of one of the classes that were read, not of one that is derived from them."""
    return type(layer).__module__.startswith("vllm.lora.layers.") and type(layer).__name__ in KNOWN_LAYERS


def _is_direct(layer: Any, parts: int) -> bool:
    """Whether setting this layer's adapter means no more than copying one pair of factors for each part."""
    return _copies(layer, parts) and layer.tp_size == 1


def _copies(layer: Any, parts: int) -> bool:
    """Whether setting this layer's adapter copies one pair of factors, or this rank's part, for each part."""
    copying = (BaseLinearLayerWithLoRA.set_lora, MergedColumnParallelLinearWithLoRA.set_lora)
    return (
        is_known(layer)
        and isinstance(layer, BaseLinearLayerWithLoRA)
        and not isinstance(layer, ClassificationHead)
        and type(layer).set_lora in copying
        and len(layer.lora_a_stacked) == len(layer.lora_b_stacked) == parts
        and all(
            slot.ndim == 4 and slot.shape[1] == 1 for slot in (*layer.lora_a_stacked, *layer.lora_b_stacked)
        )
    )


LARGE = 1 << 24
"""Rows, and columns, of a tensor that no shard of any layer reaches the end of."""


def _begins(layer: Any, parts: int) -> list[tuple[Begin, Begin]] | None:
    """Where this rank's part of A and B of each of a layer's modules begins, as vLLM cuts them.

    None where that is not one part of each, as large as the slot.
    """
    if not _copies(layer, parts):
        return None
    with torch.inference_mode(False):
        whole = [torch.empty(LARGE, LARGE, device="meta") for _ in range(parts)]
        if isinstance(layer, MergedColumnParallelLinearWithLoRA):
            pairs = zip(layer.slice_lora_a(list(whole)), layer.slice_lora_b(list(whole)), strict=True)
        else:
            pairs = zip([layer.slice_lora_a(whole[0])], [layer.slice_lora_b(whole[0])], strict=True)
        slots = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
        begins = []
        for x, (a, b), (slot_a, slot_b) in zip(whole, pairs, slots, strict=True):
            begin_a, begin_b = _begin(x, a, slot_a), _begin(x, b, slot_b)
            if begin_a is None or begin_b is None:
                return None
            begins.append((begin_a, begin_b))
    return begins


def _begin(whole: torch.Tensor, part: torch.Tensor, slot: torch.Tensor) -> Begin | None:
    """Row and column at which a view of ``whole`` begins; None where it is none, or no slot full."""
    fits = all(x in (y, LARGE) for x, y in zip(part.shape, slot.shape[2:], strict=True))
    if not fits or not (part is whole or part._base is whole) or part.stride() != whole.stride():
        return None
    row, column = divmod(int(part.storage_offset()), LARGE)
    return row, column


@dataclass(frozen=True, eq=False)
class DeviceFilling:
    """Fills slots with one merge that a backend makes there.

    modules: the plan's module for each module of vLLM's that it holds.
    """

    backend: SlotBackend
    plan: MergePlan
    layout: Layout
    modules: Mapping[str, str]

    def fill(self, index: int) -> None:
        """Write the merge into every layer of the model, over what the slot held before."""
        start = time.perf_counter()
        slots, empty = self._slots(index)
        self.backend.write(self.plan, slots, empty)
        others = self._others()
        for name in others:
            self._hand_over(name, index)
        logger.debug(
            "slot %d: %d modules of %s written, %d layers set, in %.1f ms",
            index,
            len(slots),
            self.plan.spec,
            len(others),
            (time.perf_counter() - start) * 1e3,
        )

    def compile(self) -> None:
        """Compile what :meth:`fill` will launch, so that no step of the engine has to wait for it."""
        self.backend.compile(self.plan, *self._slots(0))
        for name in self._others():
            whole = {module: self._empty(module) for module in self._held(name) if module is not None}
            if whole:
                self.backend.compile(self.plan, whole)

    def _slots(self, index: int) -> tuple[dict[str, Slot], list[Slot]]:
        """Slots by the plan's modules, and those of modules that the merge lacks."""
        slots, empty = {}, []
        for part, slot in (self.layout.at(index) | self.layout.sharded_at(index)).items():
            if part in self.modules:
                slots[self.modules[part]] = slot
            else:
                empty.append(slot)
        return slots, empty

    def _others(self) -> list[str]:
        """The layers that take whole tensors through vLLM's own code."""
        return [name for name in self.layout.others if name not in self.layout.shards]

    def _held(self, name: str) -> list[str | None]:
        """The plan's modules that one layer takes, in its order; None where the merge lacks one."""
        return [self.modules.get(part) for part in parts_of(self.layout.packed, name)]

    def _hand_over(self, name: str, index: int) -> None:
        """Merge one layer into tensors of its own and let vLLM take them."""
        held = self._held(name)
        whole = {module: self._empty(module) for module in held if module is not None}
        if whole:
            self.backend.write(self.plan, whole)
        pairs: list[Pair] = [(whole[m].a, whole[m].b) if m is not None else (None, None) for m in held]
        self.layout.set(name, index, pairs)

    def _empty(self, module: str) -> Slot:
        """A slot as large as the result, because vLLM shards and transposes what it is given."""
        shapes = [shape for shape, _ in self.plan.modules[module].results]
        dtype, device = self.layout.dtype, self.backend.device
        return Slot(*(torch.empty(shape, dtype=dtype, device=device) for shape in shapes))


@dataclass(frozen=True, eq=False)
class HostFilling:
    """Fills slots with one merge that lies in host memory, where vLLM's slots do too.

    weights: vLLM's own, for each of its modules that the merge has.
    """

    layout: Layout
    weights: Mapping[str, Any]

    def fill(self, index: int) -> None:
        """Copy the merge into every layer of the model, over what the slot held before."""
        used = self.layout.used.pop(index, None)  # unknown, should this fail halfway
        rests, targets, factors = [], [], []
        for part, slot in self.layout.at(index).items():
            weights = self.weights.get(part)
            # Read off the tensor: before 0.32, vLLM's own word for the rank may be wrong.
            rank = weights.lora_a.shape[0] if weights is not None else 0
            if used is None or rank < used:
                rests += [slot.a[rank:used], slot.b[:, rank:used]]
            if weights is not None:
                targets += [slot.a[:rank], slot.b[:, :rank]]
                factors += [weights.lora_a, weights.lora_b]
        if rests:
            torch._foreach_zero_(rests)
        if targets:
            torch._foreach_copy_(targets, factors)
        ranks = (weights.lora_a.shape[0] for weights in self.weights.values())
        self.layout.used[index] = max(ranks, default=0)
        for name in self.layout.others:
            self.layout.set(name, index, list(self._pairs(name)))

    def _pairs(self, name: str) -> Iterator[Pair]:
        for part in parts_of(self.layout.packed, name):
            weights = self.weights.get(part)
            yield (weights.lora_a, weights.lora_b) if weights is not None else (None, None)
