"""A stream without an end, to be watched for gaps: requests in a row, each begun before the last one ends.

It knows nothing of what is requested beside it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Self

from openai import OpenAI

from merged_lora.errors import MergeError

from . import serving

LENGTH = 400
"""Tokens of one request, which fit ``--max-model-len`` together with the prompt."""

LEAD = 16
"""Tokens before its end at which the next request begins, which by then has its own tokens."""


class Chain:
    """A stream of an adapter's tokens that goes on for as long as the ``with`` statement.

    A request's tokens are limited, so the next request begins ``lead`` tokens before one has its ``length``.
    """

    def __init__(self, client: OpenAI, model: str, length: int = LENGTH, lead: int = LEAD) -> None:
        self._client = client
        self._model = model
        self._length = length
        self._lead = lead
        self._requests: list[list[float]] = []
        self._readers: list[threading.Thread] = []
        self._news = threading.Condition()
        self._stopped = False
        self._failure: Exception | None = None

    def __enter__(self) -> Self:
        with self._news:
            self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        with self._news:
            self._stopped = True
        for reader in self._readers:
            reader.join()

    def wait(self, tokens: int) -> None:
        """Return when so many more tokens have arrived; raises MergeError if the stream ends before."""
        with self._news:
            due = self._count() + tokens
            while self._count() < due and self._failure is None:
                if not self._news.wait(serving.PATIENCE):
                    raise MergeError(f"a stream had no token for {serving.PATIENCE:.0f} s")
            if self._failure is not None:
                raise MergeError(f"a stream failed: {self._failure}") from self._failure

    def times(self) -> list[float]:
        """The times of the tokens so far, by ``time.perf_counter``."""
        with self._news:
            return one_by_one(self._requests)

    def _count(self) -> int:
        return sum(map(len, self._requests))

    def _begin(self) -> None:
        """Begin a request; the caller holds the lock."""
        times: list[float] = []
        self._requests.append(times)
        self._readers.append(threading.Thread(target=self._read, args=(times,)))
        self._readers[-1].start()

    def _read(self, times: list[float]) -> None:
        """Note the time of every token of a request."""
        try:
            with serving.stream(self._client, self._model, self._length) as chunks:
                for chunk in chunks:
                    now = time.perf_counter()
                    with self._news:
                        if self._stopped:
                            return
                        early = len(times) < self._length - self._lead
                        # A chunk holds several tokens if the API server was late.
                        times += [now] * (serving.tokens_of(chunk) - len(times))
                        if early and len(times) >= self._length - self._lead:
                            self._begin()
                        self._news.notify_all()
            if len(times) < self._length:
                raise EOFError(f"it ended after {len(times)} of {self._length} tokens")
        except Exception as error:  # raised by `wait`
            with self._news:
                self._failure = None if self._stopped else error
                self._news.notify_all()


def one_by_one(requests: Sequence[Sequence[float]]) -> list[float]:
    """The times of the tokens of requests that follow each other, of one request at a time.

    Where two overlap, the earlier one's count.  A pause between two stays a pause.
    """
    times: list[float] = []
    for request in requests:
        times += [token for token in request if not times or token > times[-1]]
    return times
