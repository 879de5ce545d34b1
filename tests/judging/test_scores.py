"""Scores of answers, and intervals that hold the truth about as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from merged_lora.judging.objectives import Objective
from merged_lora.judging.scores import Interval, contains, difference, exact, mean, retention, rouge_l


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


ALONE = {"sql": [1.0] * 20, "chat": [1.0] * 20}
WORST = Objective("worst", ("sql", "chat")).value


def test_the_worst_tasks_of_two_merges_are_compared_each_with_its_own() -> None:
    better = {"sql": [1.0] * 18 + [0.0] * 2, "chat": [1.0] * 20}
    other = {"sql": [1.0] * 20, "chat": [1.0] * 10 + [0.0] * 10}
    found = difference(better, other, ALONE, WORST)
    assert found is not None
    assert found.value == pytest.approx(0.9 - 0.5)
    assert 0.1 < found.low < found.value < found.high < 0.7
    assert found.points.startswith("+40.0 points (+")
    turned = difference(other, better, ALONE, WORST)
    assert turned is not None
    assert (turned.value, turned.low, turned.high) == pytest.approx((-found.value, -found.high, -found.low))


def test_the_interval_of_a_difference_holds_the_truth_about_as_often_as_it_says() -> None:
    rng, held = np.random.default_rng(1), 0
    for _ in range(200):
        shares = {"sql": 0.8, "chat": 0.6}
        one, two = (
            {t: list((rng.random(60) < s).astype(float)) for t, s in shares.items()} for _ in range(2)
        )
        alone = {task: [1.0] * 60 for task in shares}
        found = difference(one, two, alone, Objective("mean", ("sql", "chat")).value)
        assert found is not None
        held += found.low <= 0.0 <= found.high
    assert 180 <= held <= 200


def test_weights_make_a_mean_and_zero_leaves_a_task_out() -> None:
    merged, other = {"sql": [1.0] * 4, "chat": [0.0] * 4}, {"sql": [0.5] * 4, "chat": [1.0] * 4}
    alone = {"sql": [1.0] * 4, "chat": [1.0] * 4}
    for given, expected in (
        ("mean", -0.25),
        ({"sql": 3.0, "chat": 1.0}, 0.125),
        ({"sql": 2.0, "chat": 0.0}, 0.5),
    ):
        found = difference(merged, other, alone, Objective(given, ("sql", "chat")).value)
        assert found is not None
        assert found.value == pytest.approx(expected)


def test_a_merge_differs_from_itself_by_nothing() -> None:
    merged = {"sql": [1.0, 0.0] * 10, "chat": [0.0] * 20}
    assert difference(merged, merged, ALONE, WORST) == Interval(0.0, 0.0, 0.0)


def test_the_same_share_of_other_examples_is_no_difference_at_all() -> None:
    def scores(*right: int) -> dict[str, list[float]]:
        return {task: [1.0] * n + [0.0] * (20 - n) for task, n in zip("abc", right, strict=True)}

    whole = scores(20, 20, 20)
    found = difference(scores(19, 20, 17), scores(17, 19, 20), whole, Objective("mean", tuple("abc")).value)
    assert found is not None
    assert found.value == 0.0
    sixths = {"a": [1.0] * 15 + [0.0] * 5, "b": [1.0] * 20}
    one = {"a": [1.0] * 12 + [0.0] * 8, "b": [1.0] * 20}
    two = {"a": [1.0] * 15 + [0.0] * 5, "b": [1.0] * 16 + [0.0] * 4}
    found = difference(one, two, sixths, WORST)
    assert found is not None
    assert found.value == 0.0


def test_the_base_model_is_the_zero_of_gains() -> None:
    base, own = {"sql": [-3.0] * 8}, {"sql": [-1.0] * 8}
    found = difference({"sql": [-1.5] * 8}, {"sql": [-2.0] * 8}, own, WORST, base)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))


def test_nothing_is_kept_of_sources_without_a_score() -> None:
    none = {"sql": [0.0] * 4, "chat": [1.0] * 4}
    right = {"sql": [1.0] * 4, "chat": [1.0] * 4}
    assert difference(right, none, {"sql": none["sql"]}, WORST) is None
    assert difference(right, none, none, WORST) is None
    assert difference(right, none, none, Objective({"chat": 1.0}, ("sql", "chat")).value) is not None
    assert difference(right, none, none, Objective({"sql": 1.0}, ("sql", "chat")).value) is None
