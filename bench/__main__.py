"""The command line: ``python -m merged_lora.bench`` and the name of a benchmark."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merged_lora.commands.running import terminated_cleanly
from merged_lora.errors import MergeError

from .first_day import MINUTES


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return int(text)

    return parse


def _minutes(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError("must be above 0")
    return float(text)


def _spaces(text: str) -> tuple[str, ...]:
    """The spaces to measure: ``factors`` alone, or one or both of the others."""
    chosen = tuple(text.split(","))
    if chosen != ("factors",) and not set(chosen) <= {"entries", "core"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not factors, entries, core or entries,core")
    return chosen


FLAGS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu: merges on CPU cores beside PEFT's": {
        "--quick": {"action": "store_true", "help": "leave out the SVDs, which take PEFT minutes"},
        "--space": {
            "type": _spaces,
            "default": ("factors",),
            "metavar": "SPACE[,SPACE]",
            "help": "factors (default), or one or both of entries and core: one layer, four sources",
        },
    },
    "gpu: merges on a GPU beside copies of the same bytes and PEFT's": {
        "--quick": {"action": "store_true", "help": "only what has a goal, without PEFT's large SVDs"},
        "--layers": {
            "type": _at_least(1),
            "default": 32,
            "metavar": "N",
            "help": "of Llama-3-8B; %(default)s",
        },
        "--agreement-only": {"action": "store_true", "help": "time nothing; Triton's interpreter will do"},
        "--first-day": {"action": "store_true", "help": "what some minutes allow, the most valuable first"},
        "--minutes": {
            "type": _minutes,
            "default": MINUTES,
            "metavar": "M",
            "help": "of the first day; %(default)s",
        },
    },
    "registers: what the GPU kernels compile to; needs no GPU": {
        "--target": {"action": "append", "help": "sm_80, sm_90 or gfx942; all by default"},
        "--bounded": {"action": "store_true", "help": "only merges of four bf16 sources and their trim"},
    },
    "host: what the host does for a write into slots; needs no GPU": {
        "--layers": {
            "type": _at_least(1),
            "default": 32,
            "metavar": "N",
            "help": "of Llama-3-8B; %(default)s",
        },
        "--rounds": {
            "type": _at_least(1),
            "default": 30,
            "metavar": "N",
            "help": "of each write; %(default)s",
        },
    },
    "serve: requests to real servers, for merges beside plain adapters": {
        "--requests": {
            "type": _at_least(2),
            "default": 20,
            "metavar": "N",
            "help": "of each kind; %(default)s, and fewer of what is slow",
        },
        "--quick": {"action": "store_true", "help": "at most three of each kind, and slow merges once"},
        "--only": {
            "metavar": "PART[,PART]",
            "help": "of speed, first, gaps and clients; all by default",
        },
    },
    "playground: new positions on the page of a running server, beside a plain adapter": {
        "--url": {"required": True, "help": "of the page, as make playground prints it"},
        "--spec": {
            "nargs": "+",
            "default": ["ties(json, sql, tone)", "regmean(json, sql, tone)"],
            "help": "merges whose first weight moves; %(default)s",
        },
        "--rounds": {"type": _at_least(2), "default": 15, "metavar": "N", "help": "positions; %(default)s"},
        "--browser": {"default": "chromium", "metavar": "PROGRAM", "help": "a Chromium; %(default)s"},
    },
}
"""The flags of every benchmark, beside ``--json``."""


def main(arguments: list[str]) -> int:
    """Run a benchmark, ``cpu`` without arguments, and return the exit code.

    The code is 1 if a result is wrong, and 2 if something that is needed is missing.
    """
    parser = argparse.ArgumentParser(prog="python -m merged_lora.bench", description="Benchmarks.")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    for about, flags in FLAGS.items():
        name, _, text = about.partition(": ")
        benchmark = benchmarks.add_parser(name, help=text)
        for flag, given in flags.items():
            benchmark.add_argument(flag, **given)
        benchmark.add_argument(
            "--json", type=Path, metavar="FILE", help="gets every result; a folder with --first-day"
        )
    options = parser.parse_args(arguments or ["cpu"])
    first_day = getattr(options, "first_day", False)
    if options.json is None and first_day:
        parser.error("--first-day needs --json FOLDER, which gets all results")
    if options.json is not None:
        if not options.json.absolute().parent.is_dir():
            parser.error(f"{options.json.parent} is no folder")
        if options.json.exists() and options.json.is_dir() != first_day:
            parser.error(f"{options.json} is {'no' if first_day else 'a'} folder")
    try:
        with terminated_cleanly():
            return _run(options)
    except ImportError as error:
        parser.error(f"{error.name} is not installed; `make install` brings it")
    except MergeError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def _run(options: argparse.Namespace) -> int:
    """Import what a benchmark needs, and run it."""
    if options.benchmark == "cpu":
        from . import cpu

        return cpu.run(options.quick, options.space, options.json)
    if options.benchmark == "serve":
        from . import serve

        return serve.run(serve.work(options.requests, options.quick, options.only), options.json)
    if options.benchmark == "playground":
        from . import playground

        return playground.run(options.url, options.spec, options.rounds, options.browser, options.json)
    if options.benchmark == "registers":
        from . import registers

        return registers.run(options.target, options.json, options.bounded)
    if options.benchmark == "host":
        from . import host

        return host.run(options.layers, options.rounds, options.json)
    if options.first_day:
        from . import first_day

        return first_day.run(options.json, options.minutes, options.layers)
    from . import gpu

    return gpu.run(gpu.work(options.quick, options.layers), options.json, options.agreement_only)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
