"""A real engine whose steps go on while merges are made, and a limit on a step that no merge may reach."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from faults import STEADY, THREAD_ENDS
from tiny import FLAGS, MAX_RANK, Place, importing_tests
from vllm_server import PROMPT, Server

pytestmark = pytest.mark.engine

STEP_LIMIT = 10
"""Seconds after which vLLM counts a step as hung and ends; its default is 300.  With 5, an engine ended at
its first request, before any merge, on cores that other tests used too."""
ROUNDS, ALONE, BESIDE = 10, 2.0, 4.0
"""How often at most a stream is watched for that many seconds without a merge, and then beside one."""
SHARE = 0.1
"""Part of the time beside a merge that it may take from the stream; a stall of a second took 0.16 or more."""


@pytest.fixture(scope="module")
def limited(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two slots, no copies beyond them, one ready merge, and little time for a step."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    with start(place, log, "--merged-lora-max-ad-hoc", "1") as running:
        yield running


def start(place: Place, log: Path, *flags: str) -> Server:
    """The server; its workers heed the seeds of ``faults.py``."""
    return Server(
        place.model,
        *(*FLAGS, "--enable-merged-lora", "--max-lora-rank", str(MAX_RANK), "--max-loras", "2"),
        *("--max-cpu-loras", "2", "--worker-extension-cls", "faults.Faults", *flags),
        *("--lora-modules", *(f"{name}={path}" for name, path in place.adapters.items())),
        log=log,
        # One thread: several would wait for each other at every barrier, on cores that other tests use too.
        environment={
            "OMP_NUM_THREADS": "1",
            "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(STEP_LIMIT),
            **importing_tests(),
        },
    )


def slow(seconds: int, name: str = "sql") -> str:
    """A merge that takes that long."""
    return f"dare_linear({name}, density=0.9, seed={STEADY + seconds})"


@contextmanager
def watching(server: Server) -> Iterator[list[float]]:
    """Stream beside what is done meanwhile; the list gets the times at which tokens came."""
    times: list[float] = []
    done = threading.Event()
    body = {"model": "chat", "prompt": PROMPT, "max_tokens": 240, "stream": True, "ignore_eos": True}

    def stream() -> None:
        # One client for all requests, so that only the first one is slow.
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not done.is_set():
                with client.stream("POST", f"{server.url}/v1/completions", json=body) as reply:
                    assert reply.status_code == 200
                    lines = (line for line in reply.iter_lines() if line.startswith("data: {"))
                    times.extend(time.monotonic() for _ in lines)

    thread = threading.Thread(target=stream)
    thread.start()
    try:
        yield times
    finally:
        done.set()
        thread.join(120)


def stalled(times: list[float], spans: list[tuple[float, float]]) -> list[float]:
    """The part of each span for which a stream stood still, beyond its longest gap outside of all spans.

    times: at which its tokens came.
    spans: begin and end of each.
    """
    gaps = list(itertools.pairwise(times))
    beside = [[gap for gap in gaps if gap[0] < end and begin < gap[1]] for begin, end in spans]
    usual = max((b - a for a, b in set(gaps).difference(*beside)), default=0.0)
    return [
        sum(max(0.0, b - a - usual) for a, b in gaps_of_it) / (end - begin)
        for gaps_of_it, (begin, end) in zip(beside, spans, strict=True)
    ]


@contextmanager
def asking(server: Server, model: str) -> Iterator[None]:
    """A client that asks for a merge and leaves at the end of this context."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps({"model": model, "prompt": "x", "max_tokens": 1}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        yield


def making(server: Server) -> list[dict[str, Any]]:
    """The merges in the making, as the server reports them."""
    found: list[dict[str, Any]] = server.get("/v1/merged_lora")[1]["making"]
    return found


