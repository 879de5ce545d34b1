"""The command ``merged-lora``: its commands, their errors and their exit codes.

Exit codes: 0; 2 for a user's mistake, with one line on stderr; 3 for an answer that a script should heed,
such as a check that found a source of which most is lost; 1 for a mistake of ours, with a traceback; 130
and 143 if the run was interrupted or terminated.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from types import ModuleType
from typing import NoReturn

from . import __version__
from .commands import calibrating, checking, evaluating, inspecting, merging, playing, strategies, tuning
from .commands.running import LOGGER, UsageError
from .errors import MergeError
from .names import printable

PROG = "merged-lora"
SLOW = logging.getLogger("merged_lora.cpu_kernels.compiling")
"""Logs as information what a user at a terminal waits for."""
COMMANDS: dict[str, ModuleType] = {
    "merge": merging,
    "calibrate": calibrating,
    "check": checking,
    "inspect": inspecting,
    "eval": evaluating,
    "tune": tuning,
    "playground": playing,
    "strategies": strategies,
}


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
            code: int = COMMANDS[arguments.command].run(arguments)
            print(end="", flush=True)
    except MergeError as error:
        print(printable(f"{PROG}: error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _drop_stdout()
        print(f"{PROG}: error: cannot write: {error.strerror}", file=sys.stderr)
        return 2
    return code


def _drop_stdout() -> None:
    """Let nothing more reach stdout, which the interpreter flushes once more when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser() -> Parser:
    """The parser of all commands, which raises UsageError."""
    parser = Parser(PROG, description="Merge LoRA adapters into one.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    added = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=CommandParser
    )
    for command in COMMANDS.values():
        command.add(added)
    return parser


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
