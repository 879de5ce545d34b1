"""A griffe extension: docstrings in the style of this repository become Markdown.

A docstring lists parameters as ``name: what it is`` lines, and names objects as ``:class:`Name``` or in
double backticks. Knows nothing of what a docstring says.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")
ENTRY = re.compile(r"(?P<names>[a-z_][a-z0-9_]*(?:, [a-z_][a-z0-9_]*)*):\s+(?P<text>\S.*)")


class RepositoryStyle(griffe.Extension):
    """Turns lists of parameters into lists of Markdown."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Rewrite the docstring of one object in place."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """A docstring with its parameters as a list and its roles as code."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return ROLE.sub(r"`\1`", "\n\n".join(map(_paragraph, paragraphs)))


def _paragraph(text: str) -> str:
    lines = text.split("\n")
    first = ENTRY.fullmatch(lines[0])
    if first is None or any(not ENTRY.fullmatch(line) and not line.startswith(" ") for line in lines):
        return text
    items: list[str] = []
    for line in lines:
        entry = ENTRY.fullmatch(line)
        if entry:
            names = ", ".join(f"**{name}**" for name in entry["names"].split(", "))
            items.append(f"- {names}: {entry['text']}")
        else:
            items.append(f"  {line.strip()}")
    return "\n".join(items)
