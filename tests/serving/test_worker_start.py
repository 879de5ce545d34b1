"""What a worker does when it starts: choose a backend, reserve memory, compile."""

from __future__ import annotations

import logging
import os
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import ParallelConfig, VllmConfig
from vllm.lora.lora_model import LoRAModel

import tiny
from making import random_adapter
from merged_lora.backends import Progress, load_backend
from merged_lora.engine import plan
from merged_lora.errors import BackendError, PlanError
from merged_lora.spec import parse
from merged_lora.triton_kernels.packed import ALIGNMENT, DeviceSources
from merged_lora.vllm_plugin.hooks import command_line
from merged_lora.vllm_plugin.hooks import worker as worker_hooks
from merged_lora.vllm_plugin.hooks.current import current
from merged_lora.vllm_plugin.hooks.wrapping import ATTRIBUTE
from merged_lora.vllm_plugin.settings import GIB, Settings
from merged_lora.vllm_plugin.worker.background import Task
from merged_lora.vllm_plugin.worker.makers import HostMaker
from merged_lora.vllm_plugin.worker.merge_worker import MergeWorker
from slots import (
    FUSED,
    OTHERS,
    CopyingBackend,
    worker_manager,
)
from tiny import HIDDEN, MAX_RANK

TRITON = Settings(enable=True, backend="triton")


def start(
    manager: Any, backend: CopyingBackend, settings: Settings, sleeps: bool = False, servers: int = 1
) -> MergeWorker[LoRAModel]:
    """Start a worker on a machine whose device backend is this one, and end its threads."""
    with pytest.MonkeyPatch.context() as patch:
        real = load_backend
        patch.setattr(worker_hooks, "load_backend", lambda name: real("cpu") if name == "cpu" else backend)
        adapters = worker_hooks.VllmPlainAdapters(manager)
        made = worker_hooks._maker(manager, settings, sleeps, adapters)
        merges = MergeWorker(MAX_RANK, 1 << 30, adapters, made)
        try:
            worker_hooks._make_ready(manager, merges, settings, servers)
        finally:
            merges.stop()
        return merges


def test_device_memory_for_sources_is_reserved_when_the_worker_starts(vllm_config: VllmConfig) -> None:
    backend = CopyingBackend()
    start(worker_manager(vllm_config), backend, Settings(enable=True, gpu_gib=0.25))
    assert backend.reserved == [268_435_456]
    assert backend.reason == "--merged-lora-gpu-gib"


@pytest.mark.parametrize(
    ("max_loras", "max_sources", "count", "words"),
    [
        (2, 8, 8, "8 adapters, as --merged-lora-max-sources says"),
        (2, 3, 3, "3 adapters, as --merged-lora-max-sources says"),
        (4, 3, 4, "4 adapters, as --max-loras says"),
    ],
)
def test_unless_it_is_said_there_is_room_for_the_sources_of_any_merge(
    vllm_config: VllmConfig, max_loras: int, max_sources: int, count: int, words: str
) -> None:
    backend = CopyingBackend()
    settings = Settings(enable=True, max_sources=max_sources)
    start(worker_manager(vllm_config, max_loras), backend, settings)
    assert words in backend.reason
    shapes = tiny.MODULES | OTHERS | {"model.layers.1.mlp.fused_proj": (sum(FUSED), HIDDEN)}
    embeddings = ["model.embed_tokens"]
    largest = [
        random_adapter(shapes, MAX_RANK, torch.float32, seed, embeddings=embeddings) for seed in range(9)
    ]
    assert f"{len(shapes)} modules, rank {MAX_RANK}, float32" in backend.reason
    room = DeviceSources(torch.device("cpu"))
    (nbytes,) = backend.reserved
    room.reserve(nbytes, backend.reason)
    room.load(largest[:count])
    with pytest.raises(PlanError, match="gpu-gib") as refused:
        room.load(largest[: count + 1])
    assert backend.reason in str(refused.value)
    each = f"{sum(f.nbytes for f in largest[0].modules.values()) / 2**30:.3g}"
    assert " + ".join([each] * (count + 1)) in str(refused.value)


