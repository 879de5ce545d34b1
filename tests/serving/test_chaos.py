"""Many clients, folders that vanish, change and break, names that change, nonsense in between."""

from __future__ import annotations

import itertools
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tiny
from merged_lora.adapters import Adapter
from merged_lora.engine import merge
from soak import resident_bytes
from tiny import MAX_RANK, Place
from vllm_server import Server

pytestmark = pytest.mark.engine

REQUESTS, MERGES, CLIENTS = 200, 60, 4
SLACK = 64 << 20
"""Bytes that the allocators of a server may keep."""

LOADED, FOLDER = ("k0", "k1", "k2"), ("d0", "d1", "d2")
NONSENSE = (
    ("ties(k0", 400),
    ("linear(k0, nobody)", 404),
    ("nobody", 404),
    ("svd(k0, k1, rank=99)", 400),
    ("sum(" + "k0+" * 900 + "k1)", 400),
    ("linear(1e999*k0, k1)", 400),
    ('sum("../k0")', 400),
    ("\u0000", 404),
)


def specs() -> list[str]:
    """Distinct merges of the six adapters."""
    rules = (
        "ties({}, {}, density=0.3)",
        "dare_ties({}, {}, seed=9)",
        "0.5*{} + 0.25*{}",
        "linear({}, 0.5*{})",
    )
    pairs = itertools.combinations((*LOADED, *FOLDER), 2)
    return [rule.format(*pair) for pair in pairs for rule in rules][:MERGES]


def test_two_hundred_requests_in_chaos_get_their_own_merge_or_their_own_error(
    server: Server, place: Place, tmp_path: Path
) -> None:
    first = {name: tiny.make_adapter(100 + i) for i, name in enumerate((*LOADED, *FOLDER))}
    second = first | {"d2": tiny.make_adapter(200)}  # d2 changes its content in between
    expected = twins(server, place, [first, second])
    for name in LOADED:
        first[name].save(tmp_path / name)
        body = {"lora_name": name, "lora_path": str(tmp_path / name)}
        assert server.post("/v1/load_lora_adapter", body)[0] == 200
    for name in FOLDER:
        first[name].save(place.sources / name)
    server.logprobs("sum(k0, k1, k2, d0, d1, d2)")  # from now on, all of them are in memory
    held, resident = server.get("/v1/merged_lora")[1]["bytes_held"], resident_bytes(server.pid)

    random.seed(0)
    asked = [(spec, 200) for spec in random.choices(specs(), k=REQUESTS - 60 - 20) + specs()]
    asked += [NONSENSE[i % len(NONSENSE)] for i in range(20)]
    random.shuffle(asked)
    done = threading.Event()

    def client(question: tuple[str, int]) -> str | None:
        spec, status = question
        if status != 200:
            got, reply = server.post("/v1/completions", {"model": spec, "prompt": "x", "max_tokens": 1})
            return None if got == status else f"{spec}: {got} {reply}"
        answer = server.logprobs(spec)
        good = [twin for twin in expected[spec] if answer == pytest.approx(twin, abs=1e-4)]
        return None if good else f"{spec}: {answer}, not one of {expected[spec]}"

    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        trouble = pool.submit(make_trouble, server, place, tmp_path, first, second, done)
        try:
            faults = [fault for fault in pool.map(client, asked) if fault]
        finally:
            done.set()
        trouble.result()
    assert not faults
    assert server.logprobs("sum(0.5*d0, 0.25*d1)") == pytest.approx(expected["0.5*d0 + 0.25*d1"][0], abs=1e-4)
    assert server.get("/v1/merged_lora")[1]["bytes_held"] <= held + 2 * tiny.make_adapter(1).nbytes
    assert resident_bytes(server.pid) < resident + SLACK
    for name in LOADED:
        assert server.post("/v1/unload_lora_adapter", {"lora_name": name})[0] == 200


def twins(server: Server, place: Place, contents: list[dict[str, Adapter]]) -> dict[str, list[list[float]]]:
    """The expected answer of each merge, from the same merge on disk: before and after a source changes."""
    found: dict[str, list[list[float]]] = {spec: [] for spec in specs()}
    for spec in specs():
        for i, adapters in enumerate(contents[: 2 if "d2" in spec else 1]):
            merge(spec, adapters, rank=MAX_RANK).save(place.sources / f"twin{i}", overwrite=True)
            found[spec].append(server.logprobs(f"sum(twin{i})"))
    return found


def make_trouble(
    server: Server,
    place: Place,
    loaded: Path,
    first: dict[str, Adapter],
    second: dict[str, Adapter],
    done: threading.Event,
) -> None:
    """Delete, break, replace and restore folders, and change an alias, until it is stopped."""
    for turn in itertools.count():
        for name in LOADED:
            shutil.rmtree(loaded / name, ignore_errors=True)
        (place.sources / "d0" / "adapter_model.safetensors").write_bytes(b"broken")
        shutil.rmtree(place.sources / "d1", ignore_errors=True)
        (first, second)[turn % 2]["d2"].save(place.sources / "d2", overwrite=True)
        alias = ("sum(k0)", "sum(k1)", "linear(k0, nobody)")[turn % 3]
        status, reply = server.post("/v1/merged_lora/chaotic", {"spec": alias})
        assert status == (404 if "nobody" in alias else 201 if turn == 0 else 200), reply
        stop = done.wait(0.3)
        first["d0"].save(place.sources / "d0", overwrite=True)
        first["d1"].save(place.sources / "d1", overwrite=True)
        if stop:
            assert server.delete("/v1/merged_lora/chaotic")[0] == 200
            return
