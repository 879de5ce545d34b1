"""The slots of vLLM's layers, and how a merge is written or copied into them.

``table.py`` lists the functions of vLLM that are wrapped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from vllm.lora import layers as lora_layers
from vllm.lora.layers import MergedColumnParallelLinearWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel

from merged_lora.backends import Slot, SlotBackend, StagedMerge
from merged_lora.errors import PlanError, listed
from merged_lora.lru import Lru

from .experts import ExpertSlots
from .names import ModelNames, names_of, parts_of
from .versions import named, since

logger = logging.getLogger("vllm.merged_lora")

CLASSIFICATION_HEAD = since(
    {"0.30": None, "0.31": "ClassificationHeadWithLoRA", "0.33": "BaseClassificationHeadWithLoRA"}
)
ClassificationHead: Any = named(lora_layers, CLASSIFICATION_HEAD) if CLASSIFICATION_HEAD else ()
"""Class of the layers that hold a whole classification head for each adapter; ``()`` if there are none."""

SUPPORTED_LAYERS = frozenset(
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
"""Classes of ``vllm.lora.layers`` that are supported; one derived from them may store more of an adapter."""

REGIONS = 64
"""Number of :class:`Regions` that are kept: usually one or two for each slot."""

Begin = tuple[int, int]
"""Row and column of a tensor at which a part of it begins."""

FactorPair = tuple[torch.Tensor | None, torch.Tensor | None]
"""A and B of one module; both None if the adapter does not have it."""


@dataclass(frozen=True, eq=False)
class Regions:
    """Parts of one slot of every layer.

    targets: those that a merge fills, A and B of each module that it has.
    rests:   those that it leaves empty, and that may hold something.
    """

    targets: list[torch.Tensor]
    rests: list[torch.Tensor]


class SlotWriter(Protocol):
    """Writes one merge into slots."""

    @property
    def slot_map(self) -> SlotMap:
        """The slots of the model's layers."""
        ...

    def write(self, index: int) -> None:
        """Write the merge into the slot of every layer, over what the slot held before."""
        ...


