"""``merged-lora tune``: the merge that keeps most of every source, searched for on a server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merged_lora.names import printable

from .arguments import ExamplesFormatter, add_served, named_file, named_value, once, served
from .running import LOGGER, UsageError, interrupts_explained, output, terminated_cleanly

if TYPE_CHECKING:
    from merged_lora.judging.tuned import Trial

EXAMPLES = """\
examples:
  merged-lora tune --base-url http://localhost:8000/v1 --data sql=sql.jsonl --data chat=chat.jsonl
  merged-lora tune --base-url http://localhost:8000/v1 --data sql=sql.jsonl --data chat=chat.jsonl \\
      --strategy regmean ties --objective mean --trials 30 --minutes 5 --study study.jsonl --plot front.png
"""


def add(added: Any) -> None:
    """Add the command ``tune``."""
    tune = added.add_parser(
        "tune",
        help="search for the merge that keeps most of every source",
        description="Try merges on a server that serves the sources with --enable-merged-lora, on examples "
        "with answers. Half of them choose, the other half shows how the chosen merge compares with the best "
        "one that needs no search. The result is a spec, ready to be served.",
        epilog=EXAMPLES,
        formatter_class=ExamplesFormatter,
        allow_abbrev=False,
    )
    add_served(tune)
    tune.add_argument(
        "--report",
        metavar="TASK=FILE",
        type=named_file,
        action="append",
        default=[],
        help="examples of a task for the report alone; by default half of --data, drawn at random",
    )
    _add_choices(tune)
    tune.add_argument("--trials", metavar="N", type=int, default=60, help="merges to try (60)")
    tune.add_argument(
        "--minutes", metavar="M", type=float, help="begin no trial after so many minutes; the report follows"
    )
    tune.add_argument(
        "--study",
        metavar="FILE",
        type=Path,
        help="keep every trial in FILE; the same command goes on from there",
    )
    tune.add_argument("--json", action="store_true", help="print one JSON object, with every trial")
    tune.add_argument(
        "--plot", metavar="FILE", type=Path, help="write all trials by task as .png, .svg or .pdf"
    )


def _add_choices(tune: argparse.ArgumentParser) -> None:
    """Add what says what is tried, and what is made large."""
    from merged_lora.judging.proposals import STRATEGIES

    tune.add_argument(
        "--strategy",
        metavar="NAME",
        nargs="+",
        default=list(STRATEGIES),
        help=f"strategies to try ({' '.join(STRATEGIES)})",
    )
    tune.add_argument(
        "--rank", metavar="K", type=int, nargs="+", default=[], help="ranks to try beside a strategy's own"
    )
    tune.add_argument(
        "--objective",
        metavar="WHAT",
        nargs="+",
        default=["worst"],
        help="make the worst gain large, the mean, or a mean with weights: sql=2 chat=1 (worst)",
    )
    tune.add_argument(
        "--score",
        default="likelihood",
        help="choose by the likelihood of right answers, or by exact, contains or rouge-l (likelihood)",
    )
    tune.add_argument("--metric", default="exact", help="of the report: exact, contains or rouge-l (exact)")


def run(arguments: argparse.Namespace) -> int:
    """Print what a search finds."""
    asked, report = served(arguments), once(arguments.report)
    objective = _objective(arguments.objective)

    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from merged_lora.judging.figures import check_path
    from merged_lora.judging.tuning import tune

    if arguments.plot is not None:
        check_path(arguments.plot)
    bar = tqdm(total=arguments.trials, unit="trial", disable=None)  # None: only if stderr is a terminal
    best: list[Trial] = []

    def progress(trial: Trial, leader: Trial | None) -> None:
        bar.update()
        if leader is not None and leader.number == trial.number:
            best.append(trial)
            bar.write(printable(f"trial {trial.number}: {trial.value:.1%}  {trial.spec}"), file=sys.stderr)

    def so_far() -> str:
        return f"best so far: {best[-1].spec} ({best[-1].value:.1%})" if best else "no merge was rated yet"

    explained = interrupts_explained("--study", arguments.study, so_far)
    with explained, terminated_cleanly(), bar, logging_redirect_tqdm([LOGGER]):
        found = tune(
            **asked,
            report=report or None,
            strategies=arguments.strategy,
            ranks=arguments.rank,
            objective=objective,
            score=arguments.score,
            trials=arguments.trials,
            minutes=arguments.minutes,
            metric=arguments.metric,
            study=arguments.study,
            progress=progress,
        )
    output(found, arguments)
    return 0


def _objective(words: list[str]) -> str | dict[str, float]:
    """The objective as the arguments give it: a word, or weights of tasks."""
    if len(words) == 1 and "=" not in words[0]:
        return words[0]
    try:
        return {task: float(weight) for task, weight in once(map(named_value, words)).items()}
    except (ValueError, argparse.ArgumentTypeError):
        raise UsageError("--objective takes worst, mean, or weights of tasks: sql=2 chat=1") from None
