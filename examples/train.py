"""Trains one LoRA adapter per task with PEFT and saves it.

    python examples/train.py [--model DIR] [--out DIR] [TASK ...]

`TRAININGS` has the settings of every adapter. Each has a seed of its own, so that the first A factors of
two adapters have nothing in common, as those of adapters from different people. The loss is on the answer
and its stop token only. Weights are float32, products are computed in bf16, and adapters are saved in
bf16. A run repeats on the same machine and library versions, and nearly so elsewhere. Does not judge what
it trained: evaluate.py and skills.py do.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy

from encoding import encode, packed
from more_tasks import ALL_TASKS
from smollm2 import MODEL_DIR, NAME, load_model
from tasks import TASKS, examples

ADAPTERS_DIR = Path(__file__).resolve().parent / "adapters"
MORE_ADAPTERS_DIR = MODEL_DIR.parent / "adapters"

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
WARMUP_STEPS = 10
BATCH_SIZE = 12
LEARNING_RATE = 1e-3
MAX_GRAD_NORM = 1.0
REPORT_EVERY = 10


@dataclass(frozen=True)
class Training:
    """How an adapter is made: `steps` steps of `BATCH_SIZE` examples each, none of them seen twice."""

    seed: int
    rank: int = 8
    alpha: int = 16
    target_modules: tuple[str, ...] = (*ATTENTION, *MLP)
    steps: int = 120
    use_rslora: bool = False

    def learning_rate_factor(self, step: int) -> float:
        """The share of `LEARNING_RATE` at `step`: up from 0 over the warm-up, then linearly down to 0."""
        return min((step + 1) / WARMUP_STEPS, (self.steps - step) / (self.steps - WARMUP_STEPS))


TRAININGS = {
    "sql": Training(seed=1),
    "json": Training(seed=2),
    "tone": Training(seed=3),
    "topic": Training(seed=4, rank=4, alpha=8, target_modules=("q_proj", "v_proj")),
    "steps": Training(seed=5, rank=16, alpha=32, steps=60),
    "query": Training(seed=6, steps=60),
    "terse": Training(seed=7, target_modules=ATTENTION, steps=60),
    "dates": Training(seed=8, alpha=8, target_modules=MLP, steps=60, use_rslora=True),
    "fields": Training(seed=9, steps=60),
}


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 is fast on a device; a CPU without instructions for it is 20 times as slow as in fp32."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def adapter_folder(name: str) -> Path:
    """Where the adapter of a task is kept: in the repository those of `TASKS`, in a cache all others."""
    return (ADAPTERS_DIR if name in TASKS else MORE_ADAPTERS_DIR) / name


def save_adapter(model: PeftModel, target_modules: Sequence[str], adapter_dir: Path) -> None:
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
        config["target_modules"] = list(target_modules)
        config_file.write_text(json.dumps(config, indent=2) + "\n")
        if adapter_dir.exists():
            shutil.rmtree(adapter_dir)
        folder.rename(adapter_dir)


def train(task: str, model_dir: Path, adapter_dir: Path) -> float:
    """Trains an adapter for `task`, saves it to `adapter_dir`, and returns the last reported loss."""
    training = TRAININGS[task]
    torch.manual_seed(training.seed)
    base, tokenizer = load_model(model_dir)
    chosen = examples(ALL_TASKS[task], "train", training.steps * BATCH_SIZE)
    data = encode(tokenizer, ALL_TASKS[task], chosen)
    config = LoraConfig(
        r=training.rank,
        lora_alpha=training.alpha,
        target_modules=list(training.target_modules),
        use_rslora=training.use_rslora,
        task_type="CAUSAL_LM",
    )
    model = cast(PeftModel, get_peft_model(base, config)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, training.learning_rate_factor)

    total = mean = 0.0
    start = time.perf_counter()
    for step in range(training.steps):
        batch = packed(data[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]).to(base.device)
        with torch.autocast(base.device.type, torch.bfloat16, enabled=computes_bf16(base.device)):
            logits = model(**batch.inputs).logits[0]
        loss = cross_entropy(logits.float(), batch.labels)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % REPORT_EVERY == 0:
            mean, total = total / REPORT_EVERY, 0.0
            seconds = time.perf_counter() - start
            print(f"{task}: step {step + 1}/{training.steps}, loss {mean:.4f}, {seconds:.0f} s", flush=True)
    save_adapter(model, training.target_modules, adapter_dir)
    print(f"{task}: saved to {adapter_dir}", flush=True)
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description="Train one LoRA adapter per task.")
    parser.add_argument("task", nargs="*", metavar="TASK", help=f"of {', '.join(ALL_TASKS)}; default: all")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="default: %(default)s")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"default: {ADAPTERS_DIR}, or {MORE_ADAPTERS_DIR} if not of {', '.join(TASKS)}",
    )
    arguments = parser.parse_args()
    tasks = arguments.task or list(ALL_TASKS)
    if unknown := sorted(set(tasks) - set(ALL_TASKS)):
        parser.error(f"unknown task: {', '.join(unknown)}; there are: {', '.join(ALL_TASKS)}")
    for task in tasks:
        train(task, arguments.model, arguments.out / task if arguments.out else adapter_folder(task))


if __name__ == "__main__":
    main()
