"""Merges in offline inference, in a process of its own, because vLLM allows one engine in each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fetched import https_site, own_caches
from making import random_adapter
from merged_lora.bench.launcher import ENVIRONMENT
from tiny import Place
from vllm_server import Server

pytestmark = pytest.mark.engine

QUERY = "model.layers.0.self_attn.q_proj"

PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
from merged_lora.errors import MergeError
from merged_lora.vllm_plugin.offline import merged_lora_request

if __name__ == "__main__":
    model, adapters = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8, max_lora_rank=16,
              additional_config={"merged_lora": {"enable": True}})
    request = merged_lora_request(llm, "ties(sql, chat, density=0.2)", adapters)
    try:
        merged_lora_request(llm, "linear(sql, wide)", adapters)
    except MergeError as error:
        refused = [str(error)]
    for name in ("narrow", "stranger"):
        try:
            merged_lora_request(llm, f"sum({name})", adapters)
            refused.append("not refused")
        except MergeError as error:
            refused.append(str(error))
    parameters = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True)
    output = llm.generate(["The quick brown fox"], parameters, lora_request=request)[0].outputs[0]
    logprobs = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids)]
    print("RESULT " + json.dumps([refused, logprobs]))
"""


def test_an_offline_merge_equals_the_served_one(
    server: Server, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_caches(tmp_path, monkeypatch)
    with https_site(tmp_path, monkeypatch) as site:
        run_offline(
            server, {**place.adapters, "chat": site.put("chat", place.adapters["chat"])}, place, tmp_path
        )


def run_offline(server: Server, places: dict[str, Path | str], place: Place, tmp_path: Path) -> None:
    """Merge adapters, of which one is fetched, and compare with the server's merge."""
    paths = dict(places)
    for name, modules in (("narrow", {QUERY: (64, 32)}), ("stranger", {"model.layers.0.mixer": (64, 64)})):
        paths[name] = tmp_path / name
        random_adapter(modules, 8, torch.bfloat16).save(paths[name])
    adapters = json.dumps({name: str(path) for name, path in paths.items()})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(place.model), adapters],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    refused, logprobs = json.loads(lines[0].removeprefix("RESULT "))
    assert "equal ranks" in refused[0]
    assert f"{QUERY} has shape (64, 64) in the model" in refused[1]
    assert "no module model.layers.0.mixer" in refused[2]
    assert logprobs == server.logprobs("mix")
