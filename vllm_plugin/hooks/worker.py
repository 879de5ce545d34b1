"""Hooks into vLLM's managers of adapters in a worker, and the methods that API servers call there.

``table.py`` lists the functions of vLLM that are wrapped; ``models.py`` builds what vLLM holds of a merge.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

from merged_lora.adapters import Adapter
from merged_lora.backends import Backend, SlotBackend, load_backend
from merged_lora.cores import raise_nice, usable_cores
from merged_lora.errors import AdapterError, BackendError, PlanError, UnknownAdapterError
from merged_lora.factors import Factors
from merged_lora.vllm_plugin.identity import is_merge_path
from merged_lora.vllm_plugin.rpc import Reply
from merged_lora.vllm_plugin.settings import GIB, Settings
from merged_lora.vllm_plugin.worker.makers import HostMaker, Maker, SlotMaker
from merged_lora.vllm_plugin.worker.merge_worker import MergeWorker

from .current import current
from .experts import expert_of
from .models import (
    attach_slot_writer,
    check_fit,
    fitted_adapter,
    host_model,
    largest_adapter,
    lora_model,
    slot_map_of,
    slot_model,
)
from .slots import SlotMap, SlotWriter
from .wrapping import ATTRIBUTE

logger = logging.getLogger("vllm.merged_lora")

NICE = 10
"""Nice value of the threads that merge: they give way to those of the engine's steps."""
SWITCH = 0.0005
"""Seconds until a thread of a worker leaves the interpreter's lock to another; Python's own are 0.005."""
DRIVERS = 2
"""Cores that a worker whose model runs on a device is taken to need for itself."""
ALIGNMENT = 64
"""Bytes of padding that a tensor of a source or of a merge may need on a device."""