class SlotMap:
    """The slots in which the layers of a model keep their adapters.

    layers:       all layers by name.
    direct:       modules that a backend can write itself, by vLLM's name, with their stacked slots
                  ``[slots, 1, rank, in]`` and ``[slots, 1, out, rank]``.
    others:       layers that take whole tensors through vLLM's own code, because they are sharded or store
                  them in another form.
    shards:       those of ``others`` of which a backend on a device can write this rank's shard itself, with
                  the beginnings of A and B of each of their modules.
    left_to_vllm: layers of an unsupported class; vLLM's own activation empties or fills them.
    parts:        all modules of these layers, in order.
    names:        the names of these modules in adapters.
    experts:      what the layers for experts take, by their name.
    used:         for each slot with known content, the rank from which on everything is zero.
    fitting:      shapes of adapters that fit the model.
    packed:       modules that vLLM packs into one, by the name of that one.
    dtype:        dtype of the slots.
    """

    def __init__(self, layers: Any) -> None:
        self.layers: dict[str, Any] = dict(layers.modules)
        self.direct: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.others: dict[str, Any] = {}
        self.left_to_vllm: dict[str, Any] = {}
        self.shards: dict[str, list[tuple[Begin, Begin]]] = {}
        self.parts: dict[str, None] = {}
        self.used: dict[int, int] = {}
        self.fitting: Lru[Hashable, bool] = Lru()
        self.packed: Mapping[str, list[str]] = layers.packed_modules
        self.dtype: torch.dtype = layers.lora_config.lora_dtype
        self._slots: dict[int, dict[str, Slot]] = {}
        self._sharded: dict[int, dict[str, Slot]] = {}
        self._left: frozenset[str] = frozenset()
        self._regions: Lru[tuple[int, tuple[int, ...], int | None], Regions] = Lru()
        self._manager = layers
        for name, layer in self.layers.items():
            parts = parts_of(layers.packed_modules, name)
            self.parts |= dict.fromkeys(parts)
            if _is_direct(layer, len(parts)):
                slots = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
                self.direct |= dict(zip(parts, slots, strict=True))
            elif is_supported(layer):
                self.others[name] = layer
                begins = _begins(layer, len(parts))
                if begins is not None:
                    self.shards[name] = begins
            else:
                self.left_to_vllm[name] = layer
        left = {part for name in self.left_to_vllm for part in (name, *parts_of(self.packed, name))}
        self._left = frozenset(name for part in left for name in names_of(layers, part))
        self.names = ModelNames(layers)
        found = {name: ExpertSlots.of(layers, name) for name in self.layers}
        self.experts = {name: slots for name, slots in found.items() if slots is not None}

    def check(self, lora: LoRAModel) -> None:
        """Raise PlanError if a merge has modules that no backend can hand to vLLM, such as experts."""
        unsupported = self.unsupported_modules(lora)
        if unsupported:
            raise PlanError(
                f"{listed(unsupported)} cannot be merged on a device; "
                "start the server with --merged-lora-backend cpu"
            )

    def unsupported_modules(self, lora: LoRAModel) -> list[str]:
        """The modules of an adapter that are in layers of an unsupported class."""
        prefixes = {module: accumulate(module.split("."), "{}.{}".format) for module in lora.loras}
        return sorted(module for module, names in prefixes.items() if not self._left.isdisjoint(names))

    def weights_of(self, lora: LoRAModel) -> dict[str, Any]:
        """The weights of each module that an adapter has, before vLLM packs them."""
        found = {part: self._manager._get_lora_layer_weights(lora, part) for part in self.parts}
        return {part: weights for part, weights in found.items() if weights is not None}

    def slots(self, index: int) -> dict[str, Slot]:
        """The slot with that index of each module in ``direct``."""
        if index not in self._slots:
            self._slots[index] = {
                part: Slot(a[index, 0], b[index, 0]) for part, (a, b) in self.direct.items()
            }
        return self._slots[index]

    def regions(self, index: int, ranks: tuple[int, ...], used: int | None) -> Regions:
        """What a merge fills of a slot, and what it has to empty.

        ranks: of each module in ``direct``, 0 if the merge does not have it.
        used:  rank from which on the slot is empty; None if that is unknown.
        """
        key = index, ranks, used
        known = self._regions.use(key)
        if known is None:
            known = Regions([], [])
            for slot, rank in zip(self.slots(index).values(), ranks, strict=True):
                if used is None or rank < used:
                    known.rests.extend((slot.a[rank:used], slot.b[:, rank:used]))
                if rank:
                    known.targets.extend((slot.a[:rank], slot.b[:, :rank]))
            self._regions.add(key, known, REGIONS)
        return known

    def sharded_slots(self, index: int) -> dict[str, Slot]:
        """The slot with that index of each module of the layers in ``shards``."""
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

    def set_layer(self, name: str, index: int, pairs: Sequence[FactorPair]) -> None:
        """Let vLLM's own code store the factors of a layer in ``others``, one pair for each module."""
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


def is_supported(layer: Any) -> bool:
    """Whether a layer is of a supported class itself, and not of a class derived from one."""
    return type(layer).__module__.startswith("vllm.lora.layers.") and type(layer).__name__ in SUPPORTED_LAYERS


def _is_direct(layer: Any, parts: int) -> bool:
    """Whether vLLM sets this layer's adapter by copying one pair of whole factors for each part."""
    return _copies(layer, parts) and layer.tp_size == 1


def _copies(layer: Any, parts: int) -> bool:
    """Whether vLLM sets this layer's adapter by copying one pair of factors, or its shard, for each part."""
    copying = (BaseLinearLayerWithLoRA.set_lora, MergedColumnParallelLinearWithLoRA.set_lora)
    return (
        is_supported(layer)
        and isinstance(layer, BaseLinearLayerWithLoRA)
        and not isinstance(layer, ClassificationHead)
        and type(layer).set_lora in copying
        and len(layer.lora_a_stacked) == len(layer.lora_b_stacked) == parts
        and all(
            slot.ndim == 4 and slot.shape[1] == 1 for slot in (*layer.lora_a_stacked, *layer.lora_b_stacked)
        )
    )


LARGE = 1 << 24
"""Rows and columns of a stand-in tensor that is larger than any layer."""


