"""A server whose adapters and sources come from another server."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator

import pytest

import tiny
from fetched import Site, https_site, own_caches
from merged_lora.files.layout import WEIGHTS_NAME
from stand_ins import Answer, Asked
from tiny import FLAGS, MAX_RANK, Place
from vllm_server import Server

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("other engines")]


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


def test_no_folder_of_the_cache_is_needed_any_more(fetching: Server, site: Site) -> None:
    shutil.rmtree(os.environ["MERGED_LORA_CACHE"])
    fetching.logprobs(f"ties({site.location('sql')}, 0.25*chat)")
    fetching.logprobs("sql")
