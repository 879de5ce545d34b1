"""The table of strategies as Markdown, JSON and text.  Knows nothing of how a strategy is computed."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Sequence

from .recipe import EVERYWHERE, RANK, Option, RankRule, Space, Strategy
from .strategies import TABLE

WIDTH = 80

RESULT_RANK: dict[RankRule, str] = {
    "equal": "that of the sources, which must be equal",
    "fit": "sum of the sources' ranks, at most the limit",
    "exact": "sum of the sources' ranks",
    "truncate": "the option rank",
}

PLACES: dict[Space, str] = {
    "factors": "the entries of A and of B, each on its own",
    "sums": "the deltas as a whole, exactly",
    "entries": "the entries of the deltas, which are formed a few rows at a time",
    "core": "the coordinates of the deltas in bases that the sources share",
    "outputs": "the outputs of the deltas on each source's own inputs, known from calibrations",
}
"""What a strategy computes on, by the word of its recipe."""

MANY = 4
"""An option that more strategies take is shown with them in the first table, not in its own row."""


def as_markdown() -> str:
    """Three tables, as docs/strategies.md shows them: the families, where each computes, and the options."""
    families = [
        (
            ", ".join(f"`{strategy.name}`" for strategy in family),
            family[0].summary,
            ", ".join(_shown(option, family) for option in _taken(family)),
            _linked(family[0].source),
        )
        for family in _families()
    ]
    places = [
        (PLACES[place], RESULT_RANK[rank], ", ".join(f"`{name}`" for name in names))
        for (place, rank), names in _by_place().items()
    ]
    taken = [(f"`{assignment(option)}`", option.help, _few_takers(option)) for option in options()]
    tables = (
        _table(("strategies", "what they do", "options of their own", "source"), families),
        _table(("computed on", "rank of the result", "strategies"), places),
        _table(("option", "what it does", "taken by"), taken),
    )
    return "\n\n".join(tables) + "\n"


def as_json() -> list[dict[str, object]]:
    """A list of objects, one per strategy, with every option it takes and the JSON Schema of one value."""
    return [
        {
            "name": strategy.name,
            "summary": strategy.summary,
            "space": strategy.recipe.space,
            "rank": RESULT_RANK[strategy.recipe.rank],
            "options": [
                {
                    "name": option.name,
                    "default": option.default,
                    "per_source": option.per_source,
                    "schema": option.check.schema,
                    "help": option.help,
                }
                for option in strategy.options
            ],
            "sources_min": strategy.sources_min,
            "sources_max": strategy.sources_max,
            "ordered": strategy.ordered,
            "source": strategy.source,
        }
        for strategy in TABLE.values()
    ]


def as_text() -> str:
    """The strategies and the options for a terminal, in lines of at most ``WIDTH`` characters."""
    lines = ["strategies", ""]
    for strategy in TABLE.values():
        own = "".join(f", {assignment(option)}" for option in _own(strategy))
        lines += [
            f"  {strategy.name}",
            *_indented(strategy.summary),
            *_indented(f"options: {own.removeprefix(', ')}" if own else ""),
            *_indented(f"computed on: {PLACES[strategy.recipe.space]}"),
            *_indented(f"rank: {RESULT_RANK[strategy.recipe.rank]}"),
            *_indented(f"from: {strategy.source}"),
            "",
        ]
    lines += ["options", ""]
    for option in options():
        lines += [f"  {assignment(option)}", *_indented(option.help), *_indented(f"for: {_takers(option)}")]
    return "\n".join(lines) + "\n"


def assignment(option: Option) -> str:
    """An option with its default, as a spec writes it: ``density=0.5``, or its name alone without one."""
    return option.name if option.default is None else f"{option.name}={_value(option.default)}"


def _value(value: object) -> str:
    return json.dumps(value).removesuffix(".0")


def _own(strategy: Strategy) -> list[Option]:
    """The options of a strategy beyond those that every strategy takes."""
    return [option for option in strategy.options if option not in EVERYWHERE]


def options() -> list[Option]:
    """Every option once, in the order of the table.  Those that every strategy takes come last."""
    seen = {option.name: option for strategy in TABLE.values() for option in _own(strategy)}
    return [*seen.values(), *EVERYWHERE]


def _takers(option: Option) -> str:
    takers = [strategy.name for strategy in TABLE.values() if option in strategy.options]
    return "every strategy" if len(takers) == len(TABLE) else ", ".join(takers)


def _few_takers(option: Option) -> str:
    """The strategies that take an option, or a word for them if they are many."""
    takers = [strategy.name for strategy in TABLE.values() if option in strategy.options]
    if len(takers) == len(TABLE):
        return "every strategy"
    if option is RANK:
        return "every strategy whose result has that rank"
    return "see the families" if len(takers) > MANY else ", ".join(f"`{name}`" for name in takers)


def _families() -> list[list[Strategy]]:
    """The strategies by the rule that they follow, in the order of the table.

    ``ties``, ``ties_svd`` and ``core_ties`` are one family: the same rule, computed in three places.
    """
    families: dict[str, list[Strategy]] = {}
    for strategy in TABLE.values():
        families.setdefault(strategy.name.removeprefix("core_").removesuffix("_svd"), []).append(strategy)
    return list(families.values())


def _taken(family: Sequence[Strategy]) -> list[Option]:
    """The options of a family, except those of every strategy and ``rank``, which the second table has."""
    options = {option.name: option for strategy in family for option in _own(strategy)}
    return [option for option in options.values() if option is not RANK]


def _shown(option: Option, family: Sequence[Strategy]) -> str:
    """An option as a family's row shows it, with the strategies that take it if others do not."""
    takers = [f"`{strategy.name}`" for strategy in family if option in strategy.options]
    return f"`{option.name}`" + (f" ({', '.join(takers)})" if len(takers) < len(family) else "")


def _by_place() -> dict[tuple[Space, RankRule], list[str]]:
    """The names of the strategies by where they compute and by the rank of their result."""
    found: dict[tuple[Space, RankRule], list[str]] = {}
    for strategy in TABLE.values():
        found.setdefault((strategy.recipe.space, strategy.recipe.rank), []).append(strategy.name)
    return found


def _linked(source: str) -> str:
    return re.sub(r"arXiv ([0-9]{4}\.[0-9]{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
