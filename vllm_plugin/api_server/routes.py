"""``/v1/merged_lora``: what operators see and change of a running server.

Knows FastAPI and the gate, and nothing of vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from merged_lora.errors import MergeError, SpecError
from merged_lora.spec import MergeSpec, from_json, parse

from .gate import BusyError, MergeGate, status_of

MAX_BODY = 1 << 16


def make_router(gate_of: Callable[[Request], tuple[MergeGate, Collection[str]]], changes: bool) -> APIRouter:
    """The routes.

    gate_of: the gate of the server that a request came to, and the names of its base model.
    changes: whether clients may change aliases.
    """
    router = APIRouter()

    @router.get("/v1/merged_lora")
    async def show(request: Request) -> JSONResponse:
        gate, _ = gate_of(request)
        return JSONResponse(gate.report())

    if not changes:
        return router

    @router.post("/v1/merged_lora/{alias:path}")
    async def define(alias: str, request: Request) -> JSONResponse:
        gate, reserved = gate_of(request)
        try:
            live, new = await gate.define(alias, await _spec(request), reserved)
        except MergeError as error:
            return _refused(error)
        return JSONResponse({"alias": alias, **gate.described(live)}, 201 if new else 200)

    @router.delete("/v1/merged_lora/{alias:path}")
    async def remove(alias: str, request: Request) -> JSONResponse:
        gate, _ = gate_of(request)
        try:
            gate.remove(alias)
        except MergeError as error:
            return _refused(error)
        return JSONResponse({"alias": alias, "removed": True})

    return router


async def _spec(request: Request) -> MergeSpec:
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY:
            raise SpecError(f"the body has more than {MAX_BODY} bytes")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise SpecError("the body is not JSON") from None
    if isinstance(body, dict) and set(body) == {"spec"} and isinstance(body["spec"], str):
        return parse(body["spec"])
    if isinstance(body, dict) and "ids" in body and "spec" not in body:
        return from_json(body)
    raise SpecError(
        'the body is {"spec": "..."}, or {"ids": [...], "weights": [...], "merge_strategy": "..."}'
    )


def _refused(error: MergeError) -> JSONResponse:
    status, kind = status_of(error)
    content: dict[str, Any] = {"message": str(error), "type": kind, "param": None, "code": status.value}
    headers = {"Retry-After": str(error.seconds)} if isinstance(error, BusyError) else None
    return JSONResponse({"error": content}, status.value, headers)
