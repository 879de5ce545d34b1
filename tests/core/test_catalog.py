"""The rendered tables agree with the table of strategies and with the grammar."""

import json
import re

import pytest
from jsonschema import Draft202012Validator

from merged_lora import catalog
from merged_lora.recipe import EVERYWHERE, RANK, Option, Strategy
from merged_lora.spec import parse
from merged_lora.strategies import TABLE


def rows(table: str) -> list[list[str]]:
    """The cells of a Markdown table, without heading and rule."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.strip().splitlines()]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def names(cell: str) -> list[str]:
    """What a cell shows as code."""
    return re.findall(r"`([a-z_]+)", cell)


def tables() -> list[list[list[str]]]:
    """The rows of the families, of the places where they compute, and of the options."""
    return [rows(table) for table in catalog.as_markdown().split("\n\n")]


def test_the_families_name_every_strategy_once_with_its_own_options() -> None:
    families, _, _ = tables()
    named = [name for row in families for name in names(row[0])]
    assert sorted(named) == sorted(TABLE)
    for strategies, summary, options, _ in families:
        family = [TABLE[name] for name in names(strategies)]
        assert summary == family[0].summary
        taken = {option.name for strategy in family for option in strategy.options}
        beyond = taken - {option.name for option in (*EVERYWHERE, RANK)}
        assert beyond <= set(names(options)) <= beyond | {strategy.name for strategy in family}


def test_an_option_that_only_some_of_a_family_take_is_shown_with_them() -> None:
    families, _, _ = tables()
    (ties,) = [row for row in families if names(row[0])[0] == "ties"]
    assert "`compat` (`ties`)" in ties[2]
    assert "`density`," in ties[2]


def test_every_strategy_has_one_place_and_one_rank() -> None:
    _, places, _ = tables()
    found = {name: rank for _, rank, strategies in places for name in names(strategies)}
    assert sorted(name for row in places for name in names(row[2])) == sorted(TABLE)
    assert found == {name: catalog.RESULT_RANK[strategy.recipe.rank] for name, strategy in TABLE.items()}


def test_every_option_has_one_row_that_says_who_takes_it() -> None:
    _, _, options = tables()
    found = {names(row[0])[0]: row[2] for row in options}
    assert len(options) == len(found)
    assert found.keys() == {option.name for strategy in TABLE.values() for option in strategy.options}
    assert found["t"] == "`slerp`"
    assert found["compat"] == "`linear`, `ties`"
    assert found["density"] == "see the families"
    assert found["scale"] == "every strategy"


def test_the_strategies_that_take_a_rank_are_those_whose_result_has_it() -> None:
    takers = {name for name, strategy in TABLE.items() if RANK in strategy.options}
    assert takers == {name for name, strategy in TABLE.items() if strategy.recipe.rank == "truncate"}


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


@pytest.mark.parametrize(
    "option", {o.name: o for s in TABLE.values() for o in s.options}.values(), ids=lambda option: option.name
)
@pytest.mark.parametrize(
    "value",
    [
        *(-1, 0, 1, 2, 65536, 65537, 2**63 - 1, 2**63, -0.5, 1e-300, 0.5, 1.0, 1.5, True, False),
        *("auto", "given", "none", "lorax", "total", "frequency", "weighted", "unweighted"),
        *("module", "model", "q_proj", [], {}),
    ],
    ids=repr,
)
def test_the_schema_of_an_option_takes_what_its_check_takes(option: Option, value: object) -> None:
    is_valid = Draft202012Validator(option.check.schema).is_valid(value)
    try:
        option.check(value)
    except ValueError:
        # Patterns of modules have a grammar of their own, which the schema leaves to the check.
        assert not is_valid
    else:
        assert is_valid


def test_the_text_names_every_strategy_and_option_in_lines_that_fit() -> None:
    lines = catalog.as_text().splitlines()
    assert max(map(len, lines)) <= catalog.WIDTH
    headings = [line.strip() for line in lines if re.match(r" {2}\S", line)]
    assert headings[: len(TABLE)] == list(TABLE)
    assert "density=0.5" in headings[len(TABLE) :]
