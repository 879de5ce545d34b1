"""How every command runs: its errors, its bars and what ends it."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from merged_lora.errors import MergeError
from merged_lora.names import printable

if TYPE_CHECKING:
    from merged_lora.judging.tables import Report

LOGGER = logging.getLogger("merged_lora")


class UsageError(MergeError):
    """The command line itself is wrong."""


@contextmanager
def shares() -> Iterator[Callable[[float], object]]:
    """Show a bar for work of which shares are reported, on a terminal, and none of transformers' own."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with suppress(ImportError):
        import transformers

        quieted: Any = transformers.utils.logging
        quieted.disable_progress_bar()
        quieted.set_verbosity_error()
    layout = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    bar = tqdm(total=1.0, bar_format=layout, leave=False, disable=None)  # None: only if stderr is a terminal
    with bar, logging_redirect_tqdm([LOGGER]):
        yield bar.update


@contextmanager
def interrupts_explained(option: str, file: Path | None, found: Callable[[], str] = str) -> Iterator[None]:
    """Say on stderr, after Ctrl-C, what is kept of a run.

    option: that names the file.
    found:  what there is to say of the result so far.
    """
    try:
        yield
    except KeyboardInterrupt:
        kept = f"the same command goes on from {file}" if file else f"{option} FILE would have kept the rest"
        parts = ("interrupted", found(), kept)
        print(printable(f"merged-lora: {'; '.join(part for part in parts if part)}"), file=sys.stderr)
        raise


@contextmanager
def terminated_cleanly() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, which removes scratch folders and stops servers."""

    def leave(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def output(found: Report, arguments: argparse.Namespace) -> None:
    """Print what was found, as ``--json`` or as tables, and draw the ``--plot``."""
    if arguments.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        show(found)
    if arguments.plot is not None:
        from merged_lora.judging.figures import save

        save(found.plot(), arguments.plot)


def show(found: Report) -> None:
    """Print tables and sections, as wide as the terminal, or as plain text into a pipe."""
    if not sys.stdout.isatty():
        print(found)
        return
    from rich.console import Console

    console = Console(highlight=False)
    for table in found.tables():
        console.print(table.rich())
    for section in found.sections():
        if section.lines:
            console.print(section.heading, style="italic")
        for line in section.lines:
            console.print(line, markup=False, soft_wrap=not section.prose)
