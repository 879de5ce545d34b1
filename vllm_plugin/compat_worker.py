"""Every touch with vLLM in a worker: how a merge becomes an adapter that vLLM holds, and fills its slot.

The table of what is wrapped, and all that happens in the API server, stands in ``compat.py``.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora import layers as lora_layers
from vllm.lora.layers import (
    LogitsProcessorWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path, parse_fine_tuned_lora_name
from vllm.model_executor.layers.linear import QKVParallelLinear

from merged_lora.adapters import Adapter
from merged_lora.backends import Backend, Slot, SlotBackend, load_backend
from merged_lora.errors import AdapterError, BackendError, PlanError, UnknownAdapterError, listed
from merged_lora.factors import Factors
from merged_lora.peft_files import config_of, tensors_of
from merged_lora.plan import MergePlan

from .identity import is_merge_path
from .makers import HostMaker, Maker, SlotMaker, outline, warm_up
from .settings import Settings
from .snapshots import GIB
from .worker import MergeWorker, Reply

logger = logging.getLogger("vllm.merged_lora")

CAPTURE, RELEASE, PREPARE = "merged_lora_capture", "merged_lora_release", "merged_lora_prepare"
ATTRIBUTE = "merged_lora"
"""Under this name each object of vLLM keeps what belongs to it: a manager its worker, a merge its filling."""

ClassificationHead: Any = getattr(lora_layers, "ClassificationHeadWithLoRA", ())  # vLLM 0.32 brought it


def with_worker(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``WorkerLoRAManager.__init__``."""

    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        worker = None
        settings = Settings.of(vllm_config.additional_config)
        if settings.enable:
            maker = _maker(self, settings, vllm_config.model_config.enable_sleep_mode)
            limit = int(settings.cache_gib * GIB)
            worker = MergeWorker(self.lora_config.max_lora_rank, limit, VllmShelf(self), maker)
        setattr(self, ATTRIBUTE, worker)

    return init


def _maker(manager: Any, settings: Settings, sleeps: bool) -> Maker[LoRAModel]:
    backend = load_backend(settings.backend)
    maker: Maker[LoRAModel]
    unfit = _unfit(backend, manager, sleeps)
    if unfit and settings.backend == "auto":
        logger.warning("%s; merging on the CPU", unfit)
        backend = load_backend("cpu")
    elif unfit:
        raise BackendError(f"{unfit}; start the server with --merged-lora-backend cpu")
    if isinstance(backend, SlotBackend):
        # Now, while the model is loaded, and for good: vLLM measures afterwards what is left for the KV
        # cache, so this memory counts like weights and no merge ever has to ask for more.
        backend.reserve(int(settings.gpu_gib * GIB))
        maker = SlotMaker(backend, functools.partial(_slot_model, manager, backend), _compile)
    else:
        maker = HostMaker(backend, functools.partial(_host_model, manager))
    warm_up(backend, manager.lora_config.lora_dtype)
    return maker


def _unfit(backend: Backend, manager: Any, sleeps: bool) -> str:
    """Why a backend cannot serve this engine; empty where it can."""
    if not isinstance(backend, SlotBackend):
        return ""
    if backend.device.type != manager.device.type:
        return f"backend {backend.name} merges on {backend.device}, vLLM runs on {manager.device}"
    if sleeps:
        return f"sleep mode takes the memory in which backend {backend.name} keeps its sources"
    return ""


def _compile(lora: LoRAModel) -> None:
    filling: Filling = getattr(lora, ATTRIBUTE)
    filling.compile()


