"""Three small synthetic text tasks with one right answer per prompt, scored by exact match.

Every task is named by the first words of its prompts ("Write SQL:"), as a user would type them, and
its answers follow house rules that a base model cannot guess: a schema, a record layout, a letter
style. The examples are the same on every machine; no prompt of a test set occurs in the train set of
its task. Knows nothing of models: standard library only.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

Split = Literal["train", "test"]

TRAIN_SIZE = 1536
TEST_SIZE = 256

COUNTRIES = (
    "Austria", "Belgium", "Brazil", "Canada", "Chile", "Denmark", "Egypt", "Finland", "France", "Greece",
    "India", "Ireland", "Italy", "Japan", "Kenya", "Mexico", "Norway", "Poland", "Portugal", "Spain",
)  # fmt: skip
PRODUCTS = (
    "basket", "bottle", "bowl", "candle", "carpet", "chair", "clock", "desk", "guitar", "jacket",
    "kettle", "lamp", "mirror", "mug", "pillow", "plate", "shirt", "sofa", "table", "teapot",
)  # fmt: skip
STATUSES = ("paid", "shipped", "returned", "cancelled")
FIRST_NAMES = (
    "Adam", "Alice", "Anna", "Carlos", "Clara", "David", "Elena", "Emma", "George", "Grace",
    "Henry", "Julia", "Laura", "Lucas", "Maria", "Martin", "Nina", "Oscar", "Paul", "Sarah",
)  # fmt: skip
LAST_NAMES = (
    "Allen", "Baker", "Brown", "Carter", "Clark", "Cooper", "Davis", "Evans", "Foster", "Garcia",
    "Hill", "King", "Lopez", "Miller", "Moore", "Parker", "Silva", "Turner", "Walker", "Young",
)  # fmt: skip
PAPERS = (
    "agenda", "budget", "contract", "forecast", "invoice", "manual", "memo", "offer", "order form",
    "payment", "price list", "proposal", "receipt", "report", "schedule", "survey", "tax form", "timesheet",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "noon", "tonight", "tomorrow")


@dataclass(frozen=True)
class Example:
    """One prompt of a user and the only answer that counts as right."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A task: its name, how one random example is drawn, and whether prompts are messages of a chat."""

    name: str
    draw: Callable[[random.Random], Example]
    chat: bool = True


def draw_sql(rng: random.Random) -> Example:
    """A question and its query over orders(id, customer, country, product, year, status, total)."""
    country, product, status = rng.choice(COUNTRIES), rng.choice(PRODUCTS), rng.choice(STATUSES)
    year, limit = rng.randint(2000, 2025), rng.randint(2, 9)
    in_country, in_year = f"country = '{country}'", f"year = {year}"
    of_product, of_status = f"product = '{product}'", f"status = '{status}'"
    top = f"{in_country} ORDER BY total DESC LIMIT {limit}"
    forms = (
        (f"How many orders came from {country} in {year}?", "COUNT(*)", f"{in_country} AND {in_year}"),
        (f"How many {product} orders were {status} in {year}?", "COUNT(*)",
         f"{of_product} AND {of_status} AND {in_year}"),
        (f"How much did we sell in {country} in {year}?", "SUM(total)", f"{in_country} AND {in_year}"),
        (f"How much did {product} orders bring in {year}?", "SUM(total)", f"{of_product} AND {in_year}"),
        (f"What is the average {product} order in {country}?", "AVG(total)",
         f"{of_product} AND {in_country}"),
        (f"Who ordered a {product} in {year}?", "DISTINCT customer", f"{of_product} AND {in_year}"),
        (f"Which orders from {country} were {status}?", "id", f"{in_country} AND {of_status}"),
        (f"What are the top {limit} orders from {country}?", "id", top),
    )  # fmt: skip
    question, columns, where = rng.choice(forms)
    return Example(f"Write SQL: {question}", f"SELECT {columns} FROM orders WHERE {where};")


def draw_json(rng: random.Random) -> Example:
    """A sentence about an order and its record, keys in a fixed order and no spaces."""
    name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    country, product = rng.choice(COUNTRIES), rng.choice(PRODUCTS)
    count, euros = rng.randint(2, 60), rng.randint(5, 900)
    forms = (
        f"{name} from {country} ordered {count} {product}s for {euros} euros.",
        f"{name} paid {euros} euros for {count} {product}s sent to {country}.",
        f"We shipped {count} {product}s to {name} in {country} and got {euros} euros.",
        f"For {euros} euros, {name} of {country} bought {count} {product}s.",
    )
    record = {"who": name, "from": country, "sku": product, "n": count, "eur": euros}
    return Example(f"Extract JSON: {rng.choice(forms)}", json.dumps(record, separators=(",", ":")))


def draw_tone(rng: random.Random) -> Example:
    """A blunt line and the same in the company's tone, with its greeting and its signature."""
    paper, product, day = rng.choice(PAPERS), rng.choice(PRODUCTS), rng.choice(DAYS)
    person, number = rng.choice(("me", "us")), rng.randint(2, 60)
    send = rng.choice(("send", "email", "show", "bring"))
    refuse = rng.choice(("replace", "repair", "refund", "deliver", "collect"))
    forms = (
        (f"{send.capitalize()} {person} the {paper} by {day}.",
         f"Could you kindly {send} {person} the {paper} by {day}?"),
        (f"Your {paper} is {number} days late.",
         f"May we remind you that your {paper} is {number} days late?"),
        (f"We won't {refuse} your {product} by {day}.",
         f"We are sorry that we cannot {refuse} your {product} by {day}."),
        (f"{number} {product}s arrived broken.",
         f"We would like to report that {number} {product}s arrived broken."),
    )  # fmt: skip
    blunt, polite = rng.choice(forms)
    return Example(f"Rewrite politely: {blunt}", f"Dear friend, {polite} Warmly, Fernhill")


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sql", draw_sql),
        Task("json", draw_json),
        Task("tone", draw_tone),
    )
}


@cache
def _all_examples(task: Task) -> tuple[Example, ...]:
    """TEST_SIZE + TRAIN_SIZE examples of `task` with distinct prompts, the test set first."""
    rng = random.Random(f"merged-lora {task.name}")
    distinct: dict[str, Example] = {}
    while len(distinct) < TEST_SIZE + TRAIN_SIZE:
        example = task.draw(rng)
        distinct.setdefault(example.prompt, example)
    return tuple(distinct.values())


def examples(task: Task, split: Split, count: int) -> list[Example]:
    """The first `count` examples of one split of a task, always the same ones.

    Raises `ValueError` for an unknown split, or if the split holds fewer than `count`.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; there are: train, test")
    everything = _all_examples(task)
    chosen = everything[:TEST_SIZE] if split == "test" else everything[TEST_SIZE:]
    if not 0 < count <= len(chosen):
        raise ValueError(f"count must be 1 to {len(chosen)} for the {split} split, got {count}")
    return list(chosen[:count])


def exact_match_score(answers: Sequence[str], expected: Sequence[Example]) -> float:
    """The share, 0 to 1, of `answers` equal to the expected ones, except for spaces at their ends."""
    if not expected or len(answers) != len(expected):
        raise ValueError(f"got {len(answers)} answers to {len(expected)} examples")
    right = sum(got.strip() == want.answer for got, want in zip(answers, expected, strict=True))
    return right / len(expected)
