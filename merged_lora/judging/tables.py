"""Tables for a terminal, a pipe and a notebook.  Knows nothing of their contents."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

NUMERIC = frozenset("0123456789.,+-%± eEnaif/")


@dataclass(frozen=True)
class Table:
    """Text in rows.

    title:    what it is about.
    headings: of the columns.
    rows:     as many cells as headings, each.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def text(self) -> str:
        """The table as plain text, whose columns are aligned."""
        lines = [self.headings, *self.rows]
        widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
        right = self._right()
        found = []
        for line in lines:
            cells = [
                " " * (width - _width(cell)) + cell if to_right else cell + " " * (width - _width(cell))
                for cell, width, to_right in zip(line, widths, right, strict=True)
            ]
            found.append("  ".join(cells).rstrip())
        return "\n".join([self.title, *(f"  {line}" for line in found)])

    def html(self) -> str:
        """The table for a notebook."""
        right = self._right()

        def row(cells: Sequence[str], tag: str) -> str:
            styled = (
                f"<{tag} style='text-align:{'right' if to_right else 'left'}'>{html.escape(cell)}</{tag}>"
                for cell, to_right in zip(cells, right, strict=True)
            )
            return f"<tr>{''.join(styled)}</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        return (
            f"<table><caption>{html.escape(self.title)}</caption><thead>{row(self.headings, 'th')}</thead>"
            f"<tbody>{body}</tbody></table>"
        )

    def rich(self) -> Any:
        """The table as ``rich`` prints it, which has to be installed."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(self.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading, to_right in zip(self.headings, self._right(), strict=True):
            table.add_column(Text(heading), justify="right" if to_right else "left")
        for cells in self.rows:
            table.add_row(*map(Text, cells))  # Text: brackets in a name are not markup
        return table

    def _right(self) -> list[bool]:
        """Which columns hold numbers alone, and so are aligned at their end."""
        if not self.rows:
            return [False] * len(self.headings)
        return [
            all(map(NUMERIC.issuperset, column)) and any(c.isdigit() for cell in column for c in cell)
            for column in zip(*self.rows, strict=True)
        ]


def as_text(tables: Iterable[Table], sections: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Tables, and lines under headings, as plain text."""
    parts = [table.text() for table in tables]
    parts += ["\n".join([heading, *(f"  {line}" for line in lines)]) for heading, lines in sections if lines]
    return "\n\n".join(parts)


def as_html(tables: Iterable[Table], sections: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Tables, and lines under headings, for a notebook."""
    parts = [table.html() for table in tables]
    for heading, lines in sections:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        parts.append(f"<p>{html.escape(heading)}</p><ul>{items}</ul>")
    return "".join(parts)


def _width(text: str) -> int:
    """The number of columns that a terminal takes for a text."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    marks = sum(unicodedata.combining(character) > 0 for character in text)
    return len(text) + wide - marks
