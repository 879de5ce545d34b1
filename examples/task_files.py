"""Writes examples of the tasks as files of JSON lines, for `merged-lora eval` and `merged-lora tune`.

    python examples/task_files.py DIR [TASK ...] [--skip 0] [--count 60] [--split test]

A line of DIR/TASK.jsonl is {"messages": [...], "answer": "..."}, or {"prompt": "...", "answer": "..."} for a
task without a chat. Needs nothing but the standard library.
"""

import argparse
import json
from pathlib import Path

from more_tasks import ALL_TASKS
from tasks import TASKS, TEST_SIZE, TRAIN_SIZE, Example, Split, Task, examples


def line(task: Task, example: Example) -> str:
    """One example as JSON."""
    asked = [{"role": "user", "content": example.prompt}]
    prompt = {"messages": asked} if task.chat else {"prompt": example.prompt}
    return json.dumps({**prompt, "answer": example.answer}, ensure_ascii=False)


def write(folder: Path, task: Task, split: Split, count: int, skip: int = 0) -> Path:
    """Write `count` examples of one split of a task, after `skip`; returns the file, which is replaced."""
    file = folder / f"{task.name}.jsonl"
    lines = [line(task, example) for example in examples(task, split, skip + count)[skip:]]
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description="Write examples of the tasks as JSON lines.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write TASK.jsonl")
    parser.add_argument(
        "tasks", nargs="*", metavar="TASK", help=f"of {', '.join(ALL_TASKS)}; default: {', '.join(TASKS)}"
    )
    parser.add_argument("--count", type=int, default=60, help="examples of each; default: %(default)s")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many; default: none")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="default: %(default)s")
    arguments = parser.parse_args()
    largest = TEST_SIZE if arguments.split == "test" else TRAIN_SIZE
    if arguments.skip < 0 or not 0 < arguments.count <= largest - arguments.skip:
        parser.error(
            f"the {arguments.split} split has {largest} examples of a task, and not {arguments.count} after "
            f"{arguments.skip}"
        )
    unknown = [name for name in arguments.tasks if name not in ALL_TASKS]
    if unknown:
        parser.error(f"no task {unknown[0]!r}; there are {', '.join(ALL_TASKS)}")
    for name in arguments.tasks or TASKS:
        print(write(arguments.folder, ALL_TASKS[name], arguments.split, arguments.count, arguments.skip))


if __name__ == "__main__":
    main()
