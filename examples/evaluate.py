"""Measures exact match per task of the base model and of LoRA adapters, with transformers and PEFT.

    python examples/evaluate.py [--adapter NAME=DIR ...] [--merge SPEC ...] [--count 60] [--json FILE]

Answers are generated greedily through the chat template for the first `count` test examples of every
task. Any folder that PEFT can load may be given; a spec is merged from the given adapters first.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from merged_lora.engine import merge
from smollm2 import MODEL_DIR, chat_text, load_model
from tasks import TASKS, TEST_SIZE, exact_match_score, examples
from train import ADAPTERS_DIR

BATCH_SIZE = 32
MAX_NEW_TOKENS = 48


def load_adapted(
    model_dir: Path, adapter_dir: Path | None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model of `model_dir` with the adapter, if any, added to its float32 weights; its tokenizer."""
    model, tokenizer = load_model(model_dir)
    if adapter_dir is None:
        return model, tokenizer
    if not (adapter_dir / "adapter_config.json").is_file():
        raise SystemExit(f"error: no adapter in {adapter_dir}")
    # Added to the weights, an adapter costs nothing per token; in float32 that loses nothing to see.
    return PeftModel.from_pretrained(model, adapter_dir).merge_and_unload(), tokenizer


@torch.inference_mode()
def generate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """The greedy answer to every prompt, without special tokens, cut after `MAX_NEW_TOKENS`."""
    answers: list[str] = []
    for first in range(0, len(prompts), BATCH_SIZE):
        texts = [chat_text(tokenizer, prompt) for prompt in prompts[first : first + BATCH_SIZE]]
        inputs = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
        output = cast(Any, model).generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, task: str, count: int) -> float:
    """The share, 0 to 1, of the first `count` test examples of `task` that the model answers exactly."""
    expected = examples(TASKS[task], "test", count)
    return exact_match_score(generate(model, tokenizer, [example.prompt for example in expected]), expected)


def markdown_table(scores: dict[str, dict[str, float]]) -> str:
    """A row per adapter and a column per task, then their mean; scores 0 to 1 in per cent."""
    lines = ["| adapter | " + " | ".join(TASKS) + " | mean |", "|---|" + "---:|" * (len(TASKS) + 1)]
    for name, row in scores.items():
        cells = [*row.values(), sum(row.values()) / len(row)]
        lines.append(f"| {name} | " + " | ".join(f"{100 * cell:.0f} %" for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure exact match per task of adapters.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="default: %(default)s")
    parser.add_argument(
        "--adapter", action="append", metavar="NAME=DIR", help=f"default: one per task in {ADAPTERS_DIR}"
    )
    parser.add_argument("--merge", action="append", metavar="SPEC", default=[], help="measure this merge too")
    parser.add_argument("--count", type=int, default=60, help="test examples per task; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores, 0 to 1, to FILE")
    arguments = parser.parse_args()
    if not 0 < arguments.count <= TEST_SIZE:
        parser.error(f"--count must be 1 to {TEST_SIZE}, got {arguments.count}")
    folders: dict[str, Path | None] = {"base": None}
    for entry in arguments.adapter or [f"{task}={ADAPTERS_DIR / task}" for task in TASKS]:
        name, separator, folder = entry.partition("=")
        if not separator or not name or not folder:
            parser.error(f"--adapter takes NAME=DIR, got {entry!r}")
        if name in folders:
            parser.error(f"--adapter {name} is given twice, or is the base model's name")
        folders[name] = Path(folder)

    scores: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        sources = {name: folder for name, folder in folders.items() if folder is not None}
        for number, spec in enumerate(arguments.merge):
            folder = Path(temporary) / str(number)
            merge(spec, sources).save(folder)
            folders[f"`{spec}`"] = folder
        for name, adapter_dir in folders.items():
            start = time.perf_counter()
            model, tokenizer = load_adapted(arguments.model, adapter_dir)
            scores[name] = {task: score(model, tokenizer, task, arguments.count) for task in TASKS}
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    print(f"\nExact match on {arguments.count} test examples per task:\n")
    print(markdown_table(scores))
    if arguments.json:
        arguments.json.write_text(json.dumps({"count": arguments.count, "scores": scores}, indent=2) + "\n")


if __name__ == "__main__":
    main()
