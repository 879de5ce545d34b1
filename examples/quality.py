"""Exact match per task of the base model, the example adapters and every strategy: the table and the plot.

    python examples/quality.py [--json FILE] [--only STRATEGY ...]
    python examples/quality.py --plot FILE.svg --json FILE

For every strategy the merge of all three adapters is measured three times: as a user who only names the
adapters gets it, with weights="auto", and with the best of a small grid of weights and options. The
grid is decided on DEV examples per task that neither training nor the test has seen; what is reported is
measured on TEST others. Strategies of exactly two sources merge sql and tone.

Answers are judged as judge.py says. Merges have the rank of the adapters, so that none gains from a larger
rank, except `cat`, which cannot be cut: it shows what three times the rank would give.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from encoding import Encoded
from judge import Judge
from merged_lora.adapters import Adapter
from merged_lora.engine import merge
from merged_lora.recipe import MEANS, Strategy
from merged_lora.spec import canonical
from merged_lora.strategies import TABLE
from smollm2 import MODEL_DIR, load_model
from tasks import TASKS, examples
from train import ADAPTERS_DIR, BATCH_SIZE, TRAININGS

DEV, TEST = 12, 32
COLORS = {"default": "#999999", "best": "#1f77b4", "auto": "#d95f02"}
LABELS = {"default": "names alone", "best": "best of a small grid", "auto": 'weights="auto"'}


class Scorer:
    """The examples of every task, judged for one adapter after the other."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._sets: dict[str, dict[str, list[Encoded]]] = {"dev": {}, "test": {}}
        for name, task in TASKS.items():
            first = TRAININGS[name].steps * BATCH_SIZE
            unseen = examples(task, "train", first + DEV)[first:]
            self._sets["dev"][name] = judge.encode(task, unseen)
            self._sets["test"][name] = judge.encode(task, examples(task, "test", TEST))

    def scores(self, adapter: Adapter | None, split: str) -> dict[str, float]:
        """The share of right answers per task, 0 to 1."""
        self._judge.take_on(adapter)
        return {task: self._judge.judge(encoded).right for task, encoded in self._sets[split].items()}


def grid(strategy: Strategy) -> list[str]:
    """Options to try, as a spec writes them, and weights as its first word."""
    recipe = strategy.recipe
    if recipe.blend in MEANS:
        weights = ["1 scale=0.7", "1 scale=0.85"]
    elif recipe.blend == "sum":
        weights = ["0.33", "0.45", "1 weights=auto"]
    else:
        weights = ["1", "1 weights=auto"]
    choices = ["t=0.4", "t=0.6"] if strategy.option("t") else [""]
    if strategy.option("density"):
        choices = ["density=0.3", "density=0.7"]
    if strategy.option("select_topk"):
        choices = ["select_topk=0.3", "select_topk=1"]
    return [f"{w} {choice}".strip() for w in weights for choice in choices]


def spec_of(strategy: Strategy, settings: str) -> str:
    """The merge that an entry of the grid means."""
    weight, *options = settings.split()
    names = ("sql", "tone") if strategy.sources_max == 2 else tuple(TASKS)
    terms = [name if weight == "1" else f"{weight}*{name}" for name in names]
    return f"{strategy.name}({', '.join(terms + options)})"


def measure(scorer: Scorer, sources: Mapping[str, Adapter], strategy: Strategy) -> list[dict[str, object]]:
    """Rows of the table: default, automatic and best of the grid, each with its scores on the test set."""
    known: dict[str, Adapter] = {}

    def made(spec: str) -> Adapter:
        canonical_spec = canonical(spec)
        if canonical_spec not in known:
            limit = None if strategy.recipe.rank == "exact" else max(a.rank for a in sources.values())
            known[canonical_spec] = merge(spec, sources, rank=limit)
        return known[canonical_spec]

    tried = {spec_of(strategy, settings): 0.0 for settings in grid(strategy)}
    for spec in tried:
        tried[spec] = mean(scorer.scores(made(spec), "dev"))
    rows: list[dict[str, object]] = []
    tested: dict[str, dict[str, float]] = {}
    for kind, spec in (
        ("default", spec_of(strategy, "1")),
        ("auto", spec_of(strategy, "1 weights=auto")),
        ("best", max(tried, key=tried.__getitem__)),
    ):
        # The same merge, whatever it is called: weights="auto" changes nothing for some.
        merged = made(spec)
        if merged.digest not in tested:
            tested[merged.digest] = scorer.scores(merged, "test")
        kept = merged.metadata.get("merged_lora.kept_energy")
        rows.append(
            {
                "strategy": strategy.name,
                "kind": kind,
                "spec": canonical(spec),
                "rank": merged.rank,
                "kept_energy": float(kept) if kept else 1.0,
                "scores": tested[merged.digest],
            }
        )
    return rows