def wrap_init(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``WorkerLoRAManager.__init__``: attach a MergeWorker, or None if merges are not enabled."""

    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        worker = None
        settings = Settings.of(vllm_config.additional_config)
        if settings.enable:
            adapters = VllmPlainAdapters(self)
            maker = _maker(self, settings, vllm_config.model_config.enable_sleep_mode, adapters)
            threads = _threads(self, settings)
            worker = MergeWorker(
                self.lora_config.max_lora_rank,
                int(settings.cache_gib * GIB),
                adapters,
                maker,
                seconds=settings.max_seconds,
                enter=functools.partial(_enter, maker.backend, threads),
                enter_reading=functools.partial(_enter_reading, threads),
            )
        setattr(self, ATTRIBUTE, worker)

    return init


def _threads(manager: Any, settings: Settings) -> int:
    """Number of threads that merge: those asked for, or a share of the cores that all workers leave free."""
    if settings.threads is not None:
        return settings.threads
    taken = torch.get_num_threads() if manager.device.type == "cpu" else DRIVERS
    return max(1, usable_cores(current.cores) // settings.local_workers - taken)


def _enter(backend: Backend, threads: int) -> None:
    """Prepare the thread that merges, and those that it starts: they may use every core, and take none."""
    raise_nice(NICE)
    sys.setswitchinterval(SWITCH)
    _enter_reading(threads)
    backend.confine(threads, NICE)


def _enter_reading(threads: int) -> None:
    """Prepare the thread that reads adapters, and torch's threads for it.

    Its priority stays that of the steps, because the load of a plain adapter waits for it.
    """
    os.sched_setaffinity(0, current.cores)  # of this thread alone
    torch._C.set_num_threads(threads)  # vLLM's CPU build replaces torch.set_num_threads by nothing


def _maker(manager: Any, settings: Settings, sleeps: bool, adapters: VllmPlainAdapters) -> Maker[LoRAModel]:
    backend = load_backend(settings.backend)
    maker: Maker[LoRAModel]
    unfit = _unsuitable(backend, manager, sleeps)
    if unfit and settings.backend == "auto":
        logger.warning("%s; merging on the CPU", unfit)
        backend = load_backend("cpu")
    elif unfit:
        raise BackendError(f"{unfit}; start the server with --merged-lora-backend cpu")
    if isinstance(backend, SlotBackend):
        maker = SlotMaker(
            backend,
            manager.lora_config.lora_dtype,
            functools.partial(slot_model, manager),
            functools.partial(attach_slot_writer, manager, backend),
        )
    else:
        maker = HostMaker(backend, functools.partial(host_model, manager), adapters.size)
    return maker


def wrap_create_lora_manager(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``LRUCacheWorkerLoRAManager.create_lora_manager``, after which the model's layers exist."""

    @functools.wraps(original)
    def create_lora_manager(self: Any, model: Any, vllm_config: Any) -> Any:
        created = original(self, model, vllm_config)
        worker: MergeWorker[LoRAModel] | None = getattr(self, ATTRIBUTE, None)
        if worker is not None:
            servers = vllm_config.parallel_config._api_process_count
            _make_ready(self, worker, Settings.of(vllm_config.additional_config), servers)
            for punica in self._adapter_manager.punica_wrapper_mapping.values():
                setattr(punica, ATTRIBUTE, True)
        return created

    return create_lora_manager


def _make_ready(manager: Any, worker: MergeWorker[LoRAModel], settings: Settings, servers: int) -> None:
    """Reserve the memory that merges need, compile what they launch, and measure how long they take.

    servers: number of API servers, each of which has an equal share of the memory for merges that are ready.
    """
    backend = worker.maker.backend
    slot_map_of(manager._adapter_manager)
    modules, worker.largest = largest_adapter(manager._adapter_manager)
    if isinstance(backend, SlotBackend):
        worker.largest += modules * 2 * ALIGNMENT  # of a merge, as of a source
    if worker.largest * servers > settings.ready_gib * GIB:
        raise BackendError(
            f"a merge of --max-lora-rank {manager.lora_config.max_lora_rank} takes up to "
            f"{worker.largest / GIB:.3g} GiB, and each API server, of which there are {servers}, needs room "
            f"for one; raise --merged-lora-ready-gib, which is {settings.ready_gib:g}"
        )
    if 2 * worker.largest * servers > settings.ready_gib * GIB:
        logger.warning(
            "a merge of --max-lora-rank %d takes up to %.3g GiB, and each API server, of which there are %d, "
            "has no room for two: while requests use one of that size, no other new one is begun, and who "
            "asks for one may get status 429; raise --merged-lora-ready-gib, which is %g",
            manager.lora_config.max_lora_rank,
            worker.largest / GIB,
            servers,
            settings.ready_gib,
        )
    if isinstance(backend, SlotBackend):
        # Reserved while the model is loaded, and kept: vLLM measures afterwards how much is left for the KV
        # cache, so this memory counts as weights do, and no merge ever needs more.
        nbytes, reason = _source_memory(manager.lora_config, settings, modules, worker.largest)
        backend.reserve(nbytes, reason, worker.largest)
        logger.info("%.3g GiB of device memory for the sources of merges: %s", nbytes / GIB, reason)
    worker.make_ready(manager.lora_config.lora_dtype)


def _source_memory(lora_config: Any, settings: Settings, modules: int, each: int) -> tuple[int, str]:
    """Bytes to reserve for sources on a device, and the reason for that number.

    modules: number of modules of the largest adapter.
    each:    its bytes there.

    All sources of a merge have to be there at the same time.  If there are more slots than a merge may have
    sources, as many sources as slots may stay from one merge to the next.
    """
    if settings.gpu_gib is not None:
        return int(settings.gpu_gib * GIB), "--merged-lora-gpu-gib"
    slots, rank = lora_config.max_loras, lora_config.max_lora_rank
    count, flag = max((settings.max_sources, "--merged-lora-max-sources"), (slots, "--max-loras"))
    dtype = str(lora_config.lora_dtype).removeprefix("torch.")
    return count * each, (
        f"{count} adapters, as {flag} says, of {each / GIB:.3g} GiB each: "
        f"{modules} modules, rank {rank}, {dtype}"
    )


def _unsuitable(backend: Backend, manager: Any, sleeps: bool) -> str:
    """Why a backend cannot serve this engine; empty if it can."""
    if not isinstance(backend, SlotBackend):
        return ""
    if backend.device.type != manager.device.type:
        return f"backend {backend.name} merges on {backend.device}, vLLM runs on {manager.device}"
    if sleeps:
        return f"sleep mode takes the memory in which backend {backend.name} keeps its sources"
    return ""


def wrap_load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``WorkerLoRAManager._load_adapter``: merges and copied adapters come from memory."""

    @functools.wraps(original)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        worker: MergeWorker[LoRAModel] | None = getattr(self, ATTRIBUTE, None)
        if worker is None:
            return original(self, lora_request)
        if is_merge_path(lora_request.lora_path):
            return worker.load_merge(lora_request.lora_path)
        lora = worker.load_plain(lora_request.lora_path, lora_request.lora_int_id)
        return original(self, lora_request) if lora is None else lora

    return _load_adapter


def wrap_activate_adapter(original: Callable[..., bool]) -> Callable[..., bool]:
    """Wrap ``LoRAModelManager.activate_adapter``: vLLM chooses the slot, and a writer fills it.

    While vLLM does its bookkeeping, its ``modules`` are those that no writer fills, so that it copies nothing
    into the others.  Its layers for experts stay, which its own reader looks at in another thread.  After an
    activation that fails, the adapter is inactive and the slot's content counts as unknown.
    """

    @functools.wraps(original)
    def activate_adapter(self: Any, lora_id: int) -> bool:
        slot_map: SlotMap | None = getattr(self, ATTRIBUTE, None)
        writer: SlotWriter | None = getattr(self._registered_adapters.get(lora_id), ATTRIBUTE, None)
        if writer is None:
            try:
                activated = original(self, lora_id)
            except BaseException:
                if slot_map is not None:
                    slot_map.used.clear()  # vLLM may have written into any slot
                raise
            if slot_map is not None and activated:
                slot_map.used.pop(self.lora_index_to_id.index(lora_id), None)
            return activated
        modules, self.modules = self.modules, writer.slot_map.left_to_vllm
        try:
            activated = original(self, lora_id)
        finally:
            self.modules = modules
        if activated:
            try:
                writer.write(self.lora_index_to_id.index(lora_id))
            except BaseException:
                self.deactivate_adapter(lora_id)
                raise
        return activated

    return activate_adapter


def wrap_add_lora_logits(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``PunicaWrapperCPU.add_lora_logits``: the rows of a prompt get the adapters of their tokens.

    vLLM knows the adapters of sampled tokens alone here, and ends with an error of shapes when it rates a
    prompt in a batch of several requests.
    """

    @functools.wraps(original)
    def add_lora_logits(
        self: Any, y: torch.Tensor, x: torch.Tensor, lora_a_stacked: torch.Tensor, *args: Any, **kwargs: Any
    ) -> None:
        rows, sampled = x.shape[0], self.indices_len[1]
        are_sampled = rows == sampled and x.nbytes == x.untyped_storage().nbytes()  # gathered, not a slice
        if are_sampled or not getattr(self, ATTRIBUTE, False):
            return original(self, y, x, lora_a_stacked, *args, **kwargs)
        if (
            not lora_a_stacked.any()
        ):  # no output head at all: B alone is gigabytes when repeated for every row
            return None
        first = x.storage_offset() // x.shape[1]  # x is a slice of the hidden states of all tokens
        slots, self._sampler_indices = self._sampler_indices, self.token_lora_indices[first:]
        self.indices_len[1] = rows
        try:
            return original(self, y, x, lora_a_stacked, *args, **kwargs)
        finally:
            self._sampler_indices, self.indices_len[1] = slots, sampled

    return add_lora_logits


def rpc_capture(
    self: Any,
    ticket: str,
    owner: str,
    needed: Collection[str] | None,
    path: str,
    options: Mapping[str, Any] | None,
) -> Reply:
    """The worker's method named ``CAPTURE``; see :meth:`MergeWorker.capture`."""
    merges, _ = _merge_worker(self)
    return _DISABLED if merges is None else merges.capture(ticket, owner, needed, path, options)


def rpc_release(self: Any, owner: str, needed: Collection[str]) -> Reply:
    """The worker's method named ``RELEASE``; see :meth:`MergeWorker.release`."""
    merges, _ = _merge_worker(self)
    return _DISABLED if merges is None else merges.release(owner, needed)


def rpc_prepare(self: Any, ticket: str, owner: str, needed: Collection[str], path: str) -> Reply:
    """The worker's method named ``PREPARE``; see :meth:`MergeWorker.prepare`."""
    merges, loaded = _merge_worker(self)
    return _DISABLED if merges is None else merges.prepare(ticket, owner, needed, path, loaded)


def rpc_poll(self: Any, tickets: Collection[str]) -> Reply:
    """The worker's method named ``POLL``; see :meth:`MergeWorker.poll`."""
    merges, _ = _merge_worker(self)
    return _DISABLED if merges is None else merges.poll(tickets)


def rpc_cancel(self: Any, tickets: Collection[str]) -> Reply:
    """The worker's method named ``CANCEL``; see :meth:`MergeWorker.cancel`."""
    merges, _ = _merge_worker(self)
    return _DISABLED if merges is None else merges.cancel(tickets)


def rpc_replay(self: Any, key: str, name: str, strategy: str) -> Reply:
    """The worker's method named ``REPLAY``; see :meth:`MergeWorker.replay`."""
    merges, _ = _merge_worker(self)
    return _DISABLED if merges is None else merges.replay(key, name, strategy)


_DISABLED: Reply = {"ok": False, "kind": "internal", "error": "merged LoRA is not enabled in this worker"}


def _merge_worker(worker: Any) -> tuple[MergeWorker[LoRAModel] | None, set[int]]:
    manager = getattr(worker.model_runner, "lora_manager", None)
    return getattr(manager, ATTRIBUTE, None), manager.list_adapters() if manager is not None else set()


class VllmPlainAdapters:
    """Plain adapters as vLLM's manager in a worker reads and holds them."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def find(self, path: str) -> Path:
        """The folder of the adapter with this path or this name on the hub."""
        return Path(get_adapter_absolute_path(path))

    def read(self, path: str, options: Mapping[str, Any]) -> LoRAModel:
        """The adapter as vLLM reads it from disk; raises MergeError with vLLM's message or ours."""
        try:
            load = inspect.unwrap(type(self._manager)._load_adapter)
            lora: LoRAModel = load(self._manager, LoRARequest(Path(path).name or path, 1, path, **options))
        except LoRAAdapterNotFoundError as error:
            raise UnknownAdapterError(str(error)) from None
        except Exception as error:
            raise AdapterError(str(error)) from error
        check_fit(self._manager._adapter_manager, lora)
        return lora

    def fit(self, adapter: Adapter) -> Adapter:
        """The adapter with the model's own modules; raises PlanError if it has one that is none of them."""
        return fitted_adapter(self._manager._adapter_manager, adapter)

    def size(self, model: LoRAModel) -> int:
        """Bytes of the tensors of an adapter."""
        return sum(tensor.nbytes for tensor in _tensors(model))

    def scalings(self, model: LoRAModel) -> dict[str, float]:
        """The factor by which vLLM scales each module of the model."""
        return {part: weights.scaling for part, weights in self._by_part(model).items()}

    def build(self, number: int, adapter: Adapter, scalings: Mapping[str, float]) -> LoRAModel:
        """The adapter as :meth:`read` returns it, under another id; raises PlanError if it would differ.

        B is copied, because vLLM scales it in place.
        """
        copies = {
            name: Factors(factors.a, factors.b.clone(), factors.scaling, factors.embedding)
            for name, factors in adapter.modules.items()
        }
        lora = lora_model(self._manager, number, adapter.moved(copies), "cpu")
        weights = self._by_part(lora)
        if weights.keys() != scalings.keys():
            raise PlanError("vLLM reads other modules from it")
        for part, scaling in scalings.items():
            weights[part].scaling = scaling
        # As its request says of it, or vLLM would have refused it.
        layers = self._manager._adapter_manager
        shared = any(slots.shared for slots in slot_map_of(layers).experts.values())
        mixed = layers._enable_mixed_moe_lora_format and not shared
        lora.is_3d_lora_weight = mixed and any(map(expert_of, adapter.modules))
        return lora

    def _by_part(self, model: LoRAModel) -> dict[str, Any]:
        """What vLLM holds of each module, by the module of the model instead of by a name that vLLM knows."""
        names = slot_map_of(self._manager._adapter_manager).names
        return {names.part_of(theirs): weights for theirs, weights in model.loras.items()}

    def copy(self, model: LoRAModel, number: int) -> LoRAModel:
        """A copy under another id that shares no tensor."""
        lora = copy.deepcopy(model)
        lora.id = number
        return lora

    def share(self, model: LoRAModel) -> LoRAModel:
        """The same merge, tensors and writer, for vLLM, which packs in place what it is given."""
        lora: LoRAModel = model.clone(model.id)
        setattr(lora, ATTRIBUTE, getattr(model, ATTRIBUTE, None))
        return lora


def _tensors(model: LoRAModel) -> Iterator[torch.Tensor]:
    for weights in (*model.loras.values(), *getattr(model, "modules_to_save", {}).values()):
        for value in vars(weights).values():
            yield from (v for v in (value if isinstance(value, list) else [value]) if torch.is_tensor(v))
