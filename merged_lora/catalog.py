"""The table of strategies as Markdown, as JSON and as text. Knows nothing of how a strategy is computed."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Sequence

from .recipe import EVERYWHERE, Option, RankRule, Strategy
from .strategies import TABLE

WIDTH = 80

RESULT_RANK: dict[RankRule, str] = {
    "equal": "that of the sources, which must be equal",
    "fit": "sum of the sources' ranks, at most the limit",
    "exact": "sum of the sources' ranks",
    "truncate": "the option rank",
}

HEADINGS = ("strategy", "what it does", "space", "rank of the result", "options", "source")


def as_markdown() -> str:
    """A table of the strategies and one of the options, as the README shows them."""
    strategies = [
        (
            f"`{strategy.name}`",
            strategy.summary,
            strategy.recipe.space,
            RESULT_RANK[strategy.recipe.rank],
            ", ".join(f"`{assignment(option)}`" for option in _own(strategy)),
            _linked(strategy.source),
        )
        for strategy in TABLE.values()
    ]
    options = [(f"`{assignment(option)}`", option.help, _takers(option)) for option in _options()]
    return f"{_table(HEADINGS, strategies)}\n\n{_table(('option', 'what it does', 'taken by'), options)}\n"


def as_json() -> list[dict[str, object]]:
    """A list of objects, one per strategy, with every option it takes."""
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
    """The same two tables for a terminal, no line over ``WIDTH`` characters."""
    lines = ["strategies", ""]
    for strategy in TABLE.values():
        own = "".join(f", {assignment(option)}" for option in _own(strategy))
        lines += [
            f"  {strategy.name}",
            *_indented(strategy.summary),
            *_indented(f"options: {own.removeprefix(', ')}" if own else ""),
            *_indented(f"{strategy.recipe.space} space; rank: {RESULT_RANK[strategy.recipe.rank]}"),
            *_indented(f"from: {strategy.source}"),
            "",
        ]
    lines += ["options", ""]
    for option in _options():
        lines += [f"  {assignment(option)}", *_indented(option.help), *_indented(f"for: {_takers(option)}")]
    return "\n".join(lines) + "\n"


def assignment(option: Option) -> str:
    """An option with its default, as a spec writes it: ``density=0.5``; the bare name where it has none."""
    return option.name if option.default is None else f"{option.name}={_value(option.default)}"


def _value(value: object) -> str:
    return json.dumps(value).removesuffix(".0")


def _own(strategy: Strategy) -> list[Option]:
    """What a strategy takes beyond the options that all take."""
    return [option for option in strategy.options if option not in EVERYWHERE]


def _options() -> list[Option]:
    """Every option once, in the order of the table; those that all strategies take come last."""
    seen = {option.name: option for strategy in TABLE.values() for option in _own(strategy)}
    return [*seen.values(), *EVERYWHERE]


def _takers(option: Option) -> str:
    takers = [strategy.name for strategy in TABLE.values() if option in strategy.options]
    return "every strategy" if len(takers) == len(TABLE) else ", ".join(takers)


def _linked(source: str) -> str:
    return re.sub(r"arXiv ([0-9]{4}\.[0-9]{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
