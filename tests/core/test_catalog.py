"""The rendered tables agree with the table of strategies and with the grammar."""

import json
import re

import pytest

from merged_lora import catalog
from merged_lora.recipe import EVERYWHERE, Option, Strategy
from merged_lora.spec import parse
from merged_lora.strategies import TABLE


def rows(table: str) -> list[list[str]]:
    """The cells of a Markdown table, without heading and rule."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.strip().splitlines()]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def test_the_markdown_has_a_full_row_for_every_strategy_in_order() -> None:
    strategies, _ = catalog.as_markdown().split("\n\n")
    found = rows(strategies)
    assert [row[0] for row in found] == [f"`{name}`" for name in TABLE]
    assert {len(row) for row in found} == {6}
    for row, strategy in zip(found, TABLE.values(), strict=True):
        assert row[1] == strategy.summary
        assert row[2] == strategy.recipe.space
        assert row[4].count("`") == 2 * (len(strategy.options) - len(EVERYWHERE))


def test_the_markdown_has_a_row_for_every_option_and_says_who_takes_it() -> None:
    _, options = catalog.as_markdown().split("\n\n")
    found = {row[0].strip("`").split("=")[0]: row[2] for row in rows(options)}
    taken = {option.name for strategy in TABLE.values() for option in strategy.options}
    assert found.keys() == taken
    assert found["t"] == "slerp"
    assert found["compat"] == "linear, ties"
    assert found["scale"] == "every strategy"


def test_papers_are_linked_in_markdown() -> None:
    assert "[arXiv 2306.01708](https://arxiv.org/abs/2306.01708)" in catalog.as_markdown()


def test_defaults_are_shown_as_a_spec_writes_them() -> None:
    shown = {option.name: catalog.assignment(option) for s in TABLE.values() for option in s.options}
    assert shown["majority_sign_method"] == 'majority_sign_method="total"'
    assert shown["normalize"] == "normalize=false"
    assert shown["scale"] == "scale=1"
    assert shown["rank"] == "rank"


@pytest.mark.parametrize(
    ("strategy", "option"),
    [(s, o) for s in TABLE.values() for o in s.options if o.default is not None],
    ids=lambda value: value.name,
)
def test_a_default_as_it_is_shown_means_what_leaving_it_out_means(strategy: Strategy, option: Option) -> None:
    sources = ", ".join(f"s{i}" for i in range(strategy.sources_min))
    shown = parse(f"{strategy.name}({sources}, {catalog.assignment(option)})")
    assert shown == parse(f"{strategy.name}({sources})")
    assert shown.option(option.name) == option.default


def test_the_json_holds_every_strategy_with_its_options() -> None:
    found = json.loads(json.dumps(catalog.as_json()))
    assert [entry["name"] for entry in found] == list(TABLE)
    for entry, strategy in zip(found, TABLE.values(), strict=True):
        assert {o["name"]: o["default"] for o in entry["options"]} == {
            o.name: o.default for o in strategy.options
        }
        assert entry["summary"] == strategy.summary


def test_the_text_names_every_strategy_and_option_in_lines_that_fit() -> None:
    lines = catalog.as_text().splitlines()
    assert max(map(len, lines)) <= catalog.WIDTH
    headings = [line.strip() for line in lines if re.match(r" {2}\S", line)]
    assert headings[: len(TABLE)] == list(TABLE)
    assert "density=0.5" in headings[len(TABLE) :]
