"""Tensor parallel, several API servers and data parallel serve the same as one process of each kind."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import faults
from merged_lora.engine import merge
from tiny import FLAGS, MAX_RANK, SPECS, Place, importing_tests
from vllm_server import Server

pytestmark = pytest.mark.engine

NAMES = ("merged_sum", "merged_ties", "merged_dare_ties", "merged_svd", "merged_parts")
KEY = "a-secret"


def serve(place: Place, root: Path, *flags: str) -> Server:
    """A server with the adapters and the offline twins of some merges."""
    for name in NAMES:
        merge(SPECS[name], place.adapters, rank=MAX_RANK).save(root / name)
    modules = {**place.adapters, **{name: root / name for name in NAMES}}
    return Server(
        place.model,
        *(*FLAGS, "--enable-merged-lora", "--max-lora-rank", str(MAX_RANK), "--max-loras", "2"),
        *("--max-cpu-loras", "3", "--lora-modules", *(f"{name}={path}" for name, path in modules.items())),
        *flags,
        log=root / "server.log",
        environment=importing_tests(),
        api_key=KEY,
    )


def assert_the_same(several: Server, one: Server) -> None:
    """Each merge equals its twin on the same server to the last bit, and the server of one process nearly."""
    for name in NAMES:
        got = several.logprobs(SPECS[name])
        assert got == several.logprobs(name), name
        assert got == pytest.approx(one.logprobs(SPECS[name]), abs=1e-5), name


def ask(server: Server, route: str, body: dict[str, Any] | None = None, key: str | None = None) -> int:
    """The status of a request with this API key, over a connection of its own."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = json.dumps(body).encode() if body is not None else None
    try:
        with urllib.request.urlopen(
            urllib.request.Request(server.url + route, data, headers), timeout=60
        ) as reply:
            status: int = reply.status
            return status
    except urllib.error.HTTPError as error:
        return error.code


def test_two_ranks_and_two_api_servers_serve_as_one(place: Place, server: Server, tmp_path: Path) -> None:
    flags = ("--tensor-parallel-size", "2", "--api-server-count", "2", "--merged-lora-runtime-aliases")
    with serve(place, tmp_path, *flags, "--worker-extension-cls", "faults.Faults") as several:
        assert_the_same(several, server)

        # A fault of one rank alone answers one request, and the replies of later ones are their own.
        before = several.logprobs("merged_sum")
        for _ in range(2):
            body = {"model": f"dare_linear(sql, chat, seed={faults.LAST_RANK_FAILS})", "prompt": "x"}
            status, reply = several.post("/v1/completions", body)
            assert (status, "a fault on demand" in reply["error"]["message"]) == (500, True)
            status, _ = several.post("/v1/completions", {"model": "linear(sql, wide)", "prompt": "x"})
            assert status == 400
        assert several.logprobs("merged_sum") == several.logprobs(SPECS["merged_sum"]) == before

        # The key that guards every route guards ours.
        asked = {"spec": "sum(sql)"}
        for route, more in (
            ("/v1/merged_lora", None),
            ("/v1/merged_lora/m", asked),
            ("/v1/merged_lora/check", asked),
        ):
            assert ask(several, route, more) == ask(several, route, more, "wrong") == 401
        assert several.delete("/v1/merged_lora/m")[0] == 404
        plain: dict[str, Any] = {"prompt": "x", "max_tokens": 1, "model": "base"}
        for given, status in ((None, 401), ("wrong", 401), (KEY, 200)):
            merged = plain | {"merged_adapters": {"ids": ["sql"], "weights": [0.321]}}
            assert ask(several, "/invocations", merged, given) == status
            assert ask(several, "/invocations", plain, given) == 200  # as vLLM does

        # A replay finds what it finds with one process, and a refusal comes from every rank at once.
        for spec in ("sum(sql)", "ties(sql, tone)"):
            replies = [s.post("/v1/merged_lora/check", {"spec": spec})[1] for s in (several, server)]
            for here, there in zip(*(reply["sources"] for reply in replies), strict=True):
                assert here == {**there, "nll": pytest.approx(there["nll"], abs=1e-4)}
        assert several.post("/v1/merged_lora/check", {"spec": "sum(chat)"})[0] == 400
        assert several.logprobs("merged_sum") == before

        # An alias defined through one API server is known to the other, and both merge the same.
        assert several.post("/v1/merged_lora/shared", {"spec": "0.25*sql + tone"})[0] == 201
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(several.logprobs, ["shared"] * 12))
        for answer in answers:
            assert answer == pytest.approx(answers[0], abs=1e-4)

        # One of them dies in the middle of a merge, and the other serves on.
        lasting = {"model": f"dare_linear(sql, seed={faults.STEADY + 600})", "prompt": "x"}
        with ThreadPoolExecutor(9) as pool:
            waiting = [pool.submit(several.post, "/v1/completions", lasting) for _ in range(8)]
            eventually(lambda: several.metrics()["merged_lora_queue"] > 0)
            os.kill(processes(several, "ApiServer_")[0], signal.SIGKILL)
            eventually(lambda: "keep serving" in several.log.read_text())
            assert len(processes(several, "ApiServer_")) == 1
            for _ in range(8):
                assert several.logprobs("merged_sum") == before
            assert several.logprobs("ties(sql, tone, density=0.9)")
            # What waited at the dead one does not count any more.
            assert several.metrics()["merged_lora_queue"] == len(merging(several))

            # A rank dies in the middle of a merge: who waits for it has an error, and the server ends.
            waiting.append(pool.submit(several.post, "/v1/completions", lasting))
            eventually(lambda: merging(several) == ["merging"])
            os.kill(processes(several, "Worker_TP1")[0], signal.SIGKILL)
            status, reply = waiting[-1].result(30)
            assert (status, reply["error"]["type"]) == (500, "InternalServerError")
        eventually(lambda: several.processes() == [], 60)  # vLLM lets the other rank have some seconds


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def merging(server: Server) -> list[str]:
    """The states of the merges in the making, as the API server that answers reports them."""
    return [making["state"] for making in server.get("/v1/merged_lora")[1]["making"]]


def processes(server: Server, name: str) -> list[int]:
    """Ids of the server's processes that log under a name."""
    found = re.findall(rf"\({name}\d* pid=(\d+)\)", server.log.read_text())
    return sorted(set(map(int, found)) & set(server.processes()))


@pytest.mark.soak
def test_two_engines_serve_as_one(place: Place, server: Server, tmp_path: Path) -> None:
    with serve(place, tmp_path, "--data-parallel-size", "2") as several:
        assert_the_same(several, server)
        with ThreadPoolExecutor(8) as pool:  # so that both engines have work
            answers = list(pool.map(several.logprobs, [SPECS["merged_sum"]] * 16))
        for answer in answers:
            assert answer == pytest.approx(answers[0], abs=1e-4)
        assert (
            several.metrics()[
                'vllm:request_success_total{engine="1",finished_reason="length",model_name="base"}'
            ]
            > 0
        )
        assert several.post("/v1/completions", {"model": "linear(sql, wide)", "prompt": "x"})[0] == 400