def test_memory_for_the_largest_merge_is_reserved_on_the_device_and_announced(
    vllm_config: VllmConfig,
) -> None:
    manager, backend = worker_manager(vllm_config), CopyingBackend()
    shapes = tiny.MODULES | OTHERS | {"model.layers.1.mlp.fused_proj": (sum(FUSED), HIDDEN)}
    embeddings = ["model.embed_tokens"]
    adapters = {
        name: random_adapter(shapes, MAX_RANK, torch.float32, seed, embeddings=embeddings)
        for seed, name in enumerate("ab")
    }
    worker = start(manager, backend, TRITON)
    assert backend.largest == worker.largest
    largest = worker.maker.make(7, plan(parse("linear(a, b)"), adapters, MAX_RANK)).nbytes
    padding = 2 * len(shapes) * ALIGNMENT
    assert largest <= worker.largest <= largest + padding


def test_a_merge_that_the_byte_budget_cannot_hold_is_an_error_at_the_start(vllm_config: VllmConfig) -> None:
    manager, backend = worker_manager(vllm_config), CopyingBackend()
    settings = Settings(enable=True, backend="triton", ready_gib=1e-5)
    with pytest.raises(
        BackendError, match=r"takes up to .* GiB, .*; raise --merged-lora-ready-gib, .* 1e-05"
    ):
        start(manager, backend, settings)
    assert backend.reserved == []


def test_every_api_server_must_have_room_for_one_merge(vllm_config: VllmConfig) -> None:
    largest = start(worker_manager(vllm_config), CopyingBackend(), TRITON).largest
    settings = replace(TRITON, ready_gib=2.5 * largest / GIB)
    start(worker_manager(vllm_config), CopyingBackend(), settings, servers=2)
    with pytest.raises(BackendError, match="each API server, of which there are 3, needs room"):
        start(worker_manager(vllm_config), CopyingBackend(), settings, servers=3)


@pytest.mark.parametrize(("merges", "warned"), [(1.0, True), (1.9, True), (2.0, False)])
def test_a_share_with_room_for_one_merge_alone_is_a_warning_at_the_start(
    vllm_config: VllmConfig, caplog: pytest.LogCaptureFixture, merges: float, warned: bool
) -> None:
    largest = start(worker_manager(vllm_config), CopyingBackend(), TRITON).largest
    settings = replace(TRITON, ready_gib=3 * merges * largest / GIB)
    logging.getLogger("vllm.merged_lora").addHandler(caplog.handler)
    try:
        start(worker_manager(vllm_config), CopyingBackend(), settings, servers=3)
    finally:
        logging.getLogger("vllm.merged_lora").removeHandler(caplog.handler)
    words = "each API server, of which there are 3, has no room for two: while requests use one of that size"
    assert (words in caplog.text) is warned