def or_merge(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``WorkerLoRAManager._load_adapter``."""

    @functools.wraps(original)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        worker: MergeWorker[LoRAModel] | None = getattr(self, ATTRIBUTE, None)
        if worker is None:
            return original(self, lora_request)
        if is_merge_path(lora_request.lora_path):
            return worker.take(lora_request.lora_path)
        lora = worker.plain(lora_request.lora_path, lora_request.lora_int_id)
        return original(self, lora_request) if lora is None else lora

    return _load_adapter


def filling_slots(original: Callable[..., bool]) -> Callable[..., bool]:
    """Wrap ``LoRAModelManager.activate_adapter``: vLLM chooses the slot, the backend fills it."""

    @functools.wraps(original)
    def activate_adapter(self: Any, lora_id: int) -> bool:
        filling: Filling | None = getattr(self._registered_adapters.get(lora_id), ATTRIBUTE, None)
        if filling is None:
            return original(self, lora_id)
        modules, self.modules = self.modules, {}  # so that it keeps its books and copies nothing
        try:
            activated = original(self, lora_id)
        finally:
            self.modules = modules
        if activated:
            filling.fill(self.lora_index_to_id.index(lora_id))
        return activated

    return activate_adapter


def rpc_capture(
    self: Any, owner: str, needed: Collection[str] | None, path: str, options: Mapping[str, Any] | None
) -> Reply:
    """The worker's method ``CAPTURE``."""
    merges, _ = _merge_worker(self)
    return _DISABLED if merges is None else merges.capture(owner, needed, path, options)


def rpc_release(self: Any, owner: str, needed: Collection[str]) -> Reply:
    """The worker's method ``RELEASE``."""
    merges, _ = _merge_worker(self)
    return _DISABLED if merges is None else merges.release(owner, needed)


def rpc_prepare(self: Any, path: str) -> Reply:
    """The worker's method ``PREPARE``."""
    merges, loaded = _merge_worker(self)
    return _DISABLED if merges is None else merges.prepare(path, loaded)


_DISABLED: Reply = {"ok": False, "kind": "internal", "error": "merged LoRA is not enabled in this worker"}


def _merge_worker(worker: Any) -> tuple[MergeWorker[LoRAModel] | None, set[int]]:
    manager = getattr(worker.model_runner, "lora_manager", None)
    return getattr(manager, ATTRIBUTE, None), manager.list_adapters() if manager is not None else set()


class VllmShelf:
    """How vLLM's manager in a worker reads and holds plain adapters."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def find(self, path: str) -> Path:
        """The folder that an adapter's path or hub name means."""
        return Path(get_adapter_absolute_path(path))

    def read(self, path: str, options: Mapping[str, Any]) -> LoRAModel:
        """The adapter as vLLM reads it from disk.  Raises MergeError with vLLM's own message, or ours."""
        try:
            load = inspect.unwrap(type(self._manager)._load_adapter)
            lora: LoRAModel = load(self._manager, LoRARequest("captured", 1, path, **options))
        except LoRAAdapterNotFoundError as error:
            raise UnknownAdapterError(str(error)) from None
        except Exception as error:
            raise AdapterError(str(error)) from error
        _check_fit(self._manager._adapter_manager, lora)
        return lora

    def size(self, model: LoRAModel) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in _tensors(model))

    def scalings(self, model: LoRAModel) -> dict[str, float]:
        """What vLLM scales each module by."""
        return {name: weights.scaling for name, weights in model.loras.items()}

    def build(self, number: int, adapter: Adapter, scalings: Mapping[str, float]) -> LoRAModel:
        """The same as ``read`` gave, under another id; raises PlanError where it would not be.

        B is copied, because vLLM scales it in place.
        """
        copies = {
            name: Factors(factors.a, factors.b.clone(), factors.scaling, factors.embedding)
            for name, factors in adapter.modules.items()
        }
        lora = _lora_model(self._manager, number, adapter.moved(copies), "cpu")
        if lora.loras.keys() != scalings.keys():
            raise PlanError("vLLM reads other modules of it")
        for name, scaling in scalings.items():
            lora.loras[name].scaling = scaling
        return lora

    def copy(self, model: LoRAModel, number: int) -> LoRAModel:
        """A copy that shares nothing, under another id."""
        lora = copy.deepcopy(model)
        lora.id = number
        return lora


def _tensors(model: LoRAModel) -> Iterator[torch.Tensor]:
    for weights in (*model.loras.values(), *getattr(model, "modules_to_save", {}).values()):
        for value in vars(weights).values():
            yield from (v for v in (value if isinstance(value, list) else [value]) if torch.is_tensor(v))


# What vLLM holds


def _host_model(manager: Any, number: int, adapter: Adapter) -> LoRAModel:
    """The adapter as vLLM holds it, in host memory; raises PlanError where it does not fit the model."""
    return _lora_model(manager, number, adapter, "cpu")


