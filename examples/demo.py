"""Asks a real model, its adapters and merges of them the same questions, and prints the answers side by side.

    python examples/demo.py

Makes the model folder if it is not there (smollm2.py), starts ``vllm serve`` with the plugin on loopback,
talks to it through the ``openai`` client as any user would, and stops it. ``make demo`` installs it all.
"""

from __future__ import annotations

import sys
import time

import torch
from openai import OpenAI

from merged_lora.bench.launcher import VllmServer, print_dot
from merged_lora.spec import canonical
from merged_lora.vllm_plugin.merge_log import merge_milliseconds
from smollm2 import MODEL_DIR, make_model
from tasks import TASKS, examples
from train import ADAPTERS_DIR

ALIAS = "team"
ALIAS_SPEC = "0.5*sql + 0.5*json + 0.5*tone"
MERGES = (
    "slerp(sql, tone)",
    "0.5*json + 0.5*tone",
    ALIAS,
)
"""An inline spec, a sum, and an alias; their weights and densities were chosen by measuring."""

LOG = MODEL_DIR.parent / "demo-server.log"
MAX_TOKENS = 40


def server_flags() -> list[str]:
    """The flags of ``vllm serve``: what fits this machine, the adapters, and the alias."""
    if torch.cuda.is_available():
        machine = ["--dtype", "bfloat16", "--gpu-memory-utilization", "0.3"]
    else:
        machine = ["--dtype", "float32", "--max-num-seqs", "8"]
    adapters = [f"{task}={ADAPTERS_DIR / task}" for task in TASKS]
    return [
        *(*machine, "--enforce-eager", "--max-model-len", "512", "--max-lora-rank", "32", "--max-loras", "2"),
        *(
            "--enable-merged-lora",
            "--lora-modules",
            *adapters,
            "--merged-lora-modules",
            f"{ALIAS}={ALIAS_SPEC}",
        ),
    ]


def ask(client: OpenAI, model: str, prompt: str, tokens: int = MAX_TOKENS) -> tuple[str, float]:
    """The model's greedy answer, on one line, and the seconds it took."""
    start = time.perf_counter()
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=tokens
    )
    return " ".join((reply.choices[0].message.content or "").split()), time.perf_counter() - start


def print_answers(client: OpenAI) -> None:
    """One question of every task to every model; a tick marks the one right answer."""
    models = ["base", *TASKS, *MERGES]
    width = max(map(len, models))
    for task in TASKS:
        question = examples(TASKS[task], "test", 1)[0]
        print(f"\n{question.prompt}")
        for model in models:
            answer, seconds = ask(client, model, question.prompt)
            mark = "✓" if answer == question.answer else " "
            print(f"  {model:{width}}  {seconds:5.2f} s  {mark} {answer}", flush=True)


def print_merges(client: OpenAI) -> None:
    """What each merge cost: the merge itself, and one token of an adapter and of a merge, both warm."""
    prompt = examples(TASKS["sql"], "test", 1)[0].prompt
    merged = merge_milliseconds(LOG.read_text())
    print("\nmerge                                     merged in   one token")
    for model in MERGES:
        spec = canonical(ALIAS_SPEC if model == ALIAS else model)
        print(f"  {spec:40}  {merged[spec]:>6.1f} ms   {ask(client, model, prompt, 1)[1]:.3f} s")
    print(f"  {'(the plain adapter sql)':40}  {'':>9}   {ask(client, 'sql', prompt, 1)[1]:.3f} s")


def main() -> int:
    """Run the demonstration; returns the exit code."""
    make_model(MODEL_DIR)
    flags = server_flags()
    print(f"starting vllm serve (a minute or so; its log: {LOG}) ", end="", flush=True)
    with VllmServer(MODEL_DIR, *flags, log=LOG, waiting=print_dot) as server:
        print(f" ready at {server.url}")
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300)
        print_answers(client)
        print_merges(client)
        print("\nstopping the server")
    return 0


if __name__ == "__main__":
    sys.exit(main())
