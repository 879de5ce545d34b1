"""The page and what it asks of its own server: the table of strategies, and the merge that a form means.

The answers of models, and what a server serves, come from vLLM's routes and not from here.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from merged_lora import __version__
from merged_lora.catalog import as_json
from merged_lora.errors import MergeError
from merged_lora.http_requests import body_of, error_body, json_of
from merged_lora.prompts import prompts_in
from merged_lora.spec import MAX_TEXT, MergeSpec, parse

from .copies import Question, flag_of, requests_of
from .forms import FieldError, form_of, spec_of

PATH = "/merged_lora"
"""The path of the page, without the slash at its end."""
FILES = Path(__file__).parent / "static"
MAX_BODY = 1 << 20
MAX_PROMPTS = 200

POLICY = "; ".join(
    (
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "connect", "img")),
        *(f"{what} 'none'" for what in ("base-uri", "form-action", "frame-ancestors")),
        "require-trusted-types-for 'script'",
    )
)
"""What the page may load and do: its own files, its own server, and no text becomes HTML or a script."""
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Headers:
    """ASGI middleware that adds :data:`HEADERS` to every reply."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                kept = [(k, v) for k, v in message.get("headers", ()) if k.decode("latin-1") not in HEADERS]
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*kept, *added]}
            await send(message)

        await self._app(scope, receive, sending)


def pages(server: str | None = None) -> Starlette:
    """The application, to be mounted at :data:`PATH`.

    server: the address of the API that the page's own server passes requests on to, which ends in ``/v1``;
            None if that is the server itself.
    """

    async def about(request: Request) -> Response:
        return JSONResponse({"version": __version__, "server": server, "strategies": as_json()})

    async def form(request: Request) -> Response:
        body = await json_of(request, MAX_BODY)
        spec = _spec(body.get("spec")) if isinstance(body, dict) and "spec" in body else spec_of(body)
        return JSONResponse({"spec": str(spec), "form": form_of(spec)})

    async def copies(request: Request) -> Response:
        match await json_of(request, MAX_BODY):
            case {"spec": text, "question": question, "server": str(own), "keyed": bool(keyed)}:
                asked = Question.of(question)
                return JSONResponse(requests_of(_spec(text), server or own, asked, keyed))
        raise FieldError("spec", 'the body is {"spec": ..., "question": ..., "server": ..., "keyed": ...}')

    async def flag(request: Request) -> Response:
        match await json_of(request, MAX_BODY):
            case {"spec": text, "alias": str(alias)}:
                return JSONResponse({"flag": flag_of(_spec(text), alias)})
        raise FieldError("spec", 'the body is {"spec": ..., "alias": ...}')

    async def prompts(request: Request) -> Response:
        text = (await body_of(request, MAX_BODY)).decode("utf-8", "replace")
        return JSONResponse({"prompts": prompts_in(text, MAX_PROMPTS)})

    return Starlette(
        routes=[
            Route("/api/about", about),
            Route("/api/form", _refusing(form), methods=["POST"]),
            Route("/api/copies", _refusing(copies), methods=["POST"]),
            Route("/api/flag", _refusing(flag), methods=["POST"]),
            Route("/api/prompts", _refusing(prompts), methods=["POST"]),
            Mount("/", StaticFiles(directory=FILES, html=True)),
        ],
        middleware=[Middleware(Headers)],
    )


Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def _refusing(handler: Handler) -> Handler:
    """A handler whose mistakes of users are replies with status 400, in OpenAI's format."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except MergeError as error:
            return refusal(400, "BadRequestError", str(error), getattr(error, "field", None))

    return handle


def refusal(status: int, kind: str, message: str, param: str | None = None) -> JSONResponse:
    """An error in OpenAI's format; ``param``: the field that it is about."""
    return JSONResponse(error_body(status, kind, message, param), status)


def _spec(text: object) -> MergeSpec:
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        raise FieldError("spec", f"a spec is a text of at most {MAX_TEXT} characters")
    try:
        return parse(text)
    except MergeError as error:
        raise FieldError("spec", str(error)) from None