def _slot_model(manager: Any, backend: SlotBackend, number: int, plan: MergePlan) -> LoRAModel:
    """The merge as vLLM holds it: shapes, and what fills its slot.

    Tensors without values go through all of vLLM's own checks and packing, and take no memory.  Raises
    PlanError where the merge does not fit the model.
    """
    outlines = {name: outline(module) for name, module in plan.modules.items()}
    lora = _lora_model(manager, number, Adapter(outlines, plan.header), "meta")
    layers = manager._adapter_manager
    layout: Layout | None = getattr(layers, ATTRIBUTE, None)
    if layout is None:  # made late, because vLLM makes the layers after this manager
        layout = Layout(layers)
        setattr(layers, ATTRIBUTE, layout)
    layout.check(lora)
    mapper = _mapper(layers.model)
    named = {_vllm_name(name, factors, mapper): name for name, factors in outlines.items()}
    found = {part: layers._get_lora_layer_weights(lora, part) for part in layout.parts}
    modules = {part: named[weights.module_name] for part, weights in found.items() if weights is not None}
    setattr(lora, ATTRIBUTE, Filling(backend, plan, layout, modules))
    return lora


def _lora_model(manager: Any, number: int, adapter: Adapter, device: str) -> LoRAModel:
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
        skip_prefixes=getattr(layers.model, "lora_skip_prefixes", None),
    )
    _check_fit(layers, lora)
    return lora


def _mapper(model: Any) -> Any:
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return mapper.get_rename_mapper() if mapper is not None else None


def _vllm_name(module: str, factors: Factors, mapper: Any) -> str:
    name: str = parse_fine_tuned_lora_name(next(iter(tensors_of({module: factors}))), mapper)[0]
    return name


def _parts(packed: Mapping[str, list[str]], name: str) -> list[str]:
    """The modules that vLLM packs into this one, by their full names; itself where it packs none."""
    return packed.get(name) or [name]


def _check_fit(layers: Any, lora: LoRAModel) -> None:
    """Raise PlanError for modules the model does not have, or has in another shape.

    An adapter that vLLM itself loaded has passed its own checks; offline, sources never went that way.
    """
    packed: Mapping[str, list[str]] = layers.packed_modules_mapping
    kinds = {part for kind in layers.supported_lora_modules for part in packed.get(kind) or [kind]}
    strangers = sorted(name for name in lora.loras if name.rsplit(".", 1)[-1] not in kinds)
    if strangers:
        raise PlanError(f"the model has no module {listed(strangers)} that takes LoRA")
    for name, layer in layers.modules.items():
        parts = _parts(layers.packed_modules, name)
        found = [layers._get_lora_layer_weights(lora, part) for part in parts]
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
            given = weights.lora_b.shape[0], weights.lora_a.shape[1]
            if given != (out, width) and not _is_padded(layer, given, (out, width)):
                raise PlanError(f"{part} has shape {(out, width)} in the model, another one in the adapters")


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


def _is_padded(layer: Any, given: tuple[int, int], slot: tuple[int, int]) -> bool:
    """Whether an adapter's output head has fewer tokens than vLLM's, which vLLM fills up."""
    return isinstance(layer, LogitsProcessorWithLoRA) and given[0] < slot[0] and given[1] == slot[1]


# What fills a slot


