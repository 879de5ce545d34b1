"""What operators see and change in a running server: ``/v1/merged_lora``, a folder of sources, metrics."""

from __future__ import annotations

import shutil
from urllib.parse import quote

import httpx
import pytest

import tiny
from merged_lora.adapters import Adapter
from merged_lora.engine import merge
from merged_lora.playground.pages import POLICY
from tiny import MAX_AD_HOC, Place
from vllm_server import Server

pytestmark = pytest.mark.engine


def merges(server: Server) -> dict[str, dict[str, object]]:
    """The live merges, by canonical spec."""
    _, report = server.get("/v1/merged_lora")
    return {merge["spec"]: merge for merge in report["merges"]}


def test_the_report_tells_what_is_served(server: Server, place: Place) -> None:
    server.logprobs("mix")
    server.logprobs("svd(0.5*sql, chat, rank=4)")
    server.logprobs("core_ties(sql, chat, weights=auto)")
    sources = merges(server)['core_ties(chat, sql, weights="auto")']["sources"]
    assert isinstance(sources, list)
    assert [source["weight"] for source in sources] == [None, None]
    before = merges(server)["svd(chat, 0.5*sql, rank=4)"]
    server.logprobs("svd(chat, 0.5*sql, rank=4)")
    _, report = server.get("/v1/merged_lora")
    assert {"alias": "mix", "spec": "ties(chat, sql, density=0.2)"} in report["aliases"]
    live = merges(server)["svd(chat, 0.5*sql, rank=4)"]
    assert live["strategy"] == "svd"
    digests = {"chat": tiny.make_adapter(2, scaling=1.0).digest}  # without a calibration
    digests["sql"] = Adapter.load(place.adapters["sql"]).identity
    assert live["sources"] == [
        {"name": "chat", "weight": 1.0, "digest": digests["chat"]},
        {"name": "sql", "weight": 0.5, "digest": digests["sql"]},
    ]
    assert live["rank"] == 4
    assert 0 < live["kept_energy"] < 1  # type: ignore[operator]
    assert live["hits"] == before["hits"] + 1  # type: ignore[operator]
    assert live["last_used"] > before["last_used"]  # type: ignore[operator]
    assert live["digest"] == before["digest"]
    sources = {source["name"]: source for source in report["sources"]}
    assert sources["sql"]["digest"] == digests["sql"]
    assert report["bytes_held"] >= sum(source["bytes"] for source in sources.values()) / 2


def test_the_playground_is_served_beside_the_routes(server: Server) -> None:
    page = httpx.get(f"{server.url}/merged_lora/", trust_env=False)
    assert (page.status_code, page.headers["content-security-policy"]) == (200, POLICY)
    status, found = server.post("/merged_lora/api/form", {"spec": "0.5 * sql + chat"})
    assert (status, found["spec"]) == (200, "sum(chat, 0.5*sql)")


def test_one_merge_is_reported_by_its_digest(server: Server) -> None:
    server.logprobs("mix")
    _, report = server.get("/v1/merged_lora")
    assert report["runtime_aliases"] is True
    (mix,) = (merge for merge in report["merges"] if merge["spec"] == "ties(chat, sql, density=0.2)")
    status, found = server.get(f"/v1/merged_lora/merges/{mix['digest']}")
    assert (status, found) == (200, mix)
    status, reply = server.get(f"/v1/merged_lora/merges/{'0' * 32}")
    assert (status, reply["error"]["type"]) == (404, "NotFoundError")


def test_an_alias_is_added_redefined_and_removed(server: Server) -> None:
    status, reply = server.post("/v1/merged_lora/fresh", {"spec": "0.4*sql + 0.6*tone"})
    assert (status, reply["alias"], reply["spec"]) == (201, "fresh", "sum(0.4*sql, 0.6*tone)")
    first = server.logprobs("fresh")
    assert first == server.logprobs("sum(0.4*sql, 0.6*tone)")
    status, _ = server.post("/v1/merged_lora/fresh", {"ids": ["sql", "chat"], "merge_strategy": "ties"})
    assert status == 200
    assert server.logprobs("fresh") == server.logprobs("ties(sql, chat)") != first
    assert "fresh" in {card["id"] for card in server.get("/v1/models")[1]["data"]}
    assert server.delete("/v1/merged_lora/fresh") == (200, {"alias": "fresh", "removed": True})
    assert server.delete("/v1/merged_lora/fresh")[0] == 404
    assert server.post("/v1/completions", {"model": "fresh", "prompt": "x"})[0] == 404


@pytest.mark.parametrize(
    ("alias", "body", "status", "words"),
    [
        ("bad", {"spec": "linear(sql, wide)"}, 400, "equal ranks"),
        ("bad", {"spec": "sum(nobody)"}, 404, "nobody"),
        ("bad", {"spec": "ties(sql, chat"}, 400, "character"),
        ("bad", {"spec": 7}, 400, '"spec"'),
        ("bad", {"spec": "sum(sql)", "more": 1}, 400, '"spec"'),
        ("bad", {"ids": "sql"}, 400, '"ids"'),
        ("bad", b"[1, 2", 400, "not JSON"),
        ("bad", b"[" * 100_000, 400, "more than 65536 bytes"),
        ("bad", b"[" * 60_000, 400, "not JSON"),
        ("bad", b"\xff\xfe", 400, "not JSON"),
        ("sql", {"spec": "sum(chat)"}, 400, "already served"),
        ("base", {"spec": "sum(chat)"}, 400, "already served"),
        ("../bad", {"spec": "sum(chat)"}, 400, "is a path"),
        ("a\0b", {"spec": "sum(chat)"}, 400, "control character"),
        ("x" * 300, {"spec": "sum(chat)"}, 400, "256 characters"),
        ("ties(sql, tone)", {"spec": "sum(chat)"}, 400, "reads as a merge"),
        ("0.7 sql + 0.3 tone", {"spec": "sum(chat)"}, 400, "reads as a merge"),
        (" ", {"spec": "sum(chat)"}, 400, "is blank"),
        ("sq\u202el", {"spec": "sum(chat)"}, 400, "invisible character, U+202E"),
    ],
)
def test_a_wrong_alias_is_refused_and_not_defined(
    server: Server, alias: str, body: dict[str, object] | bytes, status: int, words: str
) -> None:
    before = server.get("/v1/merged_lora")[1]["aliases"]
    got, reply = server.post(f"/v1/merged_lora/{quote(alias, safe='')}", body)
    assert got == status, reply
    assert words in reply["error"]["message"]
    assert server.get("/v1/merged_lora")[1]["aliases"] == before


