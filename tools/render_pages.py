"""Writes into the pages of ``docs/`` what follows from the code: tables of strategies, help of commands.

    python tools/render_pages.py

A rendered part of a page lies between ``<!-- rendered: NAME -->`` and ``<!-- end of rendered -->``. It is
committed, so that the pages can be read without building the site; a test holds it to the code.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from merged_lora import catalog, cli

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

from formats import page as formats  # noqa: E402

DOCS = ROOT / "docs"
BLOCK = re.compile(r"(<!-- rendered: (.+?) -->\n)(.*?)(<!-- end of rendered -->)", re.DOTALL)


def help_of(command: str) -> str:
    """The help of a command of ``merged-lora``, 80 columns wide, as a block of Markdown."""
    printed = io.StringIO()
    wide = mock.patch.dict(os.environ, {"COLUMNS": "80"})
    with wide, contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    return f"```text\n{printed.getvalue().rstrip()}\n```\n"


PARTS: dict[str, Callable[[], str]] = {
    "strategies": catalog.as_markdown,
    "kinds of adapters": formats.kinds_as_markdown,
    "architectures": formats.architectures_as_markdown,
    "merged-lora merge": lambda: help_of("merge"),
    "merged-lora calibrate": lambda: help_of("calibrate"),
    "merged-lora check": lambda: help_of("check"),
    "merged-lora inspect": lambda: help_of("inspect"),
    "merged-lora eval": lambda: help_of("eval"),
    "merged-lora tune": lambda: help_of("tune"),
    "merged-lora playground": lambda: help_of("playground"),
    "merged-lora strategies": lambda: help_of("strategies"),
}
"""What can be rendered, by the name that a page asks for it with."""


def rendered(page: str) -> str:
    """The text of a page with all its rendered parts as the code has them now."""
    return BLOCK.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}{match[4]}", page)


def main() -> None:
    """Rewrite the pages that have rendered parts."""
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if rendered(text) != text:
            page.write_text(rendered(text), encoding="utf-8")
            print(f"rendered {page.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
