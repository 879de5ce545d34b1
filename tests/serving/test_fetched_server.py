"""A server whose adapters and sources come from another server."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tiny
from fetched import Site, https_site, own_caches
from merged_lora.engine import merge
from merged_lora.files.layout import WEIGHTS_NAME
from stand_ins import Answer, Asked, Fault
from tiny import FLAGS, MAX_RANK, Place
from vllm_server import PROMPT, Server

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("other engines")]

CLIENTS, OF_EACH, REQUESTS = 6, 2, 60
ENDS = {
    "clean": 200,
    "stalls": 200,
    "stumbles": 200,
    "fails": 503,
    "lies": 503,
    "changes": 503,
    "denied": 403,
    "gone": 404,
}
"""How a fetch ends by the fault of its place; see :func:`faulty`."""
BACK = 60.0
"""Seconds after which a client gives up that comes back for its merge."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """An HTTPS server with adapters, and the environment in which they are fetched from it."""
    root = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        own_caches(root, patch)
        with https_site(root, patch) as site:
            for seed, name in enumerate(("sql", "chat", "tone"), 1):
                tiny.make_adapter(seed, scaling=1.0 if name == "chat" else 2.0).save(root / name)
                site.put(name, root / name)
            yield site


@pytest.fixture(scope="module")
def fetching(site: Site, place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the adapter ``sql`` from elsewhere and ``chat`` from here, that may fetch others."""
    with Server(
        place.model,
        *(*FLAGS, "--enable-merged-lora", "--max-lora-rank", str(MAX_RANK), "--max-loras", "2"),
        *("--lora-modules", f"sql={site.location('sql')}", f"chat={place.adapters['chat']}"),
        *("--merged-lora-allow", site.location("*"), "hf:org/*", "--merged-lora-fetch-seconds", "1"),
        log=tmp_path_factory.mktemp("log") / "server.log",
        environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    ) as running:
        yield running


def test_adapters_from_elsewhere_answer_as_those_from_here(fetching: Server, site: Site) -> None:
    for name in ("sql", "chat"):
        assert fetching.logprobs(f"sum({site.location(name)})") == pytest.approx(
            fetching.logprobs(name), abs=1e-4
        )
    expected = fetching.logprobs("ties(sql, 0.5*chat)")
    merged = fetching.logprobs(f"ties({site.location('sql')}, 0.5*{site.location('chat')})")
    assert merged == pytest.approx(expected, abs=1e-4)


def test_a_client_learns_why_a_source_does_not_come(fetching: Server, site: Site) -> None:
    def status(spec: str) -> int:
        return fetching.post("/v1/completions", {"model": spec, "prompt": "x", "max_tokens": 1})[0]

    assert status(f"sum({site.location('none')})") == 404
    assert status("sum(s3://bucket/sql)") == 403
    assert status('sum("hf:org/repo@v1")') == 403
    body = {"lora_name": "loaded", "lora_path": "s3://bucket/sql"}
    assert fetching.post("/v1/load_lora_adapter", body)[0] == 403
    assert fetching.get("/health")[0] == 200


