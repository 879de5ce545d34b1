"""The playground's proxy: it passes on what the page needs, to one server, for its own page alone."""

from __future__ import annotations

import asyncio
import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.testclient import TestClient

from merged_lora.errors import EvaluationError
from merged_lora.playground.pages import HEADERS, PATH
from merged_lora.playground.proxy import MAX_BODY, address, application
from playground_server import Running, Stub

PORT = 8900
OWN = f"http://127.0.0.1:{PORT}"


class Recorder(httpx.AsyncBaseTransport):
    """A network that keeps what is sent, and gives one reply."""

    def __init__(self, reply: Callable[[httpx.Request], httpx.Response] | None = None) -> None:
        self.sent: list[httpx.Request] = []
        self._reply = reply or (lambda request: httpx.Response(200, json={"data": []}))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self.sent.append(request)
        return self._reply(request)


def client(recorder: Recorder, base_url: str = "http://gpu:8000/v1", at: str = OWN) -> TestClient:
    return TestClient(application(base_url, PORT, recorder), base_url=at, follow_redirects=False)


@contextmanager
def proxied(server: Any, transport: httpx.AsyncBaseTransport | None = None) -> Iterator[str]:
    """The address of a proxy of a server, an ASGI application."""
    with (
        Running(lambda port: server) as behind,
        Running(lambda port: application(behind.url, port, transport)) as front,
    ):
        yield front.url


@contextmanager
def asking(url: str, seconds: float) -> Iterator[httpx.Response]:
    """The reply to a POST, as it comes."""
    with (
        httpx.Client(trust_env=False, timeout=seconds) as page,
        page.stream("POST", url, json={}) as reply,
    ):
        yield reply


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", "/v1/models"), ("GET", "/v1/merged_lora"), ("GET", "/v1/merged_lora/merges/0a1b")),
        *(("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/merged_lora/check")),
        ("POST", "/v1/merged_lora/a%2Fb%20%3F%23"),
    ],
)
@pytest.mark.parametrize("base_url", ["http://gpu:8000/v1", "http://gpu:8000", "http://gpu:8000/v1/"])
def test_routes_of_the_page_are_passed_on(method: str, path: str, base_url: str) -> None:
    recorder = Recorder()
    reply = client(recorder, base_url).request(method, path)
    assert (reply.status_code, reply.json()) == (200, {"data": []})
    (sent,) = recorder.sent
    assert (sent.method, str(sent.url)) == (method, f"http://gpu:8000{path}")
    assert {name: reply.headers[name] for name in HEADERS} == HEADERS


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", "/v1/"), ("GET", "/v1/chat/completions"), ("GET", "/v1/merged_lora/mix")),
        *(("POST", "/v1/models"), ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/merged_lora/a/b")),
        *(("GET", "/metrics"), ("POST", "/v1/merged_lora/.."), ("POST", "/v1/merged_lora/%2e%2E")),
        *(("POST", "/v1/merged_lora/%2e%2e/../models"), ("POST", "/v1/merged_lora/.")),
        *(("DELETE", "/v1/merged_lora/mix"), ("GET", "/v1/models/"), ("GET", "/v1/merged_lora/merges/../x")),
        *(
            ("HEAD", "/v1/models"),
            ("GET", "/v1/models@evil"),
            ("GET", "//evil/v1/models"),
            ("POST", "/v1/merged_lora/"),
            ("POST", "/v1/merged_lora/..%2F..%2Fload_lora_adapter"),
            ("POST", "/v1/merged_lora/a%2F%2E%2E%2Fb"),
        ),
    ],
)
def test_no_other_route_is(method: str, path: str) -> None:
    recorder = Recorder()
    with proxied(Stub().app(), recorder) as url:
        page = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)  # sends a path as it is
        page.request(method, path)
        assert page.getresponse().status in (404, 405)
        page.close()
    assert recorder.sent == []


def test_the_key_and_the_body_are_passed_on_and_nothing_else() -> None:
    recorder = Recorder()
    headers = {"Authorization": "Bearer s3cret", "Cookie": "a=b", "X-Own": "1", "Origin": OWN}
    client(recorder).post("/v1/completions?x=1", json={"model": "a + b"}, headers=headers)
    (sent,) = recorder.sent
    assert sent.headers["authorization"] == "Bearer s3cret"
    assert sent.headers["content-type"] == "application/json"
    assert not {"cookie", "x-own", "origin", "referer"} & set(sent.headers)
    assert sent.content == b'{"model":"a + b"}'
    assert str(sent.url) == "http://gpu:8000/v1/completions"


