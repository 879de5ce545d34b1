"""A stream without an end: when its requests begin, and which of their tokens count."""

from __future__ import annotations

import itertools
from typing import Any, Self, cast

import pytest
from openai import OpenAI

from made_up_streams import Tokens
from merged_lora.bench.chain import Chain, one_by_one
from merged_lora.errors import MergeError


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
