"""Requests that kill plain vLLM, or make it serve wrong weights, and must not with the plugin."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pytest
import torch

import faults
import tiny
from making import random_adapter
from merged_lora.engine import merge
from tiny import Place
from vllm_server import Server

pytestmark = pytest.mark.engine

LONG = "All work and no play makes Jack a dull boy. " * 5
"""More than one block of the prefix cache, which holds whole blocks of 128 tokens, here characters."""


def load(server: Server, name: str, path: Path, **more: Any) -> tuple[int, Any]:
    """Load an adapter at run time."""
    body = {"lora_name": name, "lora_path": str(path)} | more
    found: tuple[int, Any] = server.post("/v1/load_lora_adapter", body)
    return found


def evict_all(server: Server) -> None:
    """Ask for more adapters than ``--max-cpu-loras``, so that vLLM forgets all others."""
    for weight in (0.91, 0.92, 0.93, 0.94):
        server.logprobs(f"linear({weight}*chat, sql)", max_tokens=1)


def cached(server: Server, model: str) -> tuple[int, list[float]]:
    """How many tokens of a long prompt came from the prefix cache, and the answer's log-probabilities."""
    body = {
        "model": model,
        "prompt": LONG,
        "max_tokens": 4,
        "temperature": 0,
        "logprobs": 1,
        "ignore_eos": True,
    }
    status, reply = server.post("/v1/completions", body)
    assert status == 200, reply
    details = reply["usage"]["prompt_tokens_details"] or {"cached_tokens": 0}
    return details["cached_tokens"], reply["choices"][0]["logprobs"]["token_logprobs"]


def test_a_fault_in_a_worker_is_one_answer_and_the_engine_lives(server: Server) -> None:
    before = server.logprobs("mix")
    for _ in range(2):
        body = {"model": f"dare_linear(sql, seed={faults.ALL_FAIL})", "prompt": "x"}
        status, reply = server.post("/v1/completions", body)
        assert status == 500
        assert "a fault on demand" in reply["error"]["message"]
    assert server.logprobs("mix") == before


def test_an_adapter_is_served_from_memory_after_its_folder_is_gone(
    server: Server, place: Place, tmp_path: Path
) -> None:
    for name in ("vanishing", "broken"):
        shutil.copytree(place.adapters["tone"], tmp_path / name)
        assert load(server, name, tmp_path / name)[0] == 200
    expected, merged = server.logprobs("tone"), server.logprobs("ties(vanishing, broken, sql)")
    shutil.rmtree(tmp_path / "vanishing")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"not an adapter")
    for _ in range(2):
        evict_all(server)
        assert server.logprobs("vanishing") == expected
        assert server.logprobs("broken") == expected
        assert server.logprobs("ties(vanishing, broken, sql)") == merged
    assert server.logprobs("ties(vanishing, broken, 0.5*sql)") != merged


def test_one_merge_in_many_spellings_is_one_adapter_in_one_batch(server: Server) -> None:
    spellings = [
        "ties(sql, chat, density=0.31)",
        "ties( chat , 1.0*sql,density=3.1e-1)",
        "ties(chat, sql, density=.31)",
    ]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(server.logprobs, spellings * 2))
    assert len({tuple(round(value, 3) for value in answer) for answer in answers}) == 1


def test_an_adapter_reloaded_in_place_makes_new_merges_and_shares_no_cache_with_old_ones(
    server: Server, place: Place, tmp_path: Path
) -> None:
    tiny.make_adapter(21).save(tmp_path / "live")
    assert load(server, "live", tmp_path / "live")[0] == 200
    for seed in (21, 22):
        merge("linear(live, sql)", {"live": tiny.make_adapter(seed), "sql": place.adapters["sql"]}).save(
            place.sources / f"reloaded{seed}"
        )
    old, fresh = (cached(server, f"sum(reloaded{seed})")[1] for seed in (21, 22))
    assert cached(server, "linear(live, sql)") == (0, old)
    assert cached(server, "linear(live, sql)")[0] >= 128
    tiny.make_adapter(22).save(tmp_path / "live", overwrite=True)
    assert load(server, "live", tmp_path / "live", load_inplace=True)[0] == 200
    assert cached(server, "linear(live, sql)") == (0, fresh)
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "live"})[0] == 200


def test_an_adapter_that_vllm_loads_again_in_every_step_is_loaded_from_memory(
    server: Server, place: Place, tmp_path: Path
) -> None:
    shutil.copytree(place.adapters["tone"], tmp_path / "again")
    assert load(server, "again", tmp_path / "again", load_inplace=True)[0] == 200
    shutil.rmtree(tmp_path / "again")
    for _ in range(2):
        assert server.logprobs("again", max_tokens=20) == server.logprobs("tone", max_tokens=20)
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "again"})[0] == 200


def test_merges_share_the_cache_with_themselves_alone(server: Server) -> None:
    models = [f"ties(sql, chat, density={d})" for d in (0.41, 0.42)] + ["sql"]
    for model in models:
        first, answer = cached(server, model)
        again, repeated = cached(server, model)
        assert (first, again >= 128) == (0, True), model
        assert repeated == pytest.approx(answer, abs=1e-5)


