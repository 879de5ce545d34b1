"""``merged-lora inspect``: what is to be known of adapters before they are merged."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import ExamplesFormatter, add_reading, named_location, once
from .running import LOGGER, UsageError, output, terminated_cleanly

NOT_TOGETHER = 3
"""Exit code of an inspection of adapters that cannot be merged."""

EXAMPLES = """\
examples:
  merged-lora inspect sql=adapters/sql chat=adapters/chat
  merged-lora inspect sql=adapters/sql chat=adapters/chat --model models/base
  merged-lora inspect sql=adapters/sql chat=adapters/chat --json --plot alike.png
"""


def add(added: Any) -> None:
    """Add the command ``inspect``."""
    inspect = added.add_parser(
        "inspect",
        help="see whether adapters may be merged, how, and what will hurt",
        description="Compare adapters without running a model: what each is, how alike their deltas are, "
        "which merges fit, and what to do. The exit code is 3 if one cannot be merged with the others, or "
        "does not fit the model.",
        epilog=EXAMPLES,
        formatter_class=ExamplesFormatter,
        allow_abbrev=False,
    )
    inspect.add_argument(
        "adapters",
        metavar="NAME=LOCATION",
        type=named_location,
        nargs="+",
        help="where a source is: a PEFT folder, hf:org/repo[@revision][/folder], s3://bucket/folder, "
        "gs://bucket/folder or https://host/folder",
    )
    inspect.add_argument(
        "--model",
        help="folder of the base model, or its name on the hub: say whether the adapters fit; its "
        "configuration alone is read",
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
    add_reading(inspect, sources=False)


def run(arguments: argparse.Namespace) -> int:
    """Print what is to be known of adapters before they are merged."""
    paths = once(arguments.adapters)

    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from merged_lora.judging.figures import check_path
    from merged_lora.judging.inspecting import inspect

    if arguments.plot is not None:
        if len(paths) < 2:
            raise UsageError("--plot compares sources, and there is one; name another, or leave out --plot")
        check_path(arguments.plot)
    bar = tqdm(unit="module", leave=False, disable=None)  # None: only if stderr is a terminal
    with terminated_cleanly(), bar, logging_redirect_tqdm([LOGGER]):
        found = inspect(
            paths,
            density=arguments.density,
            model=arguments.model,
            drop=arguments.drop,
            allow_pickle=arguments.allow_pickle,
            progress=bar.update,
        )
    if arguments.plot is not None and found.comparison is None:
        LOGGER.warning("%s is not written, because the sources do not go together", arguments.plot)
        arguments.plot = None
    output(found, arguments)
    return NOT_TOGETHER if found.fails else 0
