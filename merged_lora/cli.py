"""The command ``merged-lora``: merges and calibrates adapters, checks merges, and shows the strategies.

Exit codes: 0; 2 for a user's mistake, with one line on stderr; 3 for a check that found a source of which
most is lost; 1 for a mistake of ours, with a traceback; 130 and 143 if the run was interrupted or terminated.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, catalog, commands
from .commands import LOGGER, UsageError, printable
from .errors import MergeError
from .locations import Location, locate
from .spec import check_own_name

PROG = "merged-lora"
SLOW = logging.getLogger("merged_lora.cpu_kernels.compiling")
"""Logs as information what a user at a terminal waits for."""
OWN_FLAGS = frozenset(("weights", "rank", "modules", "without"))
"""Options of strategies for which ``merge`` has a flag that does more."""
COMMANDS = {
    "merge": commands.merge,
    "calibrate": commands.calibrate,
    "check": commands.check,
    "inspect": commands.inspect,
    "strategies": commands.strategies,
}

EXAMPLES = """\
examples:
  merged-lora merge "ties(sql, 0.5*chat, density=0.3)" \\
      --adapter sql=adapters/sql --adapter chat=adapters/chat --output merged
  merged-lora merge "0.7*sql + 0.3*chat" --rank 16 \\
      --adapter sql=adapters/sql --adapter chat=adapters/chat --output merged
  merged-lora merge adapters/sql adapters/chat --strategy ties --weights 1 0.5 --density 0.3 --output merged
  merged-lora merge '{"ids": ["sql", "chat"], "weights": [0.7, 0.3], "merge_strategy": "linear"}' \\
      --adapter sql=adapters/sql --adapter chat=adapters/chat --output merged