def eventually(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_merge_of_twenty_seconds_delays_no_stream_and_ends_when_its_client_leaves(limited: Server) -> None:
    cancelled = 'merged_lora_merges_total{result="cancelled",strategy="dare_linear"}'
    limited.logprobs("chat")  # what only the first request pays
    spans: list[tuple[float, float]] = []
    with watching(limited) as times:
        for i in range(1, ROUNDS + 1):
            time.sleep(ALONE)
            if spans and min(stalled(times, spans)) < SHARE:
                break
            begin = time.monotonic()
            with asking(limited, slow(20)):
                eventually(lambda: [m["state"] for m in making(limited)] == ["merging"])
                time.sleep(BESIDE)
                (one,) = making(limited)
                assert one["requests"] == 1
                assert one["merged_for"] > BESIDE / 2
                assert limited.metrics()["merged_lora_queue"] == 1
            eventually(lambda: making(limited) == [])
            eventually(lambda i=i: limited.metrics().get(cancelled) == i)
            spans.append((begin, time.monotonic()))
    begin = time.monotonic()
    limited.logprobs("sum(0.5*tone)")  # the thread is free again
    assert time.monotonic() - begin < 10
    assert len(times) > 200
    # Whatever else the machine does holds a stream up too: four busy processes on two cores for up to 4 s,
    # with a merge and without.  It does so in some rounds, while what a merge takes it takes in each.
    assert min(stalled(times, spans)) < SHARE


def test_slow_merges_that_lost_their_slot_are_not_made_again(limited: Server) -> None:
    seconds = STEP_LIMIT + 2
    first = limited.logprobs(slow(seconds))
    for model in ("sql", "chat", "tone"):  # both slots, and all that vLLM keeps beside them
        limited.logprobs(model)
    before = limited.metrics()
    begin = time.monotonic()
    assert limited.logprobs(slow(seconds)) == pytest.approx(first, abs=1e-5)
    assert time.monotonic() - begin < STEP_LIMIT
    after = limited.metrics()
    hits, made = "merged_lora_cache_hits_total", "merged_lora_merge_seconds_count"
    assert (after[hits] - before[hits], after[made] - before[made]) == (1, 0)
    assert "made again within a step" not in limited.log.read_text()


def test_slow_merges_that_made_room_for_others_are_made_again_beside_the_steps(limited: Server) -> None:
    seconds, again = STEP_LIMIT + 2, "merged_lora_made_again_total"
    first = limited.logprobs(slow(seconds))
    limited.logprobs("sum(0.2*tone)")  # takes its place
    limited.logprobs("sum(0.3*tone)")  # and with this one, the worker hears of it
    before = limited.metrics()
    begin = time.monotonic()
    assert limited.logprobs(slow(seconds)) == pytest.approx(first, abs=1e-5)
    assert time.monotonic() - begin > STEP_LIMIT
    assert limited.metrics()[again] - before[again] == 1
    assert "made again within a step" not in limited.log.read_text()


def test_short_merges_pass_a_long_one(limited: Server) -> None:
    with asking(limited, slow(60)):
        eventually(lambda: [m["state"] for m in making(limited)] == ["merging"])
        begin = time.monotonic()
        for weight in (0.31, 0.32, 0.33):
            limited.logprobs(f"ties({weight}*sql, chat)")
        assert time.monotonic() - begin < 20
        assert len(making(limited)) == 1  # the long one
    eventually(lambda: making(limited) == [])


def test_fifty_dropped_requests_cost_no_merge(limited: Server) -> None:
    made = "merged_lora_merge_seconds_count"
    limited.logprobs("sum(0.7*tone)")
    before = limited.metrics()[made]
    with asking(limited, slow(60)):
        eventually(lambda: [m["state"] for m in making(limited)] == ["merging"])
        for i in range(5):  # ten at a time, which is fewer than may wait
            clients = [asking(limited, slow(60 + 10 * i + j, "tone")) for j in range(10)]
            for client in clients:
                client.__enter__()
            eventually(lambda: len(making(limited)) == 11)
            for client in clients:
                client.__exit__(None, None, None)
            eventually(lambda: len(making(limited)) == 1)
    eventually(lambda: making(limited) == [])
    begin = time.monotonic()
    limited.logprobs("sum(0.8*tone)")
    assert time.monotonic() - begin < 10
    assert limited.metrics()[made] - before == 1


def test_a_fault_that_ends_a_thread_is_one_answer(limited: Server) -> None:
    for _ in range(2):
        model = f"dare_linear(sql, seed={THREAD_ENDS})"
        status, reply = limited.post("/v1/completions", {"model": model, "prompt": "x"})
        assert status == 500
        assert "SystemExit" in reply["error"]["message"]
    limited.logprobs("sum(0.9*tone)")


def test_a_request_that_waits_for_a_merge_ends_when_the_engine_dies(place: Place, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool, start(place, tmp_path / "server.log") as server:
        named = re.search(r"\(EngineCore pid=(\d+)\)", server.log.read_text())
        assert named is not None
        engine = int(named[1])
        os.kill(engine, signal.SIGSTOP)  # so that it dies in the middle of a call
        reply = pool.submit(server.post, "/v1/completions", {"model": "sum(0.3*sql)", "prompt": "x"})
        time.sleep(1)
        os.kill(engine, signal.SIGKILL)
        status, body = reply.result(30)
    assert status == 500
    assert body["error"]["type"] == "InternalServerError"  # as vLLM answers other requests


def test_a_server_that_is_stopped_in_the_middle_of_a_merge_ends_at_once(limited: Server) -> None:
    # The last test of this file: nothing runs on the server after it.
    with asking(limited, slow(600)):
        eventually(lambda: [m["state"] for m in making(limited)] == ["merging"])
        assert len(limited.processes()) > 2  # with the engine's and the worker's, which end by themselves
        os.kill(limited.pid, signal.SIGTERM)
        eventually(lambda: limited.processes() == [], 20)
