"""``/v1/merged_lora``: what operators see and change of a running server, and the HTTP status of every error.

Knows FastAPI and the gate, and nothing of vLLM.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from merged_lora.aliases import CHECK
from merged_lora.errors import (
    FetchError,
    ForbiddenError,
    MergeError,
    NotFoundError,
    SpecError,
    UnknownAdapterError,
)
from merged_lora.http_requests import GONE, error_body, json_of, while_connected
from merged_lora.spec import MergeSpec, from_json, parse
from merged_lora.vllm_plugin.rpc import CacheFullError

from .exchange import KeyMissingError
from .gate import BusyError, Making, MergeGate
from .ready import LiveMerge
from .replaying import NotReplayed

MAX_BODY = 1 << 16


def status_of(error: MergeError) -> tuple[HTTPStatus, str]:
    """The HTTP status of an error, and its type in OpenAI's format."""
    if isinstance(error, BusyError):
        return HTTPStatus.TOO_MANY_REQUESTS, "TooManyRequestsError"
    if isinstance(error, CacheFullError):
        return HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"
    if isinstance(error, KeyMissingError):
        return HTTPStatus.UNAUTHORIZED, "AuthenticationError"
    if isinstance(error, FetchError):
        return HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"
    if isinstance(error, ForbiddenError):
        return HTTPStatus.FORBIDDEN, "PermissionDeniedError"
    if isinstance(error, UnknownAdapterError | NotFoundError):
        return HTTPStatus.NOT_FOUND, "NotFoundError"
    return HTTPStatus.BAD_REQUEST, "BadRequestError"


def make_router(gate_of: Callable[[Request], tuple[MergeGate, Collection[str]]], changes: bool) -> APIRouter:
    """The routes under ``/v1/merged_lora``.

    gate_of: the gate of the server that a request came to, and the names of its base model.
    changes: whether clients may change aliases.
    """
    router = APIRouter()

    @router.get("/v1/merged_lora")
    async def show(request: Request) -> JSONResponse:
        gate, _ = gate_of(request)
        return JSONResponse({**report(gate), "runtime_aliases": changes})

    @router.get("/v1/merged_lora/merges/{digest}")
    async def show_merge(digest: str, request: Request) -> JSONResponse:
        gate, _ = gate_of(request)
        found = next((live for live in gate.merges if live.identity.digest == digest), None)
        if found is None:
            return _refused(NotFoundError("no merge of this digest is ready; GET /v1/merged_lora lists all"))
        return JSONResponse(description(found))

    @router.post(f"/v1/merged_lora/{CHECK}")  # before the route of aliases, which would take it
    async def check(request: Request) -> JSONResponse:
        gate, _ = gate_of(request)
        try:
            spec = await _spec(request)
            live = await while_connected(request, gate.check(spec))
        except MergeError as error:
            return _refused(error)
        except ConnectionAbortedError:
            return JSONResponse({}, GONE)
        sources = replay_of(live) or []
        return JSONResponse(
            {
                "spec": str(live.identity.spec),
                "digest": live.identity.digest,
                "sources": sources,
                "lost": [source["name"] for source in sources if source["lost"]],
            }
        )

    if not changes:

        @router.api_route("/v1/merged_lora/{alias:path}", methods=["POST", "DELETE"])
        async def refuse(alias: str) -> JSONResponse:
            return _refused(
                ForbiddenError("aliases change at run time only with --merged-lora-runtime-aliases")
            )

        return router

    @router.post("/v1/merged_lora/{alias:path}")
    async def define(alias: str, request: Request) -> JSONResponse:
        gate, reserved = gate_of(request)
        try:
            spec = await _spec(request)
            live, new = await while_connected(request, gate.define(alias, spec, reserved))
        except MergeError as error:
            return _refused(error)
        except ConnectionAbortedError:
            return JSONResponse({}, GONE)
        return JSONResponse({"alias": alias, **description(live)}, 201 if new else 200)

    @router.delete("/v1/merged_lora/{alias:path}")
    async def remove(alias: str, request: Request) -> JSONResponse:
        gate, _ = gate_of(request)
        try:
            gate.remove(alias)
        except MergeError as error:
            return _refused(error)
        return JSONResponse({"alias": alias, "removed": True})

    return router