"""


INSPECT_EXAMPLES = """\
examples:
  merged-lora inspect sql=adapters/sql chat=adapters/chat
  merged-lora inspect sql=adapters/sql chat=adapters/chat --json --plot alike.png
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all other errors of the command."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class CommandParser(Parser):
    """The parser of one command, which reports misspelt options before anything that they may have hidden."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """The namespace; raises UsageError for what the command does not know."""
        options = self._option_string_actions  # argparse has no public list of them
        given = list(args or ())
        for text in given[: given.index("--")] if "--" in given else given:
            option = text.partition("=")[0]
            if option.startswith("--") and option not in options:
                near = get_close_matches(option, options, n=1)
                self.error(f"unknown option {option}" + (f"; did you mean {near[0]}?" if near else ""))
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            hint = "; each source has an --adapter of its own" if all("=" in text for text in rest) else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return found, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (``sys.argv`` by default) and return its exit code."""
    try:
        with _warnings_on_stderr():
            arguments = parser().parse_args(argv)
            code = COMMANDS[arguments.command](arguments)
            print(end="", flush=True)
    except MergeError as error:
        print(printable(f"{PROG}: error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of stdout is gone. The interpreter flushes stdout once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def parser() -> Parser:
    """The parser of all commands, which raises UsageError."""
    parser = Parser(PROG, description="Merge LoRA adapters into one.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    added = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=CommandParser
    )

    _add_merge(added)
    _add_calibrate(added)
    _add_check(added)
    _add_inspect(added)
    _add_strategies(added)
    return parser


def _add_merge(added: Any) -> None:
    """Add the command ``merge``."""
    merge = added.add_parser(
        "merge",
        help="merge adapters into a new one",
        description="Merge adapters and write the result as a PEFT folder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    merge.add_argument(
        "what",
        metavar="SPEC",
        nargs="+",
        help='what to merge: "ties(a, 0.5*b)", "a + b", or JSON, after "--" if it begins with a minus sign; '
        "or with --strategy the sources themselves: FOLDER, LOCATION or NAME=LOCATION",
    )
    _add_adapters(merge, required=False)
    _add_strategy(merge)
    merge.add_argument("--output", metavar="DIR", type=Path, required=True, help="the folder to write")
    _add_choice(merge)
    _add_method(merge)
    merge.add_argument(
        "--base-model",
        metavar="NAME",
        help="the base model that the result names; by default the one that most sources name",
    )
    merge.add_argument("--overwrite", action="store_true", help="replace the adapter in DIR")
    merge.add_argument(
        "--keep-ranks",
        action="store_true",
        help="if modules differ in rank, do not pad them with zeros to the largest; the file is smaller, "
        "and not every program reads it right",
    )
    _add_reading(merge)


def _add_calibrate(added: Any) -> None:
    """Add the command ``calibrate``."""
    calibrate = added.add_parser(
        "calibrate",
        help="measure an adapter's inputs, for merges by regmean and for checks",
        description="Run a model with an adapter on a few prompts and on the adapter's own answers. What "
        "its modules take as inputs is written beside the adapter, with the prompts and answers for replays. "
        "A calibration that is there already is replaced.",
        allow_abbrev=False,
    )
    _add_model(calibrate)
    calibrate.add_argument(
        "--adapter", metavar="NAME=PATH", type=_named_folder, required=True, help="PEFT folder of the adapter"
    )
    calibrate.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        required=True,
        help='a JSON value on each line: {"messages": [...]}, {"prompt": "..."} or "..."',
    )
    calibrate.add_argument(
        "--count", metavar="N", type=int, default=16, help="how many prompts to use, the first ones (16)"
    )
    calibrate.add_argument(
        "--answers", metavar="N", type=int, default=64, help="largest number of tokens of an answer (64)"
    )
    calibrate.add_argument(
        "--components", metavar="N", type=int, default=32, help="directions to keep of each input (32)"
    )
    calibrate.add_argument(
        "--no-replay",
        dest="replay",
        action="store_false",
        help="store no prompts and answers, and measure on all prompts instead of every second one",
    )
    _add_reading(calibrate, sources=False)


def _add_check(added: Any) -> None:
    """Add the command ``check``."""
    check = added.add_parser(
        "check",
        help="see which of their own answers the sources of a merge keep",
        description="Make a merge in memory and run it over the prompts and answers in its sources' "
        "calibrations. The exit code is 3 if a source keeps less than half of its answers.",
        allow_abbrev=False,
    )
    _add_sources(check)
    _add_model(check)
    _add_choice(check)
    _add_method(check)
    check.add_argument("--json", action="store_true", help="print a JSON list")
    _add_reading(check)


def _add_inspect(added: Any) -> None:
    """Add the command ``inspect``."""
    inspect = added.add_parser(
        "inspect",
        help="see whether adapters may be merged, how, and what will hurt",
        description="Compare adapters without running a model: what each is, how alike their deltas are, "
        "which merges fit, and what to do. The exit code is 3 if one cannot be merged with the others.",
        epilog=INSPECT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    inspect.add_argument(
        "adapters",
        metavar="NAME=LOCATION",
        type=_named_location,
        nargs="+",
        help="where a source is: a PEFT folder, hf:org/repo[@revision][/folder], s3://bucket/folder, "
        "gs://bucket/folder or https://host/folder",
    )
    inspect.add_argument(
        "--density",
        metavar="D",
        type=float,
        default=0.2,
        help="share of each delta's entries, the largest ones, whose signs are compared (0.2)",
    )
    inspect.add_argument("--json", action="store_true", help="print one JSON object, with every module")
    inspect.add_argument(
        "--plot", metavar="FILE", type=Path, help="write a heat map of all modules as .png, .svg or .pdf"
    )
    _add_reading(inspect, sources=False)


def _add_strategies(added: Any) -> None:
    """Add the command ``strategies``."""
    strategies = added.add_parser("strategies", help="show the table of strategies", allow_abbrev=False)
    form = strategies.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as a JSON list")
    form.add_argument("--markdown", action="store_true", help="as the tables in docs/strategies.md")


def _add_sources(parser: Parser) -> None:
    """Add what says which merge to make."""
    parser.add_argument(
        "spec",
        metavar="SPEC",
        help='what to merge: "ties(a, 0.5*b)", "a + b", or JSON. After "--" it may begin with a minus sign',
    )
    _add_adapters(parser, required=True)


def _add_strategy(parser: Parser) -> None:
    """Add what says how to merge sources that are not in a spec: a strategy and its options."""
    parser.add_argument("--strategy", metavar="NAME", help="how to merge sources that are given as folders")
    parser.add_argument(
        "--weights",
        metavar="W",
        nargs="+",
        help="with --strategy: the weight of each source in their order, or auto",
    )
    for option in catalog.options():
        if option.name not in OWN_FLAGS:
            parser.add_argument(
                f"--{option.name.replace('_', '-')}",
                metavar="X",
                nargs="+" if option.per_source else 1,
                dest=f"option_{option.name}",
                help=f"with --strategy: {option.help}",
            )


def _add_adapters(parser: Parser, required: bool) -> None:
    parser.add_argument(
        "--adapter",
        metavar="NAME=LOCATION",
        type=_named_location,
        action="append",
        default=None if required else [],
        required=required,
        dest="adapters",
        help="where a source is, once per source: a PEFT folder, hf:org/repo[@revision][/folder], "
        "s3://bucket/folder, gs://bucket/folder or https://host/folder",
    )


def _add_choice(parser: Parser) -> None:
    """Add what says which modules to merge."""
    for flag, option, what in (
        ("--only", "modules", "merge these modules alone, such as q_proj, layers.0 or '*.self_attn.*'"),
        ("--without", "without", "leave these modules out of the merge, such as o_proj"),
    ):
        parser.add_argument(
            flag,
            metavar="PATTERN",
            nargs="+",
            action="extend",
            default=[],
            help=f"{what}; the option {option} of a spec",
        )


def _add_method(parser: Parser) -> None:
    """Add what says how to make a merge."""
    parser.add_argument(
        "--backend",
        default="auto",
        help="triton, cpu, numpy, or auto for the fastest that loads here (default)",
    )
    parser.add_argument(
        "--rank",
        metavar="K",
        type=int,
        help="largest rank of the result; cat and strategies on factors refuse to exceed it, "
        "all others approximate",
    )


def _add_model(parser: Parser) -> None:
    parser.add_argument("--model", required=True, help="folder of the base model, or its name on the hub")


def _add_reading(parser: Parser, sources: bool = True) -> None:
    """Add what says how to read adapters; ``sources``: of a merge."""
    parser.add_argument(
        "--drop",
        metavar="PART",
        nargs="+",
        action="extend",
        default=[],
        help="leave these parts out, instead of refusing adapters that have them: heads, embeddings, "
        "modules_to_save, biases, lora_bias, tokens, target_parameters, base_copies, or the name "
        "of a module that was saved whole",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read adapter_model.bin if there is nothing else; no code in it is run",
    )
    if sources:
        parser.add_argument(
            "--rename",
            metavar="FROM=TO",
            type=_renaming,
            action="append",
            default=[],
            help="replace the beginning FROM of module names by TO, in the sources that have it",
        )
        parser.add_argument(
            "--take",
            metavar="PART=NAME",
            type=_pair,
            action="append",
            default=[],
            help="take heads, embeddings or modules_to_save over from this source, and leave those of the "
            "others out",
        )


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form PART=NAME")
    return key, value


def _renaming(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not (old and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form FROM=TO")
    return old, new


def _named_location(text: str) -> tuple[str, Path | str]:
    name, equals, place = text.partition("=")
    if not (name and equals and place):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=PATH")
    try:
        check_own_name(name)
        found = locate(place)
    except MergeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name, place if isinstance(found, Location) else found


def _named_folder(text: str) -> tuple[str, Path]:
    name, place = _named_location(text)
    if isinstance(place, str):
        raise argparse.ArgumentTypeError(
            f"a calibration is written into the adapter's folder, and {place} is none here; give a copy of it"
        )
    return name, place


@contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Print each warning that the core logs as one line on stderr; on a terminal, also what takes a while."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.INFO)
    handler.setFormatter(_Line())
    LOGGER.addHandler(handler)
    if sys.stderr.isatty():
        SLOW.setLevel(logging.INFO)
    try:
        yield
    finally:
        SLOW.setLevel(logging.NOTSET)
        LOGGER.removeHandler(handler)


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else "warning: "
        return printable(f"{PROG}: {level}{record.getMessage()}")
