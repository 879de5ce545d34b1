"""Tables for a terminal, a pipe and a notebook.  Knows nothing of their contents."""

from __future__ import annotations

import html
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merged_lora.names import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 118
"""Columns that prose is as wide as."""
NUMERIC = frozenset("0123456789.,+-%± eEnaif/")


@dataclass(frozen=True)
class Table:
    """Text in rows.

    title:    what it is about.
    headings: of the columns.
    rows:     as many cells as headings, each; what cannot be printed is escaped.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", printable(self.title))
        object.__setattr__(self, "headings", tuple(map(printable, self.headings)))
        object.__setattr__(self, "rows", tuple(tuple(map(printable, cells)) for cells in self.rows))

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


@dataclass(frozen=True)
class Section:
    """Lines under a heading.

    prose: whether a long line may be broken; a spec or a command may not, so that it can be copied.
    """

    heading: str
    lines: Sequence[str]
    prose: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "lines", tuple(map(printable, self.lines)))

    def text(self) -> str:
        """The section as plain text."""
        if not self.prose:
            return "\n".join([self.heading, *(f"  {line}" for line in self.lines)])
        wrapped = [textwrap.fill(x, WIDTH, initial_indent="  ", subsequent_indent="    ") for x in self.lines]
        return "\n".join([self.heading, *wrapped])

    def html(self) -> str:
        """The section for a notebook."""
        tag = "span" if self.prose else "code"
        items = "".join(f"<li><{tag}>{html.escape(line)}</{tag}></li>" for line in self.lines)
        return f"<p>{html.escape(self.heading)}</p><ul>{items}</ul>"


class Report:
    """What was found: tables, sections and a plot, as plain text, for JSON and for a notebook."""

    def tables(self) -> Sequence[Table]:
        """The tables, in their order."""
        raise NotImplementedError

    def sections(self) -> Sequence[Section]:
        """What follows them; those without a line are not shown."""
        raise NotImplementedError

    def plot(self) -> Figure:
        """A figure, which a notebook shows; raises MergeError.

        Needs matplotlib, of the extra ``plot``.
        """
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        raise NotImplementedError

    def __str__(self) -> str:
        """The tables and the sections as plain text."""
        return "\n\n".join(part.text() for part in self._parts())

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return "".join(part.html() for part in self._parts())

    def _parts(self) -> list[Table | Section]:
        return [*self.tables(), *(section for section in self.sections() if section.lines)]


def _width(text: str) -> int:
    """The number of columns that a terminal takes for a text."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    marks = sum(unicodedata.combining(character) > 0 for character in text)
    return len(text) + wide - marks