def _begins(layer: Any, parts: int) -> list[tuple[Begin, Begin]] | None:
    """The beginnings of this rank's shards of A and B, for each module of a layer, as vLLM cuts them.

    None if a shard is not one rectangle of the whole factor that fills the slot.
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
    """Row and column at which a view of ``whole`` begins; None if it is none, or does not fill the slot."""
    fits = all(x in (y, LARGE) for x, y in zip(part.shape, slot.shape[2:], strict=True))
    if not fits or not (part is whole or part._base is whole) or part.stride() != whole.stride():
        return None
    row, column = divmod(int(part.storage_offset()), LARGE)
    return row, column


@dataclass(frozen=True, eq=False)
class DeviceSlotWriter:
    """Writes a merge that a device has made into slots of that device.

    backend:  has made it, and copies it.
    staged:   the merge, in host memory.
    slot_map: the slots of the model's layers.
    modules:  name in the merge of each module, by vLLM's name.
    """

    backend: SlotBackend
    staged: StagedMerge
    slot_map: SlotMap
    modules: Mapping[str, str]

    def write(self, index: int) -> None:
        """Copy the merge into the slot of every layer, over what the slot held before.

        The copies are queued on the current stream, the step's own, and the step does not wait for them.
        """
        start = time.perf_counter()
        slots, empty = self._slots(index)
        others = {name: self._held(name) for name in self._others()}
        names = [module for held in others.values() for module in held if module is not None]
        whole = self.backend.place(self.staged, slots, empty, names)
        for name, held in others.items():  # from the device, so that vLLM's copies wait for nothing either
            pairs: list[FactorPair] = [
                (whole[module].a, whole[module].b) if module is not None else (None, None) for module in held
            ]
            self.slot_map.set_layer(name, index, pairs)
        logger.debug(
            "slot %d: %d modules copied, %d layers set, in %.1f ms",
            index,
            len(slots),
            len(others),
            (time.perf_counter() - start) * 1e3,
        )

    def compile(self) -> None:
        """Compile the kernels that :meth:`write` launches, so that no step of the engine waits for them."""
        self.backend.compile(self.staged, *self._slots(0))

    def _slots(self, index: int) -> tuple[dict[str, Slot], list[Slot]]:
        """The slots of the merge's modules, by name, and the slots of modules that it does not have."""
        slots, empty = {}, []
        for part, slot in (self.slot_map.slots(index) | self.slot_map.sharded_slots(index)).items():
            if part in self.modules:
                slots[self.modules[part]] = slot
            else:
                empty.append(slot)
        return slots, empty

    def _others(self) -> list[str]:
        """Names of the layers that take whole tensors through vLLM's own code."""
        return [name for name in self.slot_map.others if name not in self.slot_map.shards]

    def _held(self, name: str) -> list[str | None]:
        """Names in the merge of a layer's modules, in its order; None for one that it does not have."""
        return [self.modules.get(part) for part in parts_of(self.slot_map.packed, name)]


class HostSlotWriter:
    """Copies a merge in host memory into slots that are in host memory too.

    What does not depend on the slot is done when it is made, so that a step has little more to do than copy.

    slot_map: the slots of the model's layers.
    weights:  vLLM's own weights, for each module that the merge has.
    """

    def __init__(self, slot_map: SlotMap, weights: Mapping[str, Any]) -> None:
        self.slot_map = slot_map
        self._others = {
            name: [
                (weights[part].lora_a, weights[part].lora_b) if part in weights else (None, None)
                for part in parts_of(slot_map.packed, name)
            ]
            for name in slot_map.others
        }
        direct = [weights.get(part) for part in slot_map.direct]
        # Read from the tensor: before 0.32, the rank that vLLM stores beside it may be wrong.
        self._ranks = tuple([w.lora_a.shape[0] if w is not None else 0 for w in direct])
        self._factors = [x for w in direct if w is not None for x in (w.lora_a, w.lora_b)]
        self._rank = max((w.lora_a.shape[0] for w in weights.values()), default=0)

    def write(self, index: int) -> None:
        """Copy the merge into the slot of every layer, over what the slot held before."""
        used = self.slot_map.used.pop(index, None)  # if this fails halfway, the content is unknown
        regions = self.slot_map.regions(index, self._ranks, used)
        if regions.rests:
            torch._foreach_zero_(regions.rests)
        if regions.targets:
            torch._foreach_copy_(regions.targets, self._factors)
        self.slot_map.used[index] = self._rank
        for name, pairs in self._others.items():
            self.slot_map.set_layer(name, index, pairs)
