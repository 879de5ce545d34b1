"""Trains one LoRA adapter per task with PEFT and saves it under examples/adapters/<task>/.

    python examples/train.py [--model DIR] [--out DIR] [TASK ...]

Rank 8 and alpha 16 on all seven linear layers, one pass over 1,440 examples, the loss on the answer
and its stop token only. Computed in float32 and saved in bf16 (5 MB each). A run repeats on the same
machine and library versions, and nearly so elsewhere. Does not judge what it trained: evaluate.py does.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from smollm2 import MODEL_DIR, NAME, STOP_TOKEN, chat_text, load_model
from tasks import TASKS, Example, examples

ADAPTERS_DIR = Path(__file__).resolve().parent / "adapters"

RANK = 8
ALPHA = 16
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEPS = 120
WARMUP_STEPS = 10
BATCH_SIZE = 12
LEARNING_RATE = 1e-3
MAX_GRAD_NORM = 1.0
SEED = 0
REPORT_EVERY = 10
IGNORED = -100


def learning_rate_factor(step: int) -> float:
    """The share of `LEARNING_RATE` at `step`: up from 0 over the warm-up, then linearly down to 0."""
    return min((step + 1) / WARMUP_STEPS, (STEPS - step) / (STEPS - WARMUP_STEPS))


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, batch: Sequence[Example]
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and attention mask `[batch, length]`, and the labels `[batch, longest answer]`, all int64.

    Rows are padded on the left, so every answer ends in the last column. Labels are the last columns of
    the ids, `IGNORED` where a shorter answer has not begun.
    """
    prompts = tokenizer([chat_text(tokenizer, example.prompt) for example in batch])["input_ids"]
    answers = tokenizer([example.answer + STOP_TOKEN for example in batch])["input_ids"]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    labels = torch.full((len(batch), max(map(len, answers))), IGNORED)
    for row, answer in enumerate(answers):
        labels[row, -len(answer) :] = torch.tensor(answer)
    return padded["input_ids"], padded["attention_mask"], labels


def save_adapter(model: PeftModel, adapter_dir: Path) -> None:
    """Writes the adapter of `model` to `adapter_dir` in bf16, in place of what was there."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    adapter_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{adapter_dir.name}.", dir=adapter_dir.parent) as temporary:
        folder = Path(temporary) / "adapter"
        model.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)
        config_file = folder / "adapter_config.json"
        config = json.loads(config_file.read_text())
        # PEFT writes the local path of the model, and the modules in the order of a set.
        config["base_model_name_or_path"] = NAME
        config["target_modules"] = list(TARGET_MODULES)
        config_file.write_text(json.dumps(config, indent=2) + "\n")
        if adapter_dir.exists():
            shutil.rmtree(adapter_dir)
        folder.rename(adapter_dir)


def train(task: str, model_dir: Path, adapter_dir: Path) -> float:
    """Trains an adapter for `task`, saves it to `adapter_dir`, and returns the last reported loss."""
    torch.manual_seed(SEED)
    data = examples(task, "train", STEPS * BATCH_SIZE)
    base, tokenizer = load_model(model_dir)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGET_MODULES), task_type="CAUSAL_LM")
    model = cast(PeftModel, get_peft_model(base, config)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)

    total = mean = 0.0
    start = time.perf_counter()
    for step in range(STEPS):
        batch = encode_batch(tokenizer, data[step * BATCH_SIZE : (step + 1) * BATCH_SIZE])
        ids, mask, labels = (tensor.to(base.device) for tensor in batch)
        # The logits at a column predict the next one: one column more, without the last.
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=labels.shape[1] + 1).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % REPORT_EVERY == 0:
            mean, total = total / REPORT_EVERY, 0.0
            seconds = time.perf_counter() - start
            print(f"{task}: step {step + 1}/{STEPS}, loss {mean:.4f}, {seconds:.0f} s", flush=True)
    save_adapter(model, adapter_dir)
    print(f"{task}: saved to {adapter_dir}", flush=True)
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description="Train one LoRA adapter per task.")
    parser.add_argument("task", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; default: all")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=ADAPTERS_DIR, help="default: %(default)s")
    arguments = parser.parse_args()
    tasks = arguments.task or list(TASKS)
    if unknown := sorted(set(tasks) - set(TASKS)):
        parser.error(f"unknown task: {', '.join(unknown)}; there are: {', '.join(TASKS)}")
    for task in tasks:
        train(task, arguments.model, arguments.out / task)


if __name__ == "__main__":
    main()
