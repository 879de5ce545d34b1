"""``merged-lora calibrate``: what an adapter's modules take as inputs."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from merged_lora.names import printable

from .arguments import ExamplesFormatter, add_model, add_reading, named_location
from .running import shares, terminated_cleanly

EXAMPLES = """\
examples:
  merged-lora calibrate --model models/base --adapter sql=adapters/sql --prompts sql.jsonl --count 8
"""


def add(added: Any) -> None:
    """Add the command ``calibrate``."""
    calibrate = added.add_parser(
        "calibrate",
        help="measure an adapter's inputs, for merges by regmean and for checks",
        description="Run a model with an adapter on a few prompts and on the adapter's own answers. What "
        "its modules take as inputs is written beside the adapter, with the prompts and answers for replays. "
        "A calibration that is there already is replaced.",
        epilog=EXAMPLES,
        formatter_class=ExamplesFormatter,
        allow_abbrev=False,
    )
    add_model(calibrate)
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
    add_reading(calibrate, sources=False)


def _named_folder(text: str) -> tuple[str, Path]:
    name, place = named_location(text)
    if isinstance(place, str):
        raise argparse.ArgumentTypeError(
            f"a calibration is written into the adapter's folder, and {place} is none here; give a copy of it"
        )
    return name, place


def run(arguments: argparse.Namespace) -> int:
    """Calibrate an adapter and write the file beside it."""
    from merged_lora.calibrating import calibrate
    from merged_lora.calibration import CALIBRATION_NAME
    from merged_lora.files.opening import find

    started = time.perf_counter()
    _, folder = arguments.adapter
    with terminated_cleanly(), shares() as progress:
        made = calibrate(
            arguments.model,
            folder,
            arguments.prompts,
            count=arguments.count,
            answers=arguments.answers,
            components=arguments.components,
            replay=arguments.replay,
            drop=arguments.drop,
            allow_pickle=arguments.allow_pickle,
            progress=progress,
        )
    file = find(folder)[0] / CALIBRATION_NAME
    asked, answered = made.tokens
    kept_back = (
        [f"{sum(not e.fitted for e in made.exchanges)} more kept back for replays"] if made.exchanges else []
    )
    parts = [
        f"{made.prompts} prompts with {asked} tokens and {answered} tokens of answers",
        *kept_back,
        f"{arguments.components} components",
        f"{file.stat().st_size / 1e6:.1f} MB",
        f"{time.perf_counter() - started:.1f} s",
    ]
    print(printable(f"{file}: {', '.join(parts)}"))
    return 0
