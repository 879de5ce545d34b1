"""What a dictionary in the order of last use keeps and drops."""

from __future__ import annotations

from merged_lora.lru import Lru


def filled(*keys: str) -> Lru[str, str]:
    """One with these keys, the last one used last."""
    lru: Lru[str, str] = Lru()
    for key in keys:
        lru.add(key, key.upper(), limit=99)
    return lru


def test_the_least_recently_used_entry_is_dropped_first() -> None:
    lru = filled("a", "b", "c")
    assert lru.add("d", "D", limit=3) == 1
    assert list(lru.values()) == ["B", "C", "D"]


def test_an_entry_that_was_used_stays_longer() -> None:
    lru = filled("a", "b", "c")
    assert lru.use("a") == "A"
    lru.add("d", "D", limit=3)
    assert list(lru) == ["c", "a", "d"]


def test_looking_at_an_entry_does_not_use_it() -> None:
    lru = filled("a", "b")
    assert (lru["a"], lru.get("a")) == ("A", "A")
    lru.add("c", "C", limit=2)
    assert list(lru) == ["b", "c"]


def test_a_key_that_is_not_there_is_not_added_by_using_it() -> None:
    lru = filled("a")
    assert lru.use("b") is None
    assert list(lru) == ["a"]


def test_an_entry_that_is_stored_again_is_used_and_drops_none() -> None:
    lru = filled("a", "b")
    assert lru.add("a", "new", limit=2) == 0
    assert list(lru.items()) == [("b", "B"), ("a", "new")]


def test_a_smaller_limit_drops_as_many_as_are_too_many() -> None:
    lru = filled("a", "b", "c", "d")
    assert lru.add("e", "E", limit=2) == 3
    assert list(lru) == ["d", "e"]
