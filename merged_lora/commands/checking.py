"""``merged-lora check``: which of their own answers the sources of a merge keep."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from .arguments import (
    ExamplesFormatter,
    add_adapters,
    add_choice,
    add_method,
    add_model,
    add_reading,
    chosen,
    load,
    paths_of,
    read_spec,
)
from .running import shares, terminated_cleanly

SKILL_LOST = 3
"""Exit code of a check that found a source of which most is lost."""

EXAMPLES = """\
examples:
  merged-lora check "regmean(sql, chat)" --model models/base \\
      --adapter sql=adapters/sql --adapter chat=adapters/chat
"""


def add(added: Any) -> None:
    """Add the command ``check``."""
    check = added.add_parser(
        "check",
        help="see which of their own answers the sources of a merge keep",
        description="Make a merge in memory and run it over the prompts and answers in its sources' "
        "calibrations. The exit code is 3 if a source keeps less than half of its answers.",
        epilog=EXAMPLES,
        formatter_class=ExamplesFormatter,
        allow_abbrev=False,
    )
    _add_sources(check)
    add_model(check)
    add_choice(check)
    add_method(check)
    check.add_argument("--json", action="store_true", help="print a JSON list")
    add_reading(check)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    """Add what says which merge to make."""
    parser.add_argument(
        "spec",
        metavar="SPEC",
        help='what to merge: "ties(a, 0.5*b)", "a + b", or JSON. After "--" it may begin with a minus sign',
    )
    add_adapters(parser, required=True)


def run(arguments: argparse.Namespace) -> int:
    """Print which of their answers the sources of a merge keep."""
    spec = chosen(read_spec(arguments.spec), arguments)
    paths = paths_of(spec, arguments.adapters)

    from merged_lora.checking import check

    with terminated_cleanly(), shares() as progress:
        found = check(
            spec,
            load(arguments, paths),
            arguments.model,
            backend=arguments.backend,
            rank=arguments.rank,
            progress=progress,
        )
    if arguments.json:
        print(json.dumps([asdict(each) | {"lost": each.lost} for each in found], indent=2))
    else:
        for each in found:
            print(f"{each}, {each.nll:.3f} nats per token")
    return SKILL_LOST if any(each.lost for each in found) else 0