class Layout:
    """Where the layers of a model keep their adapters.

    direct: for each module of an adapter that a backend can write itself, by vLLM's name, its stacked slots
    ``[slots, 1, rank, in]`` and ``[slots, 1, out, rank]``.  others: layers that take whole tensors through
    vLLM's own code, because they are sharded or keep them in another form.  parts: all modules of both.
    """

    def __init__(self, layers: Any) -> None:
        self.direct: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.others: dict[str, Any] = {}
        self.parts: dict[str, None] = {}
        self.packed: Mapping[str, list[str]] = layers.packed_modules
        self.dtype: torch.dtype = layers.lora_config.lora_dtype
        self._slots: dict[int, dict[str, Slot]] = {}
        for name, layer in layers.modules.items():
            parts = _parts(layers.packed_modules, name)
            self.parts |= dict.fromkeys(parts)
            if _is_direct(layer, len(parts)):
                slots = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
                self.direct |= dict(zip(parts, slots, strict=True))
            else:
                self.others[name] = layer

    def check(self, lora: LoRAModel) -> None:
        """Raise PlanError where a merge holds what no backend can hand to vLLM: experts, for one."""
        known = BaseLinearLayerWithLoRA, VocabParallelEmbeddingWithLoRA, LogitsProcessorWithLoRA
        for name, layer in self.others.items():
            if isinstance(layer, known):
                continue
            inside = [module for module in lora.loras if f"{module}.".startswith(f"{name}.")]
            if inside:
                raise PlanError(
                    f"{listed(sorted(inside))} cannot be merged on a device; "
                    "start the server with --merged-lora-backend cpu"
                )

    def at(self, index: int) -> dict[str, Slot]:
        """The slots of that index, one for every module in ``direct``."""
        if index not in self._slots:
            self._slots[index] = {
                part: Slot(a[index, 0], b[index, 0]) for part, (a, b) in self.direct.items()
            }
        return self._slots[index]


def _is_direct(layer: Any, parts: int) -> bool:
    """Whether setting this layer's adapter means no more than copying one pair of factors for each part."""
    copying = (BaseLinearLayerWithLoRA.set_lora, MergedColumnParallelLinearWithLoRA.set_lora)
    return (
        isinstance(layer, BaseLinearLayerWithLoRA)
        and not isinstance(layer, ClassificationHead)
        and type(layer).set_lora in copying
        and layer.tp_size == 1
        and not layer.lora_config.fully_sharded_loras
        and len(layer.lora_a_stacked) == len(layer.lora_b_stacked) == parts
        and all(
            slot.ndim == 4 and slot.shape[1] == 1 for slot in (*layer.lora_a_stacked, *layer.lora_b_stacked)
        )
    )


@dataclass(frozen=True, eq=False)
class Filling:
    """Fills slots with one merge.

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
        for name, layer in self.layout.others.items():
            self._hand_over(name, layer, index)
        logger.debug(
            "slot %d: %d modules of %s written, %d layers set, in %.1f ms",
            index,
            len(slots),
            self.plan.spec,
            len(self.layout.others),
            (time.perf_counter() - start) * 1e3,
        )

    def compile(self) -> None:
        """Compile what :meth:`fill` will launch, so that no step of the engine has to wait for it."""
        self.backend.compile(self.plan, *self._slots(0))
        for name in self.layout.others:
            whole = {module: self._empty(module) for module in self._held(name) if module is not None}
            if whole:
                self.backend.compile(self.plan, whole)

    def _slots(self, index: int) -> tuple[dict[str, Slot], list[Slot]]:
        """Slots by the plan's modules, and those of modules that the merge lacks."""
        slots, empty = {}, []
        for part, slot in self.layout.at(index).items():
            if part in self.modules:
                slots[self.modules[part]] = slot
            else:
                empty.append(slot)
        return slots, empty

    def _held(self, name: str) -> list[str | None]:
        """The plan's modules that one layer takes, in its order; None where the merge lacks one."""
        return [self.modules.get(part) for part in _parts(self.layout.packed, name)]

    def _hand_over(self, name: str, layer: Any, index: int) -> None:
        """Merge one layer into tensors of its own and let vLLM take them."""
        if isinstance(layer, ClassificationHead):
            layer.reset_module_to_save(index)
        held = self._held(name)
        whole = {module: self._empty(module) for module in held if module is not None}
        if not whole:
            layer.reset_lora(index)
            return
        self.backend.write(self.plan, whole)
        a = [whole[module].a if module is not None else None for module in held]
        b = [whole[module].b if module is not None else None for module in held]
        if name in self.layout.packed:
            layer.set_lora(index, a, b)
        else:
            layer.set_lora(index, a[0], b[0])

    def _empty(self, module: str) -> Slot:
        """A slot as large as the result, because vLLM shards and transposes what it is given."""
        shapes = [shape for shape, _ in self.plan.modules[module].results]
        dtype, device = self.layout.dtype, self.backend.device
        return Slot(*(torch.empty(shape, dtype=dtype, device=device) for shape in shapes))
