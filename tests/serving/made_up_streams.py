"""A client of no server, whose streams have tokens at made-up times."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

from openai import APIError


class Tokens:
    """A client whose streams have a token every 5 milliseconds, and whose completions take 30.

    A completion of the model ``broken`` fails.

    per_chunk: tokens of each chunk.
    under_way: streams at the moment, of which ``most`` was the most.
    together: completions that must be requested at once for any of them to be served.
    broken: what the stream raises after ``ends`` tokens; if None, it ends there without a word.
    """

    def __init__(
        self, per_chunk: int = 1, ends: int = 10_000, broken: Exception | None = None, together: int = 1
    ) -> None:
        self.completions = self
        self.under_way = 0
        self.most = 0
        self.requests: list[Any] = []
        self._per_chunk, self._ends, self._broken = per_chunk, ends, broken
        self._lock = threading.Lock()
        self._together = threading.Barrier(together)

    def create(self, **request: Any) -> Stream | None:
        with self._lock:
            self.requests.append(request)
        if request.get("stream"):
            return Stream(self, request["max_tokens"])
        self._together.wait(timeout=30)
        time.sleep(0.03)
        if request["model"] == "broken":
            raise APIError("no such merge", cast(Any, None), body=None)
        return None

    def count(self, change: int) -> None:
        with self._lock:
            self.under_way += change
            self.most = max(self.most, self.under_way)

    def chunks(self, length: int) -> Iterator[Any]:
        for tokens in range(self._per_chunk, min(length, self._ends) + 1, self._per_chunk):
            time.sleep(0.005)
            yield SimpleNamespace(usage=SimpleNamespace(completion_tokens=tokens))
        if self._broken is not None and self._ends < length:
            raise self._broken


class Stream:
    def __init__(self, client: Tokens, length: int) -> None:
        self._client, self._length = client, length

    def __enter__(self) -> Iterator[Any]:
        self._client.count(1)
        return self._client.chunks(self._length)

    def __exit__(self, *_: object) -> None:
        self._client.count(-1)
