"""A griffe extension: docstrings in the style of this repository become Markdown.

A docstring lists parameters and attributes as ``name: what it is`` lines, and names objects as
``:class:`Name``` or in double backticks. Knows nothing of what a docstring says.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from typing import Any

import griffe

ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")
ENTRY = re.compile(r"(?P<names>[a-z_][a-z0-9_]*(?:, [a-z_][a-z0-9_]*)*):\s+(?P<text>\S.*)")


class RepositoryStyle(griffe.Extension):
    """Turns lists of parameters into lists of Markdown."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Rewrite the docstring of one object in place."""
        if obj.docstring is not None:
            parameters = {parameter.name for parameter in getattr(obj, "parameters", ())}
            obj.docstring.value = as_markdown(obj.docstring.value, {*parameters, *obj.members})


def as_markdown(docstring: str, names: Collection[str]) -> str:
    """A docstring with its roles as code and a list of what it says about these parameters or attributes."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return ROLE.sub(r"`\1`", "\n\n".join(_paragraph(text, names) for text in paragraphs))


def _paragraph(text: str, names: Collection[str]) -> str:
    """A paragraph, as a list if it begins with one of the names; other lines go on with the entry before."""
    items: list[str] = []
    for line in text.split("\n"):
        entry = ENTRY.fullmatch(line)
        if entry and set(entry["names"].split(", ")) <= set(names):
            named = ", ".join(f"**{name}**" for name in entry["names"].split(", "))
            items.append(f"- {named}: {entry['text']}")
        elif items:
            items.append(f"  {line.strip()}")
        else:
            return text
    return "\n".join(items)
