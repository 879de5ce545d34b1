"""``merged-lora strategies``: the table of strategies."""

from __future__ import annotations

import argparse
import json
from typing import Any

from merged_lora import catalog

from .arguments import ExamplesFormatter

EXAMPLES = """\
examples:
  merged-lora strategies
  merged-lora strategies --json
"""


def add(added: Any) -> None:
    """Add the command ``strategies``."""
    strategies = added.add_parser(
        "strategies",
        help="show the table of strategies",
        epilog=EXAMPLES,
        formatter_class=ExamplesFormatter,
        allow_abbrev=False,
    )
    form = strategies.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as a JSON list")
    form.add_argument("--markdown", action="store_true", help="as the tables in docs/strategies.md")


def run(arguments: argparse.Namespace) -> int:
    """Print the table of strategies."""
    if arguments.json:
        print(json.dumps(catalog.as_json(), indent=2))
    else:
        print(catalog.as_markdown() if arguments.markdown else catalog.as_text(), end="")
    return 0
