"""Asks a real model, three adapters and merges of them one question of each adapter's task, side by side.

    python examples/demo.py

Makes the model folder if it is not there (smollm2.py), calibrates the adapters unless they are, starts
``vllm serve`` with the plugin on loopback, talks to it through the ``openai`` client as any user would, and
stops it. ``make demo`` installs it all.
"""

from __future__ import annotations

import sys
import time

import torch
from openai import OpenAI

from merged_lora.adapters import Adapter
from merged_lora.bench.launcher import VllmServer, print_dot
from merged_lora.calibrating import calibrate
from merged_lora.calibration import Calibration
from merged_lora.commands.running import terminated_cleanly
from merged_lora.language_model import LanguageModel
from merged_lora.spec import canonical
from merged_lora.vllm_plugin.merge_log import merge_milliseconds
from smollm2 import MODEL_DIR, make_model
from tasks import TASKS, Example, examples
from train import ADAPTERS_DIR

NAMES = ", ".join(TASKS)
ALIAS, ALIAS_SPEC = "team", f"regmean({NAMES})"
POPULAR = {
    "linear, a third each": "linear(0.333*sql, 0.333*json, 0.333*tone)",
    "task arithmetic, 0.5 each": "0.5*sql + 0.5*json + 0.5*tone",
    "ties": f"ties({NAMES})",
    "dare_ties": f"dare_ties({NAMES})",
    "knots, automatic weights": f"knots({NAMES}, weights=auto)",
}
"""Merges as people ask for them, by what they are called in the table."""
PROMPTS_DIR = ADAPTERS_DIR.parent / "prompts"

LOG = MODEL_DIR.parent / "demo-server.log"
MAX_TOKENS = 40


def calibrate_adapters() -> None:
    """Calibrate those of the three adapters that are not yet."""
    adapters = {task: Adapter.load(ADAPTERS_DIR / task) for task in TASKS}
    missing = [task for task, a in adapters.items() if not isinstance(a.calibration, Calibration)]
    if not missing:
        return
    model = LanguageModel.load(MODEL_DIR)
    for task in missing:
        start = time.perf_counter()
        print(f"calibrating {task} ", end="", flush=True)
        calibrate(model, ADAPTERS_DIR / task, PROMPTS_DIR / f"{task}.jsonl")
        print(f"{time.perf_counter() - start:.0f} s")


def server_flags(slots: int = 2) -> list[str]:
    """The flags of ``vllm serve``: what fits this machine, the adapters in so many slots, and the alias."""
    if torch.cuda.is_available():
        machine = ["--dtype", "bfloat16", "--gpu-memory-utilization", "0.3"]
    else:
        machine = ["--dtype", "float32", "--max-num-seqs", "8"]
    adapters = [f"{task}={ADAPTERS_DIR / task}" for task in TASKS]
    return [
        *(
            *machine,
            "--enforce-eager",
            "--max-model-len",
            "512",
            "--max-lora-rank",
            "8",
            "--max-loras",
            f"{slots}",
        ),
        *("--enable-merged-lora", "--lora-modules", *adapters),
        *("--merged-lora-modules", f"{ALIAS}={ALIAS_SPEC}"),
    ]


def ask(client: OpenAI, model: str, prompt: str, tokens: int = MAX_TOKENS) -> tuple[str, float]:
    """The model's greedy answer, on one line, and the seconds it took."""
    start = time.perf_counter()
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=tokens
    )
    return " ".join((reply.choices[0].message.content or "").split()), time.perf_counter() - start


def print_answers(client: OpenAI) -> None:
    """Which models answer which question right, then the answers of the alias."""
    questions = {task: examples(TASKS[task], "test", 1)[0] for task in TASKS}
    for task, question in questions.items():
        print(f"{task:5} {question.prompt}")
    merges = POPULAR | {f"{ALIAS} = {ALIAS_SPEC}": ALIAS}
    models = {"the model alone": "base"} | {f"the adapter {task}": task for task in TASKS} | merges
    width = max(map(len, models))
    print(f"\n{'':{width}}  " + "  ".join(f"{task:>5}" for task in TASKS))
    answers: dict[str, str] = {}
    for label, model in models.items():
        marks = []
        for task, question in questions.items():
            answers[task], _ = ask(client, model, question.prompt)
            marks.append(mark(answers[task], question))
        print(f"{label:{width}}  " + "  ".join(f"{each:>5}" for each in marks), flush=True)
    print(f"\nwhat {ALIAS} says:")
    for task in TASKS:
        print(f"{task:5} {answers[task]}")


def mark(answer: str, question: Example) -> str:
    """A tick for the one right answer."""
    return "✓" if answer == question.answer else "·"


def print_merges(client: OpenAI) -> None:
    """What each merge cost: the merge itself, and one token of an adapter and of a merge, both warm."""
    prompt = examples(TASKS["sql"], "test", 1)[0].prompt
    merged = merge_milliseconds(LOG.read_text())
    print(f"\n{'':46}  merged in   one token")
    for model in (*POPULAR.values(), ALIAS):
        spec = canonical(ALIAS_SPEC if model == ALIAS else model)
        print(f"{spec:46}  {merged[spec]:>6.1f} ms   {ask(client, model, prompt, 1)[1]:.3f} s")
    print(f"{'(the plain adapter sql)':46}  {'':>9}   {ask(client, 'sql', prompt, 1)[1]:.3f} s")


def main() -> int:
    """Run the demonstration; returns the exit code."""
    make_model(MODEL_DIR)
    calibrate_adapters()
    flags = server_flags()
    print(f"starting vllm serve (a minute or so; its log: {LOG}) ", end="", flush=True)
    with terminated_cleanly(), VllmServer(MODEL_DIR, *flags, log=LOG, waiting=print_dot) as server:
        print(f" ready at {server.url}\n")
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300)
        print_answers(client)
        print_merges(client)
        print("\nstopping the server")
    print("\nto drag the weights yourself and see the answers: make playground")
    return 0


if __name__ == "__main__":
    sys.exit(main())