def test_a_client_comes_back_for_a_source_that_takes_long(fetching: Server, site: Site) -> None:
    def stalled(asked: Asked, answer: Answer) -> Answer:
        if asked.method == "GET" and asked.path.endswith(WEIGHTS_NAME):
            answer.cut, answer.stall = 100, True
        return answer

    model = f"sum({site.location('tone')})"
    body = {"model": model, "prompt": "x", "max_tokens": 1}
    site.server.fault = stalled
    reply = fetching.send("/v1/completions", body)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "10"), reply.text
    assert fetching.get("/v1/merged_lora")[1]["fetching"][0]["location"] == site.location("tone")
    fetching.logprobs("sql")
    site.server.fault = lambda asked, answer: answer
    site.server.released.set()
    end = time.monotonic() + 60
    while fetching.get("/v1/merged_lora")[1]["fetching"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    fetching.logprobs(model)


def test_an_adapter_may_be_loaded_at_run_time_from_an_allowed_place(fetching: Server, site: Site) -> None:
    body = {"lora_name": "loaded", "lora_path": site.location("chat")}
    assert fetching.post("/v1/load_lora_adapter", body)[0] == 200
    assert fetching.logprobs("loaded") == pytest.approx(fetching.logprobs("chat"), abs=1e-4)


def faulty(site: Site, other: Path) -> Fault:
    """Faults of the places ``FAULT-NUMBER``; see ``ENDS``.

    other: the adapter that takes the place of one while it is fetched.
    """

    def fault(asked: Asked, answer: Answer) -> Answer:
        name = asked.path.split("/")[2]
        weights = asked.path.endswith(WEIGHTS_NAME)
        first = weights and asked.method == "GET" and len(site.server.asked_for(asked.path)) == 1
        match name.partition("-")[0]:
            case "stalls" if first:
                answer.cut, answer.stall = 100, True
            case "changes" if first:
                site.put(name, other)
                answer.cut = 100
            case "lies" if weights and answer.status == 200:
                answer.headers["Content-Length"] = str(len(answer.body) + 7)
                answer.cut = len(answer.body)
            case "stumbles" if first:
                return Answer(500)
            case "fails":
                return Answer(500)
            case "denied":
                return Answer(403)
            case "gone":
                return Answer(404)
        return answer

    return fault


def reply_about(server: Server, location: str, spec: str) -> tuple[int, list[float]]:
    """Status and log-probabilities of a merge of a source, once that is not on its way any more."""
    body = {"model": spec.format(location), "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    end = time.monotonic() + BACK
    while True:
        reply = server.send("/v1/completions", body | {"logprobs": 1, "ignore_eos": True})
        if reply.status_code == 200:
            return 200, reply.json()["choices"][0]["logprobs"]["token_logprobs"]
        assert location in reply.json()["error"]["message"], reply.text
        assert reply.headers.get("retry-after") == ("10" if reply.status_code == 503 else None)
        if "on its way" not in reply.text and "on their way" not in reply.text:
            return reply.status_code, []
        assert time.monotonic() < end, reply.text
        time.sleep(0.2)


def test_in_chaos_each_request_gets_its_merge_or_its_own_error_and_later_its_merge(
    fetching: Server, site: Site, place: Place, tmp_path: Path
) -> None:
    def twin(spec: str, adapters: dict[str, Path]) -> list[float]:
        name = f"twin-{len(list(tmp_path.iterdir()))}"
        merge(spec, adapters, rank=MAX_RANK).save(tmp_path / name)
        return fetching.logprobs(f"sum({site.put(name, tmp_path / name)})")

    for seed, name in enumerate(("first", "other"), 7):
        tiny.make_adapter(seed).save(tmp_path / name)
    elsewhere, spec = place.adapters | {n: tmp_path / n for n in ("first", "other")}, "ties({}, 0.5*chat)"
    first, other = twin(spec.format("first"), elsewhere), twin(spec.format("other"), elsewhere)
    here = {name: fetching.logprobs(name) for name in ("sql", "chat")}
    here |= {each: twin(each, place.adapters) for each in ("dare_ties(sql, chat)", "0.5*sql + 0.25*chat")}
    names = [f"{fault}-{number}" for fault in ENDS for number in range(OF_EACH)]
    for name in names:
        site.put(name, tmp_path / "first")

    def ask_here(model: str) -> None:
        assert fetching.logprobs(model) == pytest.approx(here[model], abs=1e-4), model

    def ask_in_chaos(name: str) -> None:
        status, values = reply_about(fetching, site.location(name), spec)
        assert (name, status) == (name, ENDS[name.partition("-")[0]])
        assert not values or values == pytest.approx(first, abs=1e-4), name

    def ask_later(name: str) -> None:
        end = time.monotonic() + BACK
        while (reply := reply_about(fetching, site.location(name), spec))[0] != 200:
            assert time.monotonic() < end, f"{name}: {reply[0]}"
            time.sleep(0.5)
        expected = other if name.startswith("changes") else first
        assert reply[1] == pytest.approx(expected, abs=1e-4), name

    done = threading.Event()

    def release() -> None:
        """Let stalled answers end, some at a time, until it is stopped."""
        while not done.wait(1.5):
            site.server.released.set()
            site.server.released.clear()

    locally = itertools.islice(itertools.cycle(here), REQUESTS - len(names))
    asked = [(ask_in_chaos, name) for name in names] + [(ask_here, model) for model in locally]
    random.Random(0).shuffle(asked)
    site.server.released.clear()
    site.server.fault = faulty(site, tmp_path / "other")
    releasing = threading.Thread(target=release)
    releasing.start()
    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda each: each[0](each[1]), asked))
    finally:
        site.server.fault = lambda asked, answer: answer
        done.set()
        releasing.join()
        site.server.released.set()
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(ask_later, names))
    cache = Path(os.environ["MERGED_LORA_CACHE"])
    whole = set(site.server.files.values())
    kept = [file for file in cache.rglob("*.*") if file.is_file() and not file.name.startswith(".")]
    assert {file.parent.parent.name for file in kept if file.suffix == ".safetensors"} == {"adapters"}
    assert all(file.read_bytes() in whole for file in kept if file.parent.name != "places")
    assert not list(cache.glob(".*-*"))


def test_no_folder_of_the_cache_is_needed_any_more(fetching: Server, site: Site) -> None:
    shutil.rmtree(os.environ["MERGED_LORA_CACHE"])
    fetching.logprobs(f"ties({site.location('sql')}, 0.25*chat)")
    fetching.logprobs("sql")
