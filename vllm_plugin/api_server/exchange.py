"""The HTTP request under way: whether it carries the server's key, and headers that its reply gets.

vLLM's routes know neither when they check a model.  Knows ASGI, and nothing of vLLM.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from merged_lora.errors import MergeError

HEADER = "merged-lora"
"""Names the merge that answered: a structured field (RFC 9651), a string with parameters."""


class KeyMissingError(MergeError):
    """A merge was asked for without the server's API key."""


@dataclass
class Exchange:
    """A request and its reply.

    has_key: whether the request carries one of the server's keys, or the server asks for none.
    headers: what is added to the headers of the reply.
    """

    has_key: bool = True
    headers: dict[str, str] = field(default_factory=dict)


_exchange: ContextVar[Exchange | None] = ContextVar("merged_lora_exchange", default=None)


def has_key() -> bool:
    """Whether the request under way carries one of the server's keys, or needs none."""
    exchange = _exchange.get()
    return exchange is None or exchange.has_key


def check_key() -> None:
    """Raise KeyMissingError if the request under way lacks the key that the server asks for."""
    if not has_key():
        add_header("www-authenticate", "Bearer")
        raise KeyMissingError(
            "a merge needs the server's API key on this route too: Authorization: Bearer KEY"
        )


def add_header(name: str, value: str) -> None:
    """Add a header to the reply of the request under way, if it came over HTTP."""
    exchange = _exchange.get()
    if exchange is not None:
        exchange.headers[name] = value


def name_merge(digest: str, new: bool, seconds: float) -> None:
    """Name the merge that answers, in the reply's headers.

    digest:  of the merge.
    new:     whether this request waited until it was made.
    seconds: how long it took to make.
    """
    add_header(HEADER, f'"{digest}";new={int(new)};ms={seconds * 1e3:.1f}')


class Exchanges:
    """ASGI middleware that keeps an :class:`Exchange` for every request.

    It looks for the key itself, because vLLM asks for one on some routes only: ``/invocations`` and
    ``/pooling``, for example, are open.

    keys: the keys that the server accepts; none if it asks for none.
    """

    def __init__(self, app: Any, keys: Collection[str] = ()) -> None:
        self._app = app
        self._keys = [_hashed(key) for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        exchange = Exchange(has_key=self._has_key(scope))
        _exchange.set(exchange)

        async def sending(message: Any) -> None:
            if exchange.headers and message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in exchange.headers.items()]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        await self._app(scope, receive, sending)

    def _has_key(self, scope: Any) -> bool:
        if not self._keys:
            return True
        given = next(
            (value for name, value in scope.get("headers", ()) if name.lower() == b"authorization"), b""
        )
        scheme, _, key = given.decode("latin-1").partition(" ")
        hashed = _hashed(key)
        matches = [
            secrets.compare_digest(hashed, each) for each in self._keys
        ]  # all, so that time shows nothing
        return scheme.lower() == "bearer" and any(matches)


def _hashed(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