def test_what_the_page_reads_comes_back_and_nothing_else() -> None:
    kept = {"merged-lora": '"0a";new=1;ms=2.0', "retry-after": "3", "content-type": "application/json"}
    away = {"set-cookie": "a=b", "access-control-allow-origin": "*", "content-security-policy": "none"}
    recorder = Recorder(lambda request: httpx.Response(429, headers={**kept, **away}, json={}))
    reply = client(recorder).get("/v1/models")
    assert reply.status_code == 429
    assert {name: reply.headers[name] for name in kept} == kept
    assert "set-cookie" not in reply.headers
    assert "access-control-allow-origin" not in reply.headers
    assert reply.headers["content-security-policy"] == HEADERS["content-security-policy"]


def test_a_redirect_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # nor is a proxy of the environment asked
    elsewhere = Stub(fault=lambda path, body: RedirectResponse("http://127.0.0.1:9/v1/models"))
    with (
        elsewhere.running() as site,
        TestClient(application(site.url, PORT), base_url=OWN, follow_redirects=False) as page,
    ):
        reply = page.get("/v1/models")
    assert reply.status_code == 307
    assert "location" not in reply.headers


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": f"evil.example:{PORT}"},
        {"host": "127.0.0.1"},
        {"host": f"127.0.0.1:{PORT + 1}"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": f"http://localhost:{PORT}"},  # another origin than that of the host
        {"origin": f"https://127.0.0.1:{PORT}"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", f"{PATH}/app.js", f"{PATH}/api/about"])
def test_a_page_from_elsewhere_gets_nothing(headers: dict[str, str], path: str) -> None:
    recorder = Recorder()
    reply = client(recorder).get(path, headers=headers)
    assert (reply.status_code, recorder.sent) == (403, [])


def test_a_page_from_elsewhere_may_lead_to_ours() -> None:
    headers = {"sec-fetch-site": "cross-site"}
    assert client(Recorder()).get(f"{PATH}/", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_our_own_page_is_at_every_name_of_loopback(host: str) -> None:
    at = f"http://{host}:{PORT}"
    page = client(Recorder(), at=at)
    assert page.get("/v1/models", headers={"origin": at}).status_code == 200
    assert page.get("/").headers["location"] == f"{PATH}/"


def test_browsers_leave_port_80_out() -> None:
    page = TestClient(application("http://gpu:8000/v1", 80, Recorder()), base_url="http://localhost")
    assert page.get("/v1/models", headers={"origin": "http://localhost"}).status_code == 200


def test_a_large_body_is_refused() -> None:
    recorder = Recorder()
    reply = client(recorder).post("/v1/completions", content=b" " * (MAX_BODY + 1))
    assert (reply.status_code, recorder.sent) == (413, [])


def test_a_server_that_is_not_there_is_an_error_that_says_so() -> None:
    with TestClient(application("http://127.0.0.1:9", PORT), base_url=OWN) as page:
        reply = page.get("/v1/models")
    assert reply.status_code == 502
    assert reply.json()["error"]["message"].startswith("no server answers at http://127.0.0.1:9/v1 (")


@pytest.mark.parametrize(
    "base_url",
    [
        *("", "localhost:8000", "ftp://x/v1", "http://", "http:///v1", "http://x:port/v1", "file:///etc"),
        *("http://x/v1?key=1", "http://x/v1#a", "http://user:pass@x/v1", "http://[::1/v1", "http://x:99999"),
    ],
)
def test_an_address_that_is_none_is_refused(base_url: str) -> None:
    with pytest.raises(EvaluationError, match="is no address of a server"):
        address(base_url)


@pytest.mark.parametrize("stops", ["before the reply", "in the answer"])
def test_a_page_that_leaves_ends_the_request_at_the_server(stops: str) -> None:
    """Whether the merge is still being made, or its answer has begun."""
    arrived, gone = threading.Event(), threading.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        assert scope["path"] == "/v1/completions"
        arrived.set()
        if stops == "in the answer":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"data: ", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    with proxied(slow) as url:
        page = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
        page.request("POST", "/v1/completions", "{}")
        if stops == "in the answer":
            assert page.getresponse().read(6) == b"data: "
        assert arrived.wait(10)
        page.close()
        assert gone.wait(10)


def test_a_stream_arrives_as_it_comes_and_its_end_in_the_middle_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    read = threading.Event()

    async def half(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"99")]})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        assert await asyncio.to_thread(read.wait, 10)
        raise ConnectionResetError

    with proxied(half) as url, asking(f"{url}/v1/completions", 10) as reply:
        parts = reply.iter_raw()
        assert next(parts) == b"data: 1\n\n"
        read.set()
        assert list(parts) == []
    assert "the server stopped in the middle of an answer" in caplog.text


def test_json_errors_of_the_server_come_through() -> None:
    wrong: Response = JSONResponse({"error": {"message": "no", "param": "model"}}, 400)
    with (
        Stub(fault=lambda path, body: wrong).running() as site,
        TestClient(application(site.url, PORT), base_url=OWN) as page,
    ):
        reply = page.post("/v1/completions", json={"model": "x"})
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "no")
