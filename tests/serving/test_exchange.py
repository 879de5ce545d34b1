"""What a reply says of the merge that answered, and who may have one: without a server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from merged_lora.vllm_plugin.api_server.exchange import (
    Exchanges,
    KeyMissingError,
    add_header,
    check_key,
    name_merge,
)

Headers = list[tuple[bytes, bytes]]


def reply(app: Any, *keys: str, authorization: str | None = None, kind: str = "http") -> Headers:
    """The headers with which an application answers a request."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    given = [] if authorization is None else [(b"Authorization", authorization.encode())]
    asyncio.run(Exchanges(app, keys)({"type": kind, "headers": given}, None, send))
    return [header for message in sent for header in message.get("headers", ())]


def test_a_header_is_added_to_the_first_message_and_to_no_other() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        name_merge("0" * 32, new=True, seconds=0.01634)
        add_header("retry-after", "7")
        await send({"type": "http.response.start", "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body"})

    assert reply(app) == [
        (b"a", b"b"),
        (b"merged-lora", b'"00000000000000000000000000000000";new=1;ms=16.3'),
        (b"retry-after", b"7"),
    ]


def test_requests_at_a_time_keep_their_headers_apart() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0)
        name_merge(scope["name"], new=False, seconds=0.0)
        await asyncio.sleep(0)
        await send({"type": "http.response.start"})

    async def run() -> list[Headers]:
        served = Exchanges(app)

        async def one(name: str) -> Headers:
            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.extend(message["headers"])

            await served({"type": "http", "name": name}, None, send)
            return sent

        return await asyncio.gather(*(one(str(i)) for i in range(5)))

    assert asyncio.run(run()) == [[(b"merged-lora", f'"{i}";new=0;ms=0.0'.encode())] for i in range(5)]


@pytest.mark.parametrize(
    ("authorization", "keys", "has_key"),
    [
        (None, (), True),
        ("Bearer wrong", (), True),
        (None, ("one",), False),
        ("Bearer one", ("one",), True),
        ("bearer two", ("one", "two"), True),
        ("Bearer three", ("one", "two"), False),
        ("Basic one", ("one",), False),
        ("one", ("one",), False),
        ("Bearer", ("one",), False),
        ("Bearer ", ("one",), False),
        ("Bearer \xff", ("one",), False),
    ],
)
def test_a_key_is_the_one_that_vllm_would_take(
    authorization: str | None, keys: tuple[str, ...], has_key: bool
) -> None:
    found = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            check_key()
            found.append(True)
        except KeyMissingError:
            found.append(False)
        await send({"type": "http.response.start"})

    headers = reply(app, *keys, authorization=authorization)
    assert found == [has_key]
    assert ((b"www-authenticate", b"Bearer") in headers) == (not has_key)


def test_a_call_that_did_not_come_over_http_needs_no_key() -> None:
    check_key()
    add_header("a", "b")
