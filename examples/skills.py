"""Which skills survive a merge: every set of adapters of `sets.py` under every strategy that is named.

    python examples/skills.py [TEMPLATE ...] [--sets LIST ...] [--sizes N ...] [--rank N] [--json FILE]
    python examples/skills.py --json FILE --summary

A template is a strategy, a weight if not 1, and options: "knots weights=auto", "ties density=0.2",
"linear 1/N" for weights of one over the number of sources. Every set is merged with it, and each source's
task is judged as judge.py says. A score is the share of right answers, and retention is the score of the
merge divided by that of the source alone. The report also has the likelihood of the right answers, and of
a plain text that has nothing to do with any task. Sources alone and the base model are measured first.
Where all sources are calibrated, their own answers are replayed. Rows that FILE has are not measured again.
--summary measures nothing. It shows how each strategy did on all sets of one size, and how often the replays
found which skills are lost.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from judge import Judge
from merged_lora.adapters import Adapter
from merged_lora.calibration import Calibration
from merged_lora.engine import merge
from merged_lora.errors import MergeError
from merged_lora.language_model import LanguageModel
from merged_lora.replay import LOST, exchanges_of
from merged_lora.spec import canonical, parse
from merged_lora.strategies import find
from more_tasks import ALL_TASKS
from sets import CHOOSE, REPORT
from smollm2 import MODEL_DIR, load_model
from tasks import TEST_SIZE, examples
from train import adapter_folder

SETS = {"choose": CHOOSE, "report": REPORT}
PLAIN_TEXT = Path(__file__).resolve().parent / "plain_text.txt"

Row = dict[str, Any]


def spec_of(template: str, names: Sequence[str]) -> str:
    """The merge of `names` that a template means."""
    strategy, *words = template.split()
    options = [word for word in words if "=" in word]
    weights = [word for word in words if "=" not in word] or ["1"]
    (weight,) = (f"{1 / len(names):.6f}" if word == "1/N" else word for word in weights)
    return f"{strategy}({', '.join([*(f'{weight}*{name}' for name in names), *options])})"


class Skills:
    """The base model and the adapters, with the test examples of every task."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
        judge = Judge(model, tokenizer)
        self._judge, self._count = judge, count
        self._language = LanguageModel(model, tokenizer)
        self._text = PLAIN_TEXT.read_text(encoding="utf-8")
        self._tests = {
            name: judge.encode(task, examples(task, "test", count)) for name, task in ALL_TASKS.items()
        }
        self._sources: dict[str, Adapter] = {}

    def source(self, name: str) -> Adapter:
        """The adapter of a task, read once."""
        if name not in self._sources:
            self._sources[name] = Adapter.load(adapter_folder(name))
        return self._sources[name]

    def judged(self, adapter: Adapter | None, tasks: Sequence[str]) -> Row:
        """Scores and negative log-likelihoods by task, in nats per token, and that of the plain text."""
        self._judge.take_on(adapter)
        verdicts = {task: self._judge.judge(self._tests[task]) for task in tasks}
        return {
            "scores": {task: verdict.right for task, verdict in verdicts.items()},
            "nll": {task: round(verdict.nll, 5) for task, verdict in verdicts.items()},
            "text_nll": round(self._judge.text_nll(self._text), 5),
        }

    def merged(self, names: Sequence[str], template: str, rank: int | None) -> Row:
        """The row of a merge, or of the error that says why there is none."""
        sources = {name: self.source(name) for name in names}
        spec = canonical(spec_of(template, names))
        start = time.perf_counter()
        try:
            made = merge(spec, sources, rank=rank or max(source.rank for source in sources.values()))
        except MergeError as error:
            return {"spec": spec, "error": str(error)}
        seconds = round(time.perf_counter() - start, 2)
        row = {"spec": spec, "rank": made.rank, "merge_seconds": seconds, **self.judged(made, names)}
        if all(isinstance(source.calibration, Calibration) for source in sources.values()):
            row["replay"] = self.replayed(sources, parse(spec).strategy)
        return row

    def replayed(self, sources: Mapping[str, Adapter], strategy: str) -> dict[str, tuple[int, int]]:
        """How many of its answers each source keeps in the merge that was judged last, and of how many."""
        found = {}
        for name, source in sources.items():
            own = exchanges_of(name, source, strategy)
            kept = sum(self._language.replay(each.prompt, each.answer).kept for each in own)
            found[name] = kept, len(own)
        return found


def with_retention(row: Row, alone: Mapping[str, float]) -> Row:
    """A row with the retention of every source, its mean and the worst, given the scores of sources alone."""
    retention = {task: score / alone[task] for task, score in row["scores"].items()}
    mean = sum(retention.values()) / len(retention)
    return row | {"retention": retention, "mean": mean, "worst": min(retention.values())}


class Report:
    """The rows measured so far, kept in a file if there is one."""

    def __init__(self, file: Path | None, count: int) -> None:
        self._file, self._count = file, count
        self.rows: list[Row] = []
        if file and file.exists():
            report = json.loads(file.read_text(encoding="utf-8"))
            if report["count"] != count:
                raise SystemExit(f"error: {file} has rows of --count {report['count']}, not {count}")
            self.rows = report["rows"]

    def find(self, **key: object) -> Row | None:
        """The row with these entries, if it has been measured."""
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def add(self, row: Row) -> Row:
        """Keeps a row, in the file too, which is replaced at once and whole."""
        self.rows.append(row)
        if self._file:
            report = {"date": date.today().isoformat(), "count": self._count, "rows": self.rows}
            draft = self._file.with_suffix(".draft")
            draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            draft.replace(self._file)
        return row


