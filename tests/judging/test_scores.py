"""Scores of answers, and intervals that hold the truth about as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from merged_lora.judging.scores import contains, exact, mean, retention, rouge_l


@pytest.mark.parametrize(
    ("given", "right", "is_exact", "holds"),
    [
        ("4", ["4"], 1.0, 1.0),
        (" 4\n", ["4"], 1.0, 1.0),
        ("it is 4", ["4"], 0.0, 1.0),
        ("four", ["4", "four"], 1.0, 1.0),
        ("Four", ["four"], 0.0, 0.0),
        ("", ["4"], 0.0, 0.0),
    ],
)
def test_an_answer_is_right_or_holds_what_is(
    given: str, right: list[str], is_exact: float, holds: float
) -> None:
    assert (exact(given, right), contains(given, right)) == (is_exact, holds)


@pytest.mark.parametrize(
    ("given", "score"),
    [
        ("the cat sat", 1.0),
        ("The CAT, sat!", 1.0),
        ("the cat", 0.8),  # two words of two, and of three
        ("sat cat the", 1 / 3),
        ("", 0.0),
    ],
)
def test_rouge_l_is_the_share_of_words_in_the_same_order(given: str, score: float) -> None:
    assert rouge_l(given, ["the cat sat", "nothing"]) == pytest.approx(score)


def test_rouge_l_knows_the_words_of_every_script() -> None:
    assert rouge_l("кошка über, 猫", ["Кошка ÜBER 猫"]) == 1.0
    assert rouge_l("собака", ["кошка"]) == 0.0


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng, held = np.random.default_rng(1), 0
    for _ in range(200):
        found = mean(list((rng.random(60) < 0.7).astype(float)))
        assert found.low <= found.value <= found.high
        held += found.low <= 0.7 <= found.high
    assert 0.9 <= held / 200 <= 0.99


def test_a_score_that_is_the_same_everywhere_has_no_width() -> None:
    assert (mean([1.0] * 20).low, mean([1.0] * 20).high) == (1.0, 1.0)


def test_retention_is_the_share_of_the_specialist() -> None:
    alone = [1.0] * 30 + [0.0] * 10
    found = retention([1.0] * 15 + [0.0] * 25, alone)
    assert found is not None
    assert found.value == pytest.approx(0.5)
    assert 0.25 < found.low < 0.5 < found.high < 0.75
    same = retention(alone, alone)
    assert same is not None
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)  # resampled together
    assert retention([1.0], [0.0]) is None
