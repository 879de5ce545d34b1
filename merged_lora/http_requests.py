"""What routes over HTTP share: a body of bounded length, and a client that may leave.

Takes requests as Starlette has them, and imports nothing of it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

from .errors import SpecError

Result = TypeVar("Result")

GONE = 499
"""Status of a reply to a client that has left, as proxies log it; nobody receives it."""


def error_body(status: int, kind: str, message: str, param: str | None = None) -> dict[str, object]:
    """An error in OpenAI's format; ``param``: the field that it is about."""
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


async def body_of(request: Any, limit: int) -> bytes:
    """The body of a request; raises SpecError if it has more than ``limit`` bytes."""
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > limit:
            raise SpecError(f"the body has more than {limit} bytes")
    return data


async def json_of(request: Any, limit: int) -> object:
    """The JSON in the body of a request; raises SpecError if there is none, or more than ``limit`` bytes."""
    try:
        value: object = json.loads(await body_of(request, limit))
        # JSON can hold one half of a pair of surrogates, which no reply can: that raises here.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise SpecError("the body is not JSON") from None
    return value


async def while_connected(request: Any, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of some work, which is given up when the client leaves; raises ConnectionAbortedError then.

    request: one whose body has been read.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ConnectionAbortedError("the client has left")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