def line(row: Row, base_text_nll: float) -> str:
    """A row of the table: shares in per cent, and the change of the plain text's likelihood in nats."""
    first = f"| {row['template']} | {', '.join(row['set'])} |"
    if "error" in row:
        return f"{first} | | {row['error']} | |"
    kept = ", ".join(f"{100 * share:.0f}" for share in row["retention"].values())
    text = row["text_nll"] - base_text_nll
    return f"{first} {100 * row['mean']:.0f} | {100 * row['worst']:.0f} | {kept} | {text:+.2f} |"


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """A table for each list of sets and each size: mean, worst, and how many sources keep less than half."""
    merges = [row for row in rows if "retention" in row]
    yield "| sets | strategy | mean | worst | sources under 50 % |"
    yield "|---|---|--:|--:|--:|"
    groups = {(row["kind"], len(row["set"]), row["template"], row["limit"]) for row in merges}
    for kind, size, template, limit in sorted(groups, key=str):
        key = {"kind": kind, "template": template, "limit": limit}
        found = [row for row in merges if key.items() <= row.items() and len(row["set"]) == size]
        shares = [share for row in found for share in row["retention"].values()]
        mean = sum(row["mean"] for row in found) / len(found)
        lost = sum(share < LOST for share in shares)
        rank = f", rank {limit}" if limit else ""
        yield (
            f"| {kind}: {len(found)} of {size} | {template}{rank} "
            f"| {100 * mean:.0f} | {100 * min(shares):.0f} | {lost} of {len(shares)} |"
        )


def alarms(rows: Sequence[Row]) -> Iterator[str]:
    """A table: how sources of all merges fared in the test, by what the replay of their answers kept."""
    found: dict[str, list[float]] = {"none": [], "under half": [], "half to 3/4": [], "3/4 or more": []}
    for row in rows:
        replay = row.get("replay", {}) if row.get("limit") is None else {}  # other ranks are not other merges
        for name, (kept, total) in replay.items():
            share = kept / total
            bounds = (share == 0, share < LOST, share < 0.75, True)
            found[[*found][bounds.index(True)]].append(row["retention"][name])
    yield "| replay keeps | sources | under 50 % in the test | 50 to 90 % | over 90 % |"
    yield "|---|--:|--:|--:|--:|"
    for kept, shares in found.items():
        low, high = sum(x < LOST for x in shares), sum(x > 0.9 for x in shares)
        yield f"| {kept} | {len(shares)} | {low} | {len(shares) - low - high} | {high} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure which skills survive merges of sets of adapters.")
    parser.add_argument("template", nargs="*", metavar="TEMPLATE", help='such as "knots weights=auto"')
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="default: %(default)s")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS), help="default: both")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="N", help="only sets of N adapters")
    parser.add_argument("--rank", type=int, help="largest rank of a merge; default: that of its sources")
    parser.add_argument("--count", type=int, default=60, help="test examples per task; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows here, and go on from them")
    parser.add_argument("--summary", action="store_true", help="print tables of all rows in FILE")
    arguments = parser.parse_args()
    if not 0 < arguments.count <= TEST_SIZE:
        parser.error(f"--count must be 1 to {TEST_SIZE}, got {arguments.count}")
    try:
        fitting = {
            template: find(template.split()[0]).recipe.space == "outputs" for template in arguments.template
        }
    except MergeError as error:
        parser.error(str(error))
    report = Report(arguments.json, arguments.count)
    if arguments.summary:
        if not report.rows:
            parser.error("--summary needs --json FILE, and a row in it")
        print("\n".join([*summary(report.rows), "", *alarms(report.rows)]))
        return
    skills = Skills(*load_model(arguments.model), arguments.count)
    base = report.find(kind="base") or report.add({"kind": "base", **skills.judged(None, list(ALL_TASKS))})
    alone: dict[str, float] = {}
    for name in ALL_TASKS:
        key: Row = {"kind": "alone", "adapter": name, "digest": skills.source(name).digest}
        row = report.find(**key)
        if row is None:
            row = report.add(key | skills.judged(skills.source(name), [name]))
        alone[name] = row["scores"][name]
        print(f"{name}: {100 * alone[name]:.0f} % alone, {100 * base['scores'][name]:.0f} % base", flush=True)

    print("\n| strategy | set | mean | worst | kept, % of alone | plain text, nats |")
    print("|---|---|--:|--:|---|--:|")
    wanted = [(kind, names) for kind in arguments.sets for names in SETS[kind]]
    for template, (kind, names) in product(arguments.template, wanted):
        if arguments.sizes and len(names) not in arguments.sizes:
            continue
        sources = [skills.source(name) for name in names]
        digests = [source.identity if fitting[template] else source.digest for source in sources]
        key = {"kind": kind, "template": template, "limit": arguments.rank}
        key |= {"set": list(names), "digests": digests}
        row = report.find(**key)
        if row is None:
            row = key | skills.merged(names, template, arguments.rank)
            row = report.add(row if "error" in row else with_retention(row, alone))
        print(line(row, base["text_nll"]), flush=True)


if __name__ == "__main__":
    main()
