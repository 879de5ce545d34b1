"""A stream without an end: when its requests begin, and which of their tokens count."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Self, cast

import pytest
from openai import OpenAI

from merged_lora.bench.chain import Chain, one_by_one
from merged_lora.errors import MergeError


class Tokens:
    """A client whose streams have a token every 5 milliseconds.

    per_chunk: tokens of each chunk.
    broken: what the stream raises after ``ends`` tokens; if None, it ends there without a word.
    """

    def __init__(self, per_chunk: int = 1, ends: int = 10_000, broken: Exception | None = None) -> None:
        self.completions = self
        self.under_way = 0
        self.most = 0
        self.requests: list[Any] = []
        self._per_chunk, self._ends, self._broken = per_chunk, ends, broken
        self._lock = threading.Lock()

    def create(self, **request: Any) -> Stream:
        self.requests.append(request)
        return Stream(self, request["max_tokens"])

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


class Chained:
    """What a chain of requests of 20 tokens, of which the next begins 8 before the end, has seen."""

    def __init__(self, client: Tokens, tokens: int) -> None:
        with Chain(cast(OpenAI, client), "sql", length=20, lead=8) as chain:
            chain.wait(tokens)
            self.times = chain.times()
        self.client = client

    @classmethod
    def of(cls, tokens: int, **client: Any) -> Self:
        return cls(Tokens(**client), tokens)


def test_tokens_of_overlapping_requests_count_once() -> None:
    assert one_by_one([[0.0, 1.0, 2.0], [1.5, 1.75, 2.5, 3.5], [3.0, 4.5]]) == [0.0, 1.0, 2.0, 2.5, 3.5, 4.5]


def test_a_pause_between_two_requests_stays_a_pause() -> None:
    assert one_by_one([[0.0, 1.0], [7.0, 8.0]]) == [0.0, 1.0, 7.0, 8.0]


def test_tokens_that_arrive_together_all_count() -> None:
    assert one_by_one([[0.0, 1.0, 1.0], [1.0, 2.0, 2.0]]) == [0.0, 1.0, 1.0, 2.0, 2.0]


def test_a_request_begins_before_the_one_before_it_ends() -> None:
    chained = Chained.of(100)
    assert len(chained.client.requests) >= 4
    assert chained.client.most == 2
    assert len(chained.times) > 60


def test_a_chain_that_is_left_leaves_no_request_behind() -> None:
    assert Chained.of(30).client.under_way == 0


def test_a_late_chunk_counts_with_all_its_tokens() -> None:
    chained = Chained.of(12, per_chunk=4)
    assert [len(list(same)) for _, same in itertools.groupby(chained.times)][:3] == [4, 4, 4]


@pytest.mark.parametrize(
    ("broken", "message"),
    [(None, "after 5 of 20 tokens"), (ConnectionError("gone"), "gone")],
    ids=["without a word", "with an error"],
)
def test_a_stream_that_ends_too_early_is_an_error(broken: Exception | None, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        Chained.of(10, ends=5, broken=broken)
