"""Names under which adapters and merges are registered: none passes for another, or for a merge."""

from __future__ import annotations

import pytest

from making import SMALL, random_adapter
from merged_lora.engine import merge
from merged_lora.errors import SpecError
from merged_lora.spec import check_own_name

ORDINARY = [
    "sql",
    "org/model:v1.2_x",
    "my adapter",
    "2024 release",
    "sql (v2)",
    "a(b)",
    "c++",
    "größe",
    "日本語",
    "हिन्दी",
    "a-b",
    "50%",
    "🙂",
    "ties",
    "ties sql",
    "x = y",
    "/models/sql",
]


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_name_is_taken(name: str) -> None:
    check_own_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "ties(sql, tone)",
        "ties(sql + tone; density 0.5)",
        "ties(",
        " sum(whatever)",
        "sum(...)",
        "0.5*sql",
        "sql + tone",
        "sql+tone",
        "sql - tone",
        "0.7 sql + 0.3 tone",
        "-sql",
        '"sql"',
    ],
)
def test_a_name_that_reads_as_a_merge_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match=r"reads as a merge; take another name|white space"):
        check_own_name(name)


@pytest.mark.parametrize("name", ["", " ", "\t", "\u00a0", "\u2003 "])
def test_a_blank_name_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match="is blank"):
        check_own_name(name)


@pytest.mark.parametrize("name", [" sql", "sql ", "sql\u00a0"])
def test_a_name_with_white_space_around_it_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match="begins or ends with white space"):
        check_own_name(name)


@pytest.mark.parametrize(
    ("character", "what"),
    [
        ("\0", "control"),
        ("\x7f", "control"),
        ("\x85", "control"),
        ("\ud800", "control"),
        ("\u200b", "invisible"),
        ("\u200f", "invisible"),
        ("\u202e", "invisible"),
        ("\u2066", "invisible"),
        ("\ufeff", "invisible"),
        ("\u00ad", "invisible"),
        ("\u2028", "invisible"),
        ("\u2029", "invisible"),
        ("\u3164", "invisible"),
        ("\ufe0f", "invisible"),
        ("\U000e0041", "invisible"),
    ],
)
def test_a_character_that_cannot_be_seen_is_refused_by_its_number(character: str, what: str) -> None:
    with pytest.raises(SpecError) as refused:
        check_own_name(f"sq{character}l")
    message = str(refused.value)
    assert f"holds {'a' if what == 'control' else 'an'} {what} character, U+{ord(character):04X}" in message
    assert message.isascii()
    assert message.isprintable()


def test_python_checks_the_names_that_it_is_given() -> None:
    adapter = random_adapter(SMALL)
    assert merge('"sql (v2)" + tone', {"sql (v2)": adapter, "tone": random_adapter(SMALL, seed=1)})
    with pytest.raises(SpecError, match="reads as a merge"):
        merge('sum("0.5*sql")', {"0.5*sql": adapter})
