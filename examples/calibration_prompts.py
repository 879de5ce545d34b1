"""Writes prompts to calibrate the adapters on: 16 per task, unlabelled, as a user would have them.

    python examples/calibration_prompts.py

They are the last of the training split, which neither training nor any test has used. Files are JSON
lines with messages, or with a prompt if the task is plain text: in examples/prompts/ for the tasks whose
adapters are in the repository, beside the cache of adapters for all others.
"""

import json
from pathlib import Path

from more_tasks import ALL_TASKS
from smollm2 import MODEL_DIR
from tasks import TASKS, TRAIN_SIZE, Task, examples

COUNT = 16


def prompts_file(name: str) -> Path:
    """Where the prompts of a task are."""
    folder = Path(__file__).resolve().parent if name in TASKS else MODEL_DIR.parent
    return folder / "prompts" / f"{name}.jsonl"


def prompts_text(task: Task) -> str:
    """The file of a task: one prompt a line."""
    prompts = [example.prompt for example in examples(task, "train", TRAIN_SIZE)[-COUNT:]]
    lines: list[object] = [{"prompt": prompt} for prompt in prompts]
    if task.chat:
        lines = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
    return "".join(json.dumps(line) + "\n" for line in lines)


def main() -> None:
    for name, task in ALL_TASKS.items():
        file = prompts_file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(prompts_text(task), encoding="utf-8")
        print(f"{file}: {COUNT} prompts")


if __name__ == "__main__":
    main()