def mean(scores: Mapping[str, float]) -> float:
    """The mean score over all tasks."""
    return sum(scores.values()) / len(scores)


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows as two tables, of adapters alone and of strategies, scores in per cent."""
    tasks = ", ".join(TASKS)
    alone = [f"| alone | {tasks} | mean |", "|---|---:|---:|"]
    merges: dict[str, list[str]] = {}
    for row in rows:
        scores, name = row["scores"], str(row["strategy"])
        assert isinstance(scores, dict)
        cells = [", ".join(f"{100 * score:.0f}" for score in scores.values()), f"{100 * mean(scores):.0f}"]
        if row["kind"] == "alone":
            alone.append(f"| {' | '.join([name, *cells])} |")
            continue
        if row["kind"] == "best":
            spec = str(row["spec"])
            cells.insert(0, f"`{spec[len(name) + 1 : -1]}`")
        merges.setdefault(name, [f"`{name}`"]).extend(cells)
    strategies = [
        '| strategy | names alone | mean | `weights="auto"` | mean | best of the grid | | mean |',
        "|---|---:|---:|---:|---:|---|---:|---:|",
        *(f"| {' | '.join(cells)} |" for cells in merges.values()),
    ]
    return "\n".join([*alone, "", *strategies, ""])


def plot(rows: Sequence[Mapping[str, object]]) -> str:
    """An SVG: every strategy's mean score by default, with weights="auto" and at best, and its worst."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    alone = []
    for row in rows:
        scores = row["scores"]
        assert isinstance(scores, dict)
        if row["kind"] == "alone":
            alone.append(max(scores.values()))
        else:
            found.setdefault(str(row["strategy"]), {})[str(row["kind"])] = scores
    order = sorted(found, key=lambda name: -max(mean(found[name][kind]) for kind in COLORS))
    left, width, line = 190, 520, 18
    height = line * (len(order) + 3) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 30}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{left + width + 30}" height="{height}" fill="white"/>',
    ]
    for x, (kind, color) in zip((left, left + 110, left + 300), COLORS.items(), strict=True):
        parts.append(f'<circle cx="{x}" cy="14" r="5" fill="{color}"/>')
        parts.append(f'<text x="{x + 9}" y="18">{LABELS[kind]}</text>')
    for score in range(0, 101, 20):
        at = left + width * score / 100
        parts.append(f'<line x1="{at}" y1="{2 * line}" x2="{at}" y2="{height - 10}" stroke="#ddd"/>')
        parts.append(f'<text x="{at}" y="{2 * line - 4}" text-anchor="middle">{score} %</text>')
    specialists = left + width * sum(alone[1:]) / max(1, len(alone) - 1)
    parts.append(
        f'<line x1="{specialists}" y1="{2 * line}" x2="{specialists}" y2="{height - 10}" '
        'stroke="#555" stroke-dasharray="4 3"><title>the adapters alone, each on its own task</title></line>'
    )
    for i, name in enumerate(order):
        y = line * (i + 3)
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{name}</text>')
        for kind, color in COLORS.items():
            scores = found[name][kind]
            middle, worst = (left + width * value for value in (mean(scores), min(scores.values())))
            parts.append(
                f'<line x1="{worst}" y1="{y}" x2="{middle}" y2="{y}" stroke="{color}" stroke-opacity="0.35"/>'
            )
            parts.append(f'<line x1="{worst}" y1="{y - 5}" x2="{worst}" y2="{y + 5}" stroke="{color}"/>')
            parts.append(f'<circle cx="{middle}" cy="{y}" r="5" fill="{color}" fill-opacity="0.8"/>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure every strategy on the example adapters.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows here, and go on from them")
    parser.add_argument("--only", nargs="+", choices=list(TABLE), metavar="STRATEGY", default=list(TABLE))
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rows that FILE has, measure none")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    if arguments.json and arguments.json.exists():
        rows = json.loads(arguments.json.read_text())["rows"]
    if arguments.plot:
        arguments.plot.write_text(plot(rows))
        print(markdown(rows))
        return
    scorer = Scorer(Judge(*load_model(arguments.model)))
    sources = {task: Adapter.load(ADAPTERS_DIR / task) for task in TASKS}
    done = {str(row["strategy"]) for row in rows}
    for name in ("base", *TASKS):
        if name not in done:
            scores = scorer.scores(sources.get(name), "test")
            rows.append({"strategy": name, "kind": "alone", "spec": name, "rank": 8, "scores": scores})
    for name in arguments.only:
        if name not in done:
            start = time.perf_counter()
            rows += measure(scorer, sources, TABLE[name])
            best = rows[-1]
            print(f"{name}: {best['spec']} {best['scores']}, {time.perf_counter() - start:.0f} s", flush=True)
            if arguments.json:
                report = {"date": date.today().isoformat(), "dev": DEV, "test": TEST, "rows": rows}
                arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
