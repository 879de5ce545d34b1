"""A stand-in for vLLM that the playground asks: answers of one word a token, with faults on demand.

pytest's ``pythonpath`` holds this folder: ``from playground_server import Stub``.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from merged_lora.errors import MergeError
from merged_lora.playground.pages import PATH, pages, refusal
from merged_lora.spec import is_spec, parse

Fault = Callable[[str, Mapping[str, Any]], Response | None]
LOGPROB = math.log(0.5)


class Running:
    """An application on a port of its own, in a thread; use it in a ``with`` statement.

    made: makes the application for a port.
    """

    def __init__(self, made: Callable[[int], Any]) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        config = uvicorn.Config(made(port), log_level="critical", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            self._thread.join(0.01)
            assert self._thread.is_alive(), "the server ended as it began"
            assert time.monotonic() < deadline, "the server does not begin"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it; answers under way are cut off."""
        self._server.should_exit = True
        self._thread.join(30)
        self._socket.close()


@dataclass
class Stub:
    """A served model; ``with stub.running() as site`` serves it.

    words:     what a model answers to a prompt; the model's name and the prompt otherwise.
    pace:      seconds before each word.
    fault:     a reply instead of an answer, by path and body; None for none.
    adapters:  their names.
    folders:   names of sources that cannot be asked by themselves.
    aliases:   merges by name.
    defining:  seconds that it takes to define an alias.
    changes:   whether clients may change aliases.
    key:       what requests must carry; None if none.
    checking:  seconds that a replay takes.
    checked:   how many were asked for.
    cuts:      whether the limit of tokens cuts every answer.
    calibrated: whether replays show what survives.
    asked:     the models that were asked, in order.
    bodies:    the bodies of the requests, in order.
    under_way: how many answers are under way.
    beside_base: the largest number of other answers while the base model's began.
    """

    words: Callable[[str, str], list[str]] = lambda model, prompt: [*model.split(), *prompt.split()]
    pace: float = 0.0
    fault: Fault = lambda path, body: None
    adapters: tuple[str, ...] = ("sql", "chat", "tone")
    folders: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    defining: float = 0.0
    changes: bool = True
    key: str | None = None
    checking: float = 0.0
    checked: int = 0
    cuts: bool = False
    calibrated: bool = True
    asked: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    under_way: int = 0
    beside_base: int = 0
    made: dict[str, str] = field(default_factory=dict)

    def running(self) -> Running:
        """It, with the playground at its place."""
        return Running(lambda port: self.app())

    def app(self) -> Starlette:
        """The application: vLLM's routes, and the page."""
        return Starlette(
            routes=[
                Mount(PATH, pages()),
                Route("/v1/models", self._guarded(self._models)),
                Route("/v1/merged_lora", self._guarded(self._merged)),
                Route("/v1/merged_lora/merges/{digest}", self._guarded(self._merge)),
                Route("/v1/merged_lora/check", self._guarded(self._check), methods=["POST"]),
                Route("/v1/merged_lora/{alias:path}", self._guarded(self._define), methods=["POST"]),
                Route("/v1/chat/completions", self._guarded(self._answer), methods=["POST"]),
                Route("/v1/completions", self._guarded(self._answer), methods=["POST"]),
            ]
        )

    def _guarded(self, handler: Callable[[Request, Any], Any]) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Response:
            if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
                return refusal(401, "AuthenticationError", "the key is missing or wrong")
            body = json.loads(await request.body() or b"null")
            wrong = self.fault(request.url.path, body or {})
            found: Response = wrong or await handler(request, body)
            return found

        return handle

    async def _models(self, request: Request, body: Any) -> Response:
        names = [("base", None), *((name, "base") for name in (*self.adapters, *self.aliases))]
        return JSONResponse({"data": [{"id": name, "parent": parent} for name, parent in names]})

    async def _merged(self, request: Request, body: Any) -> Response:
        return JSONResponse(
            {
                "aliases": [{"alias": name, "spec": spec} for name, spec in self.aliases.items()],
                "sources": [{"name": name, "served": True, "refusal": None} for name in self.adapters],
                "runtime_aliases": self.changes,
            }
        )

    async def _merge(self, request: Request, body: Any) -> Response:
        if request.path_params["digest"] not in self.made:
            return refusal(404, "NotFoundError", "no such merge")
        return JSONResponse({"rank": 8, "kept_energy": 0.987, "replay": None})

    async def _check(self, request: Request, body: Any) -> Response:
        if not self.calibrated:
            return refusal(400, "BadRequestError", "source 'sql' has no calibration")
        self.checked += 1
        await asyncio.sleep(self.checking)
        names = parse(body["spec"]).names
        kept = [{"name": n, "kept": i, "total": 4, "nll": 0.1, "lost": i < 2} for i, n in enumerate(names)]
        return JSONResponse({"sources": kept})

    async def _define(self, request: Request, body: Any) -> Response:
        alias = request.path_params["alias"]
        if not self.changes:
            return refusal(403, "PermissionDeniedError", "aliases change only with a flag")
        if is_spec(alias):
            return refusal(400, "BadRequestError", f"alias {alias!r} reads as a merge")
        await asyncio.sleep(self.defining)
        self.aliases[alias] = body["spec"]
        return JSONResponse({"alias": alias}, 201)

    async def _answer(self, request: Request, body: Any) -> Response:
        model = body["model"]
        headers = {}
        if model not in ("base", *self.adapters, *self.aliases) and is_spec(model):
            try:
                unknown = [name for name in parse(model).names if name not in (*self.adapters, *self.folders)]
            except MergeError as error:
                return refusal(400, "BadRequestError", str(error), "model")
            if unknown:
                return refusal(404, "NotFoundError", f"unknown adapter {unknown[0]!r}", "model")
            digest = hashlib.blake2b(model.encode(), digest_size=16).hexdigest()
            headers["merged-lora"] = f'"{digest}";new={int(digest not in self.made)};ms=12.3'
            self.made[digest] = model
        self.asked.append(model)
        self.bodies.append(body)
        prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        return StreamingResponse(
            self._stream(model, prompt, "messages" in body), 200, headers, "text/event-stream"
        )

    async def _stream(self, model: str, prompt: str, chat: bool) -> AsyncIterator[str]:
        if model == "base":
            self.beside_base = max(self.beside_base, self.under_way)
        self.under_way += 1
        try:
            for i, word in enumerate(self.words(model, prompt)):
                await asyncio.sleep(self.pace)
                text = " " * bool(i) + word
                choice = (
                    {"delta": {"content": text}, "logprobs": {"content": [{"logprob": LOGPROB}]}}
                    if chat
                    else {"text": text, "logprobs": {"token_logprobs": [LOGPROB]}}
                )
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            last = {"text": "", "delta": {}, "finish_reason": "length" if self.cuts else "stop"}
            yield f"data: {json.dumps({'choices': [last]})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.under_way -= 1