def test_an_adapter_whose_name_is_something_else_is_not_loaded(server: Server, place: Place) -> None:
    for name, words in (
        ("ties(sql, tone)", "reads as a merge"),
        ("sum(0.5 sql + tone)", "reads as a merge"),
        ("\u200b", "invisible character"),
    ):
        body = {"lora_name": name, "lora_path": str(place.adapters["tone"])}
        status, reply = server.post("/v1/load_lora_adapter", body)
        assert status == 400, reply
        assert words in reply["error"]["message"]
    body = {"lora_name": "größe (v2)/x", "lora_path": str(place.adapters["tone"])}
    assert server.post("/v1/load_lora_adapter", body)[0] == 200
    assert server.logprobs("größe (v2)/x") == server.logprobs("tone") == server.logprobs('"größe (v2)/x"')
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "größe (v2)/x"})[0] == 200


def test_a_folder_of_sources_needs_no_restart(server: Server, place: Place) -> None:
    spec = "ties(sql, later/one, density=0.5)"
    status, _ = server.post("/v1/completions", {"model": spec, "prompt": "x"})
    assert status == 404
    tiny.make_adapter(11).save(place.sources / "later" / "one")
    first = server.logprobs(spec)
    tiny.make_adapter(12).save(place.sources / "later" / "one", overwrite=True)
    assert server.logprobs(spec) != first
    tiny.make_adapter(11).save(place.sources / "later" / "one", overwrite=True)
    assert server.logprobs(spec) == first
    shutil.rmtree(place.sources / "later")
    assert server.logprobs(spec) == first
    assert server.post("/v1/completions", {"model": "later/one", "prompt": "x"})[0] == 404


def test_a_folder_of_sources_ends_at_its_walls(server: Server, place: Place) -> None:
    (place.sources / "outward").symlink_to(place.adapters["tone"])
    for name in ('"../tone"', "outward", '"later/../../tone"', f'"{place.adapters["tone"]}"'):
        status, reply = server.post("/v1/completions", {"model": f"sum({name})", "prompt": "x"})
        assert status in (400, 404), reply


def test_metrics_count_and_hold_no_text_of_the_client(server: Server) -> None:
    def count(name: str) -> float:
        value: float = server.metrics().get(name, 0.0)
        return value

    made = 'merged_lora_merges_total{result="made",strategy="slerp"}'
    refused = 'merged_lora_merges_total{result="refused",strategy="linear"}'
    before = [count(name) for name in (made, refused, "merged_lora_cache_hits_total")]
    before.append(count("merged_lora_merge_seconds_count"))
    server.logprobs("slerp(sql, chat, t=0.123)")
    server.logprobs("slerp(sql, chat, t=0.123)")
    server.post("/v1/completions", {"model": "linear(sql, 0.77*wide)", "prompt": "x"})
    after = [count(name) for name in (made, refused, "merged_lora_cache_hits_total")]
    after.append(count("merged_lora_merge_seconds_count"))
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1, 1]
    assert count("merged_lora_bytes_held") == server.get("/v1/merged_lora")[1]["bytes_held"]
    text = "\n".join(server.metrics())
    assert "0.123" not in text
    assert "merged-lora:" not in text


def test_endless_distinct_merges_leave_nothing_that_grows(server: Server) -> None:
    def ask(count: int, first: float) -> None:
        for i in range(count):
            body = {"model": f"sum({first + i}*sql)", "prompt": "x", "max_tokens": 1}
            assert server.post("/v1/completions", body)[0] == 200

    ask(1, 0.5)
    models, series = len(server.get("/v1/models")[1]["data"]), set(server.metrics())
    ask(MAX_AD_HOC + 5, 1.5)
    assert len(server.get("/v1/models")[1]["data"]) == models
    assert len(merges(server)) <= MAX_AD_HOC + len(server.get("/v1/merged_lora")[1]["aliases"])
    assert {name for name in set(server.metrics()) - series if "evictions" not in name} == set()


def test_one_line_of_the_log_tells_of_each_merge(server: Server) -> None:
    spec = "dare_ties(sql, chat, seed=4711)"
    server.logprobs(spec)
    server.logprobs(spec)
    digest = merges(server)["dare_ties(chat, sql, seed=4711)"]["digest"]
    lines = [line for line in server.log.read_text().splitlines() if f"digest={digest}" in line]
    assert len(lines) == 1
    for word in ("merged spec='dare_ties(chat, sql, seed=4711)'", "backend=cpu rank=8 modules=14", "ms="):
        assert word in lines[0]


def test_a_merge_from_disk_and_from_the_folder_are_the_same(server: Server, place: Place) -> None:
    tiny.make_adapter(13).save(place.sources / "thirteen")
    merge("linear(a, b)", {"a": place.adapters["sql"], "b": place.sources / "thirteen"}).save(
        place.sources / "offline"
    )
    assert server.logprobs("linear(sql, thirteen)") == server.logprobs("sum(offline)")