def test_a_redefined_alias_is_new_and_requests_under_way_finish_on_the_old_one(server: Server) -> None:
    server.post("/v1/merged_lora/moving", {"spec": "sum(0.5*sql)"})
    alone = server.logprobs("moving", max_tokens=100)
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(server.logprobs, "moving", max_tokens=100)
        time.sleep(0.2)
        assert server.post("/v1/merged_lora/moving", {"spec": "sum(-2*tone)"})[0] == 200
        after = server.logprobs("moving")
    assert under_way.result() == pytest.approx(alone, abs=1e-4)
    assert after == pytest.approx(server.logprobs("sum(-2*tone)"), abs=1e-4)
    assert server.delete("/v1/merged_lora/moving")[0] == 200


def test_an_adapter_unloaded_under_way_finishes_its_requests(
    server: Server, place: Place, tmp_path: Path
) -> None:
    shutil.copytree(place.adapters["tone"], tmp_path / "going")
    assert load(server, "going", tmp_path / "going")[0] == 200
    expected = server.logprobs("ties(going, sql)", max_tokens=150)
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(server.logprobs, "ties(going, sql)", max_tokens=150)
        time.sleep(0.2)
        assert server.post("/v1/unload_lora_adapter", {"lora_name": "going"})[0] == 200
        shutil.rmtree(tmp_path / "going")
        evict_all(server)
    assert under_way.result() == pytest.approx(expected, abs=1e-4)
    status, _ = server.post("/v1/completions", {"model": "ties(going, sql)", "prompt": "x"})
    assert status == 404


@pytest.mark.parametrize("damage", ["missing", "truncated", "stranger", "rank"])
def test_an_adapter_that_cannot_be_loaded_is_refused_and_the_engine_lives(
    server: Server, place: Place, tmp_path: Path, damage: str
) -> None:
    if damage == "truncated":
        shutil.copytree(place.adapters["tone"], tmp_path / damage)
        weights = tmp_path / damage / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    if damage == "stranger":
        shapes = {"model.layers.0.self_attn.q_proj": (32, 64)}
        random_adapter(shapes, 8, torch.bfloat16).save(tmp_path / damage)
    if damage == "rank":  # its tensors are of rank 32, and its configuration says 8
        tiny.make_adapter(31, rank=32).save(tmp_path / damage)
        config = tmp_path / damage / "adapter_config.json"
        config.write_text(config.read_text().replace('"r": 32', '"r": 8'))
    before = server.logprobs("mix")
    status, reply = load(server, damage, tmp_path / damage)
    assert status == (404 if damage == "missing" else 400), reply
    assert server.logprobs("mix") == before
    assert server.post("/v1/completions", {"model": damage, "prompt": "x"})[0] == 404


def test_new_merges_beyond_the_queue_are_told_when_to_come_back(server: Server, place: Place) -> None:
    import urllib.error
    import urllib.request

    def ask(model: str) -> tuple[int, str | None]:
        data = f'{{"model": "{model}", "prompt": "x", "max_tokens": 1}}'.encode()
        request = urllib.request.Request(
            server.url + "/v1/completions", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, reply.headers["Retry-After"]
        except urllib.error.HTTPError as error:
            return error.code, error.headers["Retry-After"]

    place.hold.touch()
    with ThreadPoolExecutor(41) as pool:
        try:
            held = pool.submit(ask, f"dare_linear(sql, seed={faults.HELD})")
            while not server.get("/v1/merged_lora")[1]["making"]:
                time.sleep(0.02)
            asked = [pool.submit(ask, f"sum({1 + i / 64}*chat)") for i in range(40)]
            refused = [answer.result() for answer in itertools.islice(as_completed(asked, timeout=120), 8)]
        finally:
            place.hold.unlink()
    assert held.result() == (200, None)
    assert {status for status, _ in refused} == {429}
    assert all(after is not None and int(after) >= 1 for _, after in refused)
    assert sorted(answer.result()[0] for answer in asked) == [200] * 32 + [429] * 8
    server.logprobs("sum(1.984375*chat)")


def test_a_client_killed_in_mid_stream_leaves_nothing_behind(server: Server) -> None:
    program = """
import json, sys, urllib.request
body = {"model": "ties(sql, tone, density=0.77)", "prompt": "x", "max_tokens": 240}
body |= {"stream": True, "ignore_eos": True}
request = urllib.request.Request(sys.argv[1], json.dumps(body).encode(), {"Content-Type": "application/json"})
with urllib.request.urlopen(request) as reply:
    print(reply.readline(), flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", program, server.url + "/v1/completions"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline()
        client.kill()
    running = 'vllm:num_requests_running{engine="0",model_name="base"}'
    end = time.monotonic() + 30
    while server.metrics()[running] and time.monotonic() < end:
        time.sleep(0.2)
    assert server.metrics()[running] == 0
    server.logprobs("ties(sql, tone, density=0.77)")
