"""Merges that the backend triton writes into vLLM's slots, with Triton's interpreter in place of a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from making import random_adapter
from merged_lora.bench.launcher import ServerDiedError
from promises import assert_together_as_alone
from tiny import FLAGS, HIDDEN, MAX_RANK, SPECS, VOCABULARY, Place
from vllm_server import Server

pytestmark = pytest.mark.engine

INTERPRETER = {"TRITON_INTERPRET": "1"}
SPECS_HERE = SPECS | {
    "merged_attention": "sum(attention)",
    "merged_ends": "ties(ends, tails, density=0.5)",
    "merged_all": "dare_linear(sql, ends)",
}
"""More merges: of few modules, of an embedding and an output head, and of these with all other modules."""

OVERFLOW = 'linear(1e30*sql, chat, scale=5.5e16, compat="lorax")'
DEVICE_GIB = "0.00015"  # 161061 bytes; an adapter of all modules and rank 8 takes 35840

PROGRAM = """
import json, sys
from pathlib import Path
from merged_lora.engine import merge

specs, adapters, rank, folder = json.loads(sys.argv[1])
for name, spec in specs.items():
    merge(spec, adapters, backend="triton", rank=rank).save(Path(folder) / name)
"""


@pytest.fixture(scope="module")
def adapters(place: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The adapters of the place, two of the embedding and the output head, and the twins of SPECS_HERE."""
    root = tmp_path_factory.mktemp("device")
    found = dict(place.adapters)
    shapes = {"model.embed_tokens": (HIDDEN, VOCABULARY), "lm_head": (VOCABULARY, HIDDEN)}
    for seed, name in enumerate(("ends", "tails"), 6):
        found[name] = root / name
        made = random_adapter(shapes, 8, torch.bfloat16, seed, embeddings=["model.embed_tokens"])
        made.save(found[name])
    paths = {name: str(path) for name, path in found.items()}
    argument = json.dumps([SPECS_HERE, paths, MAX_RANK, str(root)])
    # In a process of its own: the interpreter is chosen when Triton is imported.
    subprocess.run([sys.executable, "-c", PROGRAM, argument], env=os.environ | INTERPRETER, check=True)
    return found | {name: root / name for name in SPECS_HERE}


def serve(place: Place, adapters: dict[str, Path], log: Path, *flags: str) -> Server:
    """A server that merges on its device, which is the CPU here."""
    return Server(
        place.model,
        *(
            *FLAGS,
            "--enable-merged-lora",
            "--max-lora-rank",
            str(MAX_RANK),
            "--merged-lora-backend",
            "triton",
        ),
        *("--merged-lora-gpu-gib", DEVICE_GIB, "--max-loras", "2", "--max-cpu-loras", "3"),
        *("--merged-lora-max-strength", "1e99"),  # so that a merge can overflow
        *("--lora-modules", *(f"{name}={path}" for name, path in adapters.items()), *flags),
        log=log,
        environment=INTERPRETER,
    )


@pytest.fixture(scope="module")
def device(
    place: Place, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The server, with two slots."""
    with serve(place, adapters, tmp_path_factory.mktemp("log") / "server.log") as running:
        yield running


@pytest.mark.parametrize("offline", SPECS_HERE)
def test_a_merge_on_a_device_equals_the_same_merge_written_to_disk(device: Server, offline: str) -> None:
    assert device.logprobs(SPECS_HERE[offline]) == device.logprobs(offline)


def test_it_is_the_backend_asked_for_that_merges(device: Server) -> None:
    device.logprobs("linear(sql, 0.25*chat)")
    lines = [line for line in device.log.read_text().splitlines() if " merged spec=" in line]
    assert lines
    assert all("backend=triton" in line for line in lines)


def test_nothing_of_a_whole_merge_is_left_under_one_of_attention_alone(device: Server) -> None:
    expected = device.logprobs("merged_attention")
    for weight in (0.11, 0.12):  # one for each slot
        device.logprobs(f"linear({weight}*sql, chat)")
    assert device.logprobs("sum(attention)") == expected
    for weight in (0.13, 0.14):
        device.logprobs(f"ties({weight}*ends, tails)")
    assert device.logprobs("linear(attention)") == device.logprobs("linear(1.0*attention, scale=1.0)")
    assert device.logprobs("sum(1.0*attention)") == expected


def test_a_merge_is_made_again_from_memory_after_its_sources_are_gone(
    device: Server, adapters: dict[str, Path]
) -> None:
    before = device.logprobs("svd(sql, tone, rank=4)")
    for weight in (0.6, 0.7, 0.8, 0.9):  # more than --max-cpu-loras, so that vLLM forgets the first merge
        device.logprobs(f"linear({weight}*chat, tone)")
    moved = adapters["tone"].with_name("tone_moved")
    shutil.move(adapters["tone"], moved)
    try:
        assert device.logprobs("svd(sql, tone, rank=4)") == before
        assert device.logprobs("linear(0.35*sql, tone)") != before
    finally:
        shutil.move(moved, adapters["tone"])


def test_more_merges_at_a_time_than_slots_are_all_served(device: Server) -> None:
    assert_together_as_alone(device)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("sum(sql, chat, tone, wide)", ("device memory", "reserve")),
        (OVERFLOW, ("overflows", "smaller weights")),
        ("linear(sql, wide)", ("equal ranks",)),
    ],
)
def test_a_merge_that_cannot_be_made_is_refused_and_the_server_lives_on(
    device: Server, spec: str, words: tuple[str, ...]
) -> None:
    before = device.logprobs("merged_sum")
    for _ in range(2):
        status, reply = device.post("/v1/completions", {"model": spec, "prompt": "x", "max_tokens": 1})
        assert status == 400
        for word in words:
            assert word in reply["error"]["message"]
    assert device.logprobs(SPECS["merged_sum"]) == before


@pytest.mark.soak
def test_two_ranks_merge_as_one_does(
    device: Server, place: Place, adapters: dict[str, Path], tmp_path: Path
) -> None:
    names = ("merged_sum", "merged_ties", "merged_attention", "merged_all", "merged_ends")
    alone = {name: device.logprobs(SPECS_HERE[name], max_tokens=3) for name in names}
    with serve(place, adapters, tmp_path / "server.log", "--tensor-parallel-size", "2") as pair:
        for name, values in alone.items():
            got = pair.logprobs(SPECS_HERE[name], max_tokens=3)
            assert got == pair.logprobs(name, max_tokens=3), name
            assert got == pytest.approx(values, abs=1e-4), name  # the ranks' float32 sums are added up
        status, _ = pair.post("/v1/completions", {"model": OVERFLOW, "prompt": "x"})
        assert status == 400
        assert pair.logprobs("merged_sum") == pair.logprobs(SPECS["merged_sum"])


def test_a_backend_that_needs_a_gpu_is_an_error_at_the_start_without_one(
    place: Place, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    server = Server(
        place.model,
        *(*FLAGS, "--enable-merged-lora", "--merged-lora-backend", "triton"),
        log=tmp_path / "server.log",
        environment={"TRITON_INTERPRET": "0"},
    )
    with pytest.raises(ServerDiedError), server:
        pass
    assert "backend triton needs a CUDA or ROCm device" in (tmp_path / "server.log").read_text()
