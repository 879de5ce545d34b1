"""Passes the page's requests on to one server: the routes that the page needs, and no other.

Speaks to the address that it was given and to nothing else: it follows no redirect, and takes no proxy from
the environment.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from merged_lora.errors import EvaluationError, SpecError
from merged_lora.http_requests import GONE, body_of, while_connected

from .pages import HEADERS, PATH, pages, refusal

logger = logging.getLogger(__name__)

MAX_BODY = 8 << 20
CONNECT_SECONDS = 10.0
HTTP_PORT = 80
"""The port that browsers leave out."""
PASSED_ON = {
    "GET": re.compile(r"/v1/(models|merged_lora(/merges/[0-9a-f]{1,64})?)"),
    "POST": re.compile(r"/v1/(chat/completions|completions|merged_lora/[A-Za-z0-9_.~!*'()%-]+)"),
}
"""The paths that are passed on, percent-encoded, by method."""
OWN_SITES = (None, "same-origin", "none")
"""What browsers say of requests that our own page or the user made."""
SENT = ("authorization", "content-type")
RETURNED = ("content-type", "merged-lora", "retry-after", "www-authenticate")
"""The headers that are passed on, of requests and of replies."""


def application(base_url: str, port: int, transport: httpx.AsyncBaseTransport | None = None) -> Starlette:
    """The page, at ``/merged_lora/``, with the routes of a server under ``/v1``.

    base_url:  of the server's API; ``/v1`` at its end may be missing.
    port:      of the page, on loopback.
    transport: how the server is reached; by default, over the network.

    Raises EvaluationError if that is not the address of a server.
    """
    server = address(base_url)
    client = httpx.AsyncClient(
        transport=transport,
        follow_redirects=False,
        trust_env=False,
        timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
        # Each request has a connection of its own: one that waits may be closed just as it is used again.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    async def pass_on(request: Request) -> Response:
        return await _passed_on(client, server, request)

    async def home(request: Request) -> Response:
        return RedirectResponse(f"{PATH}/")

    return Starlette(
        routes=[
            Route("/", home),
            Mount(PATH, pages(server)),
            Route("/v1/{path:path}", pass_on, methods=["GET", "POST"]),
        ],
        middleware=[Middleware(OwnPageAlone, port=port)],
        lifespan=lifespan,
    )


def address(base_url: str) -> str:
    """The address of an API, which ends in ``/v1``; raises EvaluationError."""
    try:
        split = urlsplit(base_url)
        usable = split.scheme in ("http", "https") and split.hostname and (split.port or 1)
    except ValueError:
        usable = False
    if not usable or split.query or split.fragment or split.username is not None:
        raise EvaluationError(f"{base_url!r} is no address of a server, such as http://localhost:8000/v1")
    return base_url.rstrip("/").removesuffix("/v1") + "/v1"


class OwnPageAlone:
    """ASGI middleware that refuses what does not come from our own page.

    Otherwise a page from elsewhere, open in the same browser, could ask the server: by a request to
    loopback, or by a name of its own that it lets point to loopback.
    """

    def __init__(self, app: Any, port: int) -> None:
        self._app = app
        names = ("127.0.0.1", "localhost", "[::1]")
        self._hosts = {f"{name}:{port}" for name in names} | (set(names) if port == HTTP_PORT else set())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            host, origin = headers.get("host", ""), headers.get("origin")
            # A page from elsewhere may lead here by a link, and by nothing else: an image has no origin.
            linked = scope["path"] in ("/", f"{PATH}/") or headers.get("sec-fetch-site") in OWN_SITES
            if host not in self._hosts or origin not in (None, f"http://{host}") or not linked:
                reply = refusal(403, "PermissionDeniedError", "only the playground's own page may ask here")
                await reply(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _passed_on(client: httpx.AsyncClient, server: str, request: Request) -> Response:
    path = request.scope["raw_path"].decode("latin-1")
    allowed = PASSED_ON.get(request.method)
    if allowed is None or not allowed.fullmatch(path) or {".", ".."} & set(unquote(path).split("/")):
        return refusal(404, "NotFoundError", "the playground does not pass this route on")
    try:
        body = await body_of(request, MAX_BODY)
    except SpecError as error:
        return refusal(413, "BadRequestError", str(error))
    headers = {name: request.headers[name] for name in SENT if name in request.headers}
    asked = client.build_request(
        request.method, server + path.removeprefix("/v1"), headers=headers, content=body
    )
    try:
        reply = await while_connected(request, client.send(asked, stream=True))
    except httpx.TransportError as error:
        reason = str(error) or type(error).__name__
        return refusal(502, "BadGatewayError", f"no server answers at {server} ({reason})")
    except ConnectionAbortedError:
        return Response(status_code=GONE)
    kept = {name: reply.headers[name] for name in RETURNED if name in reply.headers}
    return StreamingResponse(_parts(reply), reply.status_code, {**HEADERS, **kept})


async def _parts(reply: httpx.Response) -> AsyncIterator[bytes]:
    """The body of a reply, part by part; the connection is closed at its end, and if the page leaves.

    A server that stops in the middle is logged. The page sees it too, because the end of a stream is marked.
    """
    try:
        async for part in reply.aiter_bytes():
            yield part
    except httpx.TransportError as error:
        logger.warning("the server stopped in the middle of an answer (%s)", error or type(error).__name__)
    finally:
        await reply.aclose()
