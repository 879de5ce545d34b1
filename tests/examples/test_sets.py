"""The sets of adapters to choose on and to report on are apart, and as their module says."""

from __future__ import annotations

from collections import Counter

from more_tasks import ALL_TASKS
from sets import CHOOSE, REPORT
from train import TRAININGS

APART = {"query", "terse", "dates", "fields"}


def test_no_set_is_in_both_lists_or_twice_in_one() -> None:
    sets = [frozenset(chosen) for chosen in CHOOSE + REPORT]
    assert len(set(sets)) == len(sets)
    assert all(len(set(chosen)) == len(chosen) for chosen in CHOOSE + REPORT)
    assert set().union(*sets) == set(ALL_TASKS)


def test_sets_to_choose_on_have_none_of_the_four_apart_but_for_one_six() -> None:
    (six,) = [chosen for chosen in CHOOSE if len(chosen) == 6]
    assert set(six) & APART == {"query"}
    assert not [chosen for chosen in CHOOSE if chosen != six and set(chosen) & APART]


def test_sets_of_three_to_report_on_have_two_of_the_four_apart_and_equal_or_mixed_ranks() -> None:
    threes = [chosen for chosen in REPORT if len(chosen) == 3]
    assert all(len(set(chosen) & APART) >= 2 for chosen in threes)
    equal = Counter(len({TRAININGS[name].rank for name in chosen}) == 1 for chosen in threes)
    assert equal[True] >= 3
    assert equal[False] >= 3
    assert Counter(map(len, REPORT)) == {2: 4, 3: 8, 6: 2, 9: 1}