def test_a_worker_is_made_ready_when_vllm_has_made_its_layers(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, backend = worker_manager(vllm_config), CopyingBackend()
    layers = vars(manager).pop("_adapter_manager")
    enabled = SimpleNamespace(
        additional_config={"merged_lora": {"enable": True}},
        model_config=SimpleNamespace(enable_sleep_mode=False),
        parallel_config=SimpleNamespace(_api_process_count=1),
    )
    monkeypatch.setattr(worker_hooks, "load_backend", lambda name: backend)
    worker_hooks.wrap_init(lambda self, vllm_config: None)(manager, enabled)
    assert backend.reserved == []

    def create_lora_manager(self: Any, model: str, vllm_config: Any) -> str:
        self._adapter_manager = layers
        return f"{model} with LoRA"

    ready = worker_hooks.wrap_create_lora_manager(create_lora_manager)
    assert ready(manager, "a model", enabled) == "a model with LoRA"
    assert len(backend.reserved) == 1
    assert backend.warmed == [manager.lora_config.lora_dtype]


def test_a_backend_of_another_device_than_vllms_is_refused(vllm_config: VllmConfig) -> None:
    backend = CopyingBackend()
    backend.device = torch.device("cuda", 0)
    with pytest.raises(
        BackendError, match=r"merges on cuda:0, vLLM runs on cpu; .*--merged-lora-backend cpu"
    ):
        start(worker_manager(vllm_config), backend, TRITON)
    assert backend.reserved == []


def test_sleep_mode_is_refused_with_a_backend_that_keeps_sources_on_the_device(
    vllm_config: VllmConfig,
) -> None:
    with pytest.raises(BackendError, match="sleep mode"):
        start(worker_manager(vllm_config), CopyingBackend(), TRITON, sleeps=True)


def test_where_the_device_does_not_serve_auto_takes_the_cpu_and_says_so(
    vllm_config: VllmConfig, caplog: pytest.LogCaptureFixture
) -> None:
    backend = CopyingBackend()
    logging.getLogger("vllm.merged_lora").addHandler(caplog.handler)
    try:
        made = start(worker_manager(vllm_config), backend, Settings(enable=True), sleeps=True)
    finally:
        logging.getLogger("vllm.merged_lora").removeHandler(caplog.handler)
    assert isinstance(made.maker, HostMaker)
    assert backend.reserved == []
    assert "sleep mode takes the memory" in caplog.text


def test_a_backend_that_cannot_be_loaded_is_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merged_lora.backends.MODULES", {"triton": "merged_lora.no_such_backend"})
    load_backend.cache_clear()
    try:
        manager = SimpleNamespace()
        adapters = worker_hooks.VllmPlainAdapters(manager)
        with pytest.raises(BackendError, match="backend triton cannot be loaded"):
            worker_hooks._maker(manager, Settings(enable=True, backend="triton"), False, adapters)
    finally:
        load_backend.cache_clear()


@pytest.mark.parametrize(
    ("device", "usable", "workers", "threads"),
    [
        pytest.param("cpu", 64, 1, 33, id="one worker"),
        pytest.param("cpu", 80, 2, 9, id="two workers"),
        pytest.param("cpu", 64, 2, 1, id="two workers that leave one core each"),
        pytest.param("cpu", 8, 1, 1, id="fewer cores than the worker has threads"),
        pytest.param("cuda", 64, 1, 62, id="one device"),
        pytest.param("cuda", 64, 8, 6, id="eight devices"),
        pytest.param("cuda", 8, 8, 1, id="a core for each device"),
    ],
)
def test_by_default_merges_have_the_cores_that_the_workers_of_the_machine_leave_free(
    device: str, usable: int, workers: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[object] = []

    def usable_cores(cores: object) -> int:
        allowed.append(cores)
        return usable

    monkeypatch.setattr(worker_hooks, "usable_cores", usable_cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 31)
    manager, settings = SimpleNamespace(device=torch.device(device)), Settings(local_workers=workers)
    assert worker_hooks._threads(manager, settings) == threads
    assert worker_hooks._threads(manager, replace(settings, threads=5)) == 5
    assert allowed == [current.cores]  # not those of the thread that asks, which vLLM may have bound


@pytest.mark.parametrize(
    ("ranks", "engines", "here", "workers"),
    [(1, 1, 1, 1), (2, 1, 1, 2), (2, 2, 2, 4), (1, 4, 2, 2), (1, 2, 0, 1)],
)
def test_a_worker_knows_how_many_there_are_on_its_machine_in_all_engines(
    ranks: int, engines: int, here: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel = ParallelConfig(
        tensor_parallel_size=ranks,
        data_parallel_size=engines,
        data_parallel_size_local=here,
        distributed_executor_backend="mp",
    )
    monkeypatch.setattr(command_line, "_check_release", lambda accepted: None)
    monkeypatch.setattr(command_line, "current", replace(current))

    def create_engine_config(self: Any) -> Any:
        return SimpleNamespace(parallel_config=parallel, additional_config=self.additional_config)

    asked = SimpleNamespace(additional_config={"merged_lora": {"enable": True}})
    made = command_line.wrap_create_engine_config(create_engine_config)(asked)
    parallel.reconfigure_for_independent_dp_rank()  # as each engine of a dense model does
    assert Settings.of(made.additional_config).local_workers == workers


def test_the_number_of_threads_that_an_operator_gives_is_that_of_merging_and_of_reading(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Confined(CopyingBackend):
        def confine(self, threads: int, nice: int) -> None:
            confined.append(threads)

    def limit(threads: int) -> None:
        limits[threading.current_thread().name] = threads

    def own_nice(_: Progress) -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    confined, limits = list[int](), dict[str, int]()
    interval, nice = sys.getswitchinterval(), os.getpriority(os.PRIO_PROCESS, 0)
    monkeypatch.setattr(torch._C, "set_num_threads", limit)
    monkeypatch.setattr(worker_hooks, "load_backend", lambda name: Confined())
    manager = worker_manager(vllm_config)
    settings = Settings.of({"merged_lora": {"threads": "3"}})
    engine = SimpleNamespace(
        additional_config={"merged_lora": replace(settings, enable=True).to_config(api_server=False)},
        model_config=SimpleNamespace(enable_sleep_mode=False),
    )
    worker_hooks.wrap_init(lambda self, vllm_config: None)(manager, engine)
    merges: MergeWorker[LoRAModel] = getattr(manager, ATTRIBUTE)
    try:
        threads = merges._merger, merges._reader
        found = [thread.submit(lambda: Task(0.0, 1, own_nice)).result() for thread in threads]
    finally:
        merges.stop()
        sys.setswitchinterval(interval)
    assert confined == [3]
    assert limits == {"merged-lora-merge": 3, "merged-lora-read": 3}
    assert found == [max(10, nice), nice]  # the load of a plain adapter waits for the second one


def test_merges_start_in_a_server_that_is_nicer_than_they_have_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    set_values: list[int] = []
    monkeypatch.setattr(os, "getpriority", lambda which, who: 15)
    monkeypatch.setattr(os, "setpriority", lambda which, who, nice: set_values.append(nice))
    monkeypatch.setattr(os, "sched_setaffinity", lambda which, cores: None)
    monkeypatch.setattr(torch._C, "set_num_threads", lambda threads: None)
    interval = sys.getswitchinterval()
    try:
        worker_hooks._enter(CopyingBackend(), 1)
    finally:
        sys.setswitchinterval(interval)
    assert min(set_values, default=15) >= 15  # an ordinary user may not go below


def test_a_thread_that_merges_gives_way_to_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    confined: list[tuple[int, int]] = []

    class Confined(CopyingBackend):
        def confine(self, threads: int, nice: int) -> None:
            confined.append((threads, nice))

    interval, numbers = sys.getswitchinterval(), list[int]()
    monkeypatch.setattr(torch._C, "set_num_threads", numbers.append)
    cores = frozenset([min(os.sched_getaffinity(0))])
    monkeypatch.setattr(worker_hooks, "current", replace(current, cores=cores))
    found: list[tuple[set[int], int, int]] = []

    def enter() -> None:
        worker_hooks._enter(Confined(), 3)
        own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        found.append((os.sched_getaffinity(0), own, round(1e6 * sys.getswitchinterval())))

    thread = threading.Thread(target=enter)
    before = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)
    try:
        thread.start()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert found == [(set(cores), max(10, before[0]), 500)]
    assert (confined, numbers) == ([(3, 10)], [3])
    assert (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)) == before