def report(gate: MergeGate) -> dict[str, Any]:
    """The body of ``GET /v1/merged_lora``."""
    return {
        "object": "merged_lora",
        "aliases": [{"alias": alias, "spec": str(spec)} for alias, spec in sorted(gate.aliases.items())],
        "merges": [description(live) for live in gate.merges],
        "making": [_progress(making) for making in gate.making],
        "sources": [
            {
                "name": name,
                "digest": c.key,
                "bytes": c.nbytes,
                "served": c.served,
                "refusal": c.refusal or None,
            }
            for name, c in sorted(gate.sources.components.items())
        ],
        "fetching": [
            {"location": str(fetch.location), "bytes": fetch.nbytes}
            for fetch in gate.sources.fetches.under_way
        ],
        "bytes_held": gate.sources.held,
        "bytes_ready": gate.ready_bytes,
    }


def description(live: LiveMerge) -> dict[str, Any]:
    """One merge in the body of ``GET /v1/merged_lora``."""
    spec = live.identity.spec
    contents = zip(spec.sources, live.identity.contents, strict=True)
    return {
        "spec": str(spec),
        "strategy": spec.strategy,
        "sources": [
            {"name": s.name, "weight": None if spec.automatic else s.weight, "digest": digest}
            for s, digest in contents
        ],
        "rank": live.facts.rank,
        "kept_energy": live.facts.kept_energy,
        "kept_energy_by_module": live.facts.kept_by_module,
        "digest": live.identity.digest,
        "last_used": live.used,
        "hits": live.hits,
        "replay": replay_of(live),
    }


def _progress(making: Making) -> dict[str, Any]:
    """One merge in the making in the body of ``GET /v1/merged_lora``; times are in seconds."""
    state = making.state
    return {
        "spec": str(making.identity.spec),
        "digest": making.identity.digest,
        "state": _state(making),
        "modules_done": state.done if state is not None else 0,
        "modules": state.total if state is not None else 0,
        "merged_for": state.spent if state is not None else 0.0,
        "announced": state.announced if state is not None else None,
        "asked_for": time.monotonic() - making.began,
        "requests": making.waiting,
    }


def _state(making: Making) -> str:
    """What a merge in the making waits for, or that it has begun."""
    if not making.has_room:
        return "waiting for memory"
    return "merging" if making.state is not None and making.state.running else "waiting"


def replay_of(live: LiveMerge) -> list[dict[str, Any]] | None:
    """What the replay of a merge showed of each source, as JSON; None if it was not replayed.

    A likelihood that is not a number, because the merge overflows, is None.
    """
    if live.replay is None:
        return None
    return [
        {"name": each.source, "refusal": str(each.error)}
        if isinstance(each, NotReplayed)
        else {
            "name": each.source,
            "kept": each.kept,
            "total": each.total,
            "nll": each.nll if math.isfinite(each.nll) else None,
            "lost": each.lost,
        }
        for each in live.replay
    ]


async def _spec(request: Request) -> MergeSpec:
    """The merge in the body of a request; raises SpecError."""
    body = await json_of(request, MAX_BODY)
    if isinstance(body, dict) and set(body) == {"spec"} and isinstance(body["spec"], str):
        return parse(body["spec"])
    if isinstance(body, dict) and "ids" in body and "spec" not in body:
        return from_json(body)
    raise SpecError(
        'the body must be {"spec": "..."}, or {"ids": [...], "weights": [...], "merge_strategy": "..."}'
    )


def _refused(error: MergeError) -> JSONResponse:
    status, kind = status_of(error)
    headers = {"Retry-After": str(error.seconds)} if isinstance(error, BusyError | FetchError) else None
    return JSONResponse(error_body(status.value, kind, str(error)), status.value, headers)
