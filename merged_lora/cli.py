"""The command ``merged-lora``: merge adapters into a folder, show the strategies.

Exit codes: 0; 2 for a user's mistake, with one line on stderr; 1 for ours, with a traceback; 130 and 143 if
the run was interrupted or terminated.  torch is imported only by the commands that need it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import __version__, catalog
from .errors import MergeError, SpecError, UnknownAdapterError
from .spec import MergeSpec, from_json, parse

if TYPE_CHECKING:
    from .backends import Result

PROG = "merged-lora"
LOGGER = logging.getLogger("merged_lora")

EXAMPLES = """\
examples:
  merged-lora merge "ties(sql, 0.5*chat, density=0.3)" \\
      --adapter sql=adapters/sql --adapter chat=adapters/chat --output merged
  merged-lora merge "0.7*sql + 0.3*chat" --rank 16 \\
      --adapter sql=adapters/sql --adapter chat=adapters/chat --output merged
  merged-lora merge '{"ids": ["sql", "chat"], "weights": [0.7, 0.3], "merge_strategy": "linear"}' \\
      --adapter sql=adapters/sql --adapter chat=adapters/chat --output merged
"""


class UsageError(MergeError):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all other errors of the command."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (``sys.argv`` by default) and return its exit code."""
    try:
        with _warnings_on_stderr():
            arguments = _parser().parse_args(argv)
            command = {"merge": _merge, "strategies": _strategies}[arguments.command]
            command(arguments)
            print(end="", flush=True)
    except MergeError as error:
        print(_printable(f"{PROG}: error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of stdout is gone. The interpreter flushes stdout once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _parser() -> Parser:
    parser = Parser(PROG, description="Merge LoRA adapters into one.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    merge = commands.add_parser(
        "merge",
        help="merge adapters into a new one",
        description="Merge adapters and write the result as a PEFT folder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    merge.add_argument(
        "spec",
        metavar="SPEC",
        help='what to merge: "ties(a, 0.5*b)", "a + b", or JSON. After "--" it may begin with a minus sign',
    )
    merge.add_argument(
        "--adapter",
        metavar="NAME=PATH",
        type=_named_path,
        action="append",
        required=True,
        dest="adapters",
        help="the PEFT folder of a source, once per source",
    )
    merge.add_argument("--output", metavar="DIR", type=Path, required=True, help="the folder to write")
    merge.add_argument(
        "--backend",
        default="auto",
        help="triton, cpu, numpy, or auto for the fastest that loads here (default)",
    )
    merge.add_argument(
        "--rank",
        metavar="K",
        type=int,
        help="largest rank of the result; cat and strategies on factors refuse to exceed it, "
        "all others approximate",
    )
    merge.add_argument("--overwrite", action="store_true", help="replace the adapter in DIR")
    merge.add_argument(
        "--drop",
        metavar="KEY",
        nargs="+",
        action="extend",
        default=[],
        help="leave these parts out of the sources, instead of refusing sources that have them: "
        "modules_to_save, lora_bias, target_parameters",
    )

    strategies = commands.add_parser("strategies", help="show the table of strategies", allow_abbrev=False)
    form = strategies.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as a JSON list")
    form.add_argument("--markdown", action="store_true", help="as the tables in docs/strategies.md")
    return parser


def _named_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=PATH")
    return name, Path(path)


def _strategies(arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(catalog.as_json(), indent=2))
    else:
        print(catalog.as_markdown() if arguments.markdown else catalog.as_text(), end="")


def _merge(arguments: argparse.Namespace) -> None:
    spec = _read_spec(arguments.spec)
    paths = _paths(spec, arguments.adapters)

    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from .adapters import Adapter
    from .engine import plan, run
    from .peft_files import check_target

    started = time.perf_counter()
    with _terminated_cleanly():
        check_target(arguments.output, arguments.overwrite)
        sources = {name: Adapter.load(path, arguments.drop) for name, path in paths.items()}
        planned = plan(spec, sources, arguments.rank)
        # disable=None: a bar is shown only if stderr is a terminal
        bar = tqdm(total=len(planned.modules), unit="module", leave=False, disable=None)
        with bar, logging_redirect_tqdm([LOGGER]):
            made = run(planned, arguments.backend, bar.update)
        made.adapter.save(arguments.output, arguments.overwrite)

    parts = [
        str(spec),
        f"rank {made.adapter.rank}",
        f"{len(made.adapter.modules)} modules",
        *_kept(made.result),
        f"{time.perf_counter() - started:.1f} s",
    ]
    print(_printable(f"{arguments.output}: {', '.join(parts)}"))


def _kept(result: Result) -> list[str]:
    """How much of the squared norm is left, with the range over modules, if the rank of any was cut."""
    shares = result.kept_by_module().values()
    by_module = f" ({min(shares):.2%} to {max(shares):.2%} by module)" if len(shares) > 1 else ""
    return [f"{result.kept_energy():.2%} of the squared norm kept{by_module}"] if shares else []


def _read_spec(text: str) -> MergeSpec:
    if not text.lstrip().startswith("{"):
        return parse(text)
    try:
        body = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise SpecError("the spec starts with '{' but is not valid JSON") from None
    return from_json(body)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; raises SpecError if a key occurs twice."""
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise SpecError(f'"{name[:64]}" is given twice')
        found[name] = value
    return found


def _paths(spec: MergeSpec, named: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    """The folder of each source; raises MergeError unless every source, and nothing else, is given once."""
    paths = dict(named)
    for name in spec.names:
        if name not in paths:
            raise UnknownAdapterError(f"unknown adapter {name!r}; say where it is with --adapter {name}=PATH")
    for name, _ in named:
        if [other for other, _ in named].count(name) > 1:
            raise UsageError(f"--adapter {name}=... is given more than once")
        if name not in spec.names:
            raise UsageError(f"--adapter {name}=... is not used by {spec}")
    return paths


@contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that a half-written scratch folder is removed."""

    def leave(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Print each warning that the core logs as one line on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_WarningLine())
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)


class _WarningLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _printable(f"{PROG}: warning: {record.getMessage()}")


def _printable(text: str) -> str:
    """The text on one line: names and paths may contain line ends, terminal codes or undecodable bytes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
