"""``merged-lora eval``: what a served model, its adapters and merges of them make of labelled examples."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merged_lora.errors import listed
from merged_lora.names import printable

from .arguments import ExamplesFormatter, add_served, read_spec, served
from .running import LOGGER, UsageError, interrupts_explained, output, terminated_cleanly

if TYPE_CHECKING:
    from merged_lora.judging.evaluation import Evaluation

KEEPS_LESS = 3
"""Exit code if a merge keeps less than ``--fail-under``, or was refused by the server."""

EXAMPLES = """\
examples:
  merged-lora eval --base-url http://localhost:8000/v1 --data sql=sql.jsonl --data chat=chat.jsonl \\
      --spec 'ties(sql, chat)' --spec '0.7*sql + 0.3*chat' --results rows.jsonl
  merged-lora eval --base-url http://localhost:8000/v1 --data sql=sql.jsonl --data chat=chat.jsonl \\
      --spec 'ties(sql, chat)' --metric likelihood --json --plot kept.svg --fail-under 0.9

a line of FILE: {"messages": [{"role": "user", "content": "..."}], "answer": "..."}
            or: {"prompt": "...", "answer": ["...", "or this"]}
"""


def add(added: Any) -> None:
    """Add the command ``eval``."""
    evaluate = added.add_parser(
        "eval",
        help="see what merges on a server keep of their sources, on labelled examples",
        description="Run a served model, each of its adapters and each merge on labelled examples. The table "
        "says what share of its source's score a merge keeps, the worst task first. The key of a server that "
        "wants one is read from the environment variable OPENAI_API_KEY. Run again with the same --results, "
        "it measures only what is missing.",
        epilog=EXAMPLES,
        formatter_class=ExamplesFormatter,
        allow_abbrev=False,
    )
    add_served(evaluate)
    evaluate.add_argument(
        "--spec",
        metavar="SPEC",
        action="append",
        default=[],
        dest="specs",
        help='a merge, such as "ties(sql, chat)", or JSON, or the name of a served model; once for each',
    )
    evaluate.add_argument(
        "--metric",
        default="exact",
        help="what the tables are of: exact (default), contains, rouge-l, or likelihood, the mean "
        "probability of the right answer's tokens",
    )
    evaluate.add_argument(
        "--results",
        metavar="FILE",
        type=Path,
        help="write each answer here, and go on from those that are here",
    )
    evaluate.add_argument(
        "--no-likelihood",
        dest="likelihood",
        action="store_false",
        help="do not ask how likely right answers are",
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object, with every answer")
    evaluate.add_argument(
        "--plot", metavar="FILE", type=Path, help="draw what merges keep, as .png, .svg or .pdf"
    )
    evaluate.add_argument(
        "--fail-under",
        metavar="SHARE",
        type=_share,
        help="exit with code 3 if a merge keeps less than this share of a source's score, such as 0.9",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print what merges keep of their sources."""
    asked = served(arguments)
    specs = [read_spec(text) if text.lstrip().startswith("{") else text for text in arguments.specs]
    for option, given in (("--plot", arguments.plot), ("--fail-under", arguments.fail_under)):
        if given is not None and not specs:
            raise UsageError(f"{option} is about merges; name at least one with --spec")

    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from merged_lora.judging.evaluating import evaluate
    from merged_lora.judging.figures import check_path

    if arguments.plot is not None:
        check_path(arguments.plot)
    bar = tqdm(unit=" examples", leave=False, disable=None)  # None: only if stderr is a terminal

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    explained = interrupts_explained("--results", arguments.results)
    with explained, terminated_cleanly(), bar, logging_redirect_tqdm([LOGGER]):
        found = evaluate(
            **asked,
            specs=specs,
            metric=arguments.metric,
            likelihood=arguments.likelihood,
            results=arguments.results,
            progress=progress,
        )
    output(found, arguments)
    return _code(found, arguments.fail_under)


def _code(found: Evaluation, least: float | None) -> int:
    """The exit code, with one line for what a script should heed."""
    reasons = [f"the server refuses {spec}" for spec in found.refused]
    if least is not None:
        reasons += [reason for spec in found.ranking if (reason := _shortfall(found, spec, least))]
    for reason in reasons:
        print(printable(f"merged-lora: {reason}"), file=sys.stderr)
    return KEEPS_LESS if reasons else 0


def _shortfall(found: Evaluation, spec: str, least: float) -> str | None:
    """Why a merge does not keep enough, None if it does."""
    kept = found.of(spec)
    without = [each.task for each in kept if each.retention is None]
    if without:
        return f"{listed(without)}: its source has no score above zero that {spec} could keep"
    worst = kept[0]
    if worst.retention is None or worst.retention.value >= least:
        return None
    return f"{spec} keeps {worst.retention} of {worst.task}, and less than {least:.0%}"


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 0 to 1, such as 0.9")
    return share
