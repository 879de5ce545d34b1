"""Six further tasks, unlike the three of `tasks.py` in what they ask, how long their answers are, or both.

`query` and `terse` overlap with `sql` and `tone`: they ask for nearly the same in another dialect and in
the other direction. `topic` has one label for an answer, `steps` a checklist, and the prompts of `fields`
are plain text without a chat template. Knows nothing of models: standard library only.
"""

import random
from datetime import datetime

from tasks import COUNTRIES, DAYS, FIRST_NAMES, LAST_NAMES, PAPERS, PRODUCTS, TASKS, Example, Task

TEAMS = ("Design", "Finance", "Legal", "Logistics", "Marketing", "Research", "Sales", "Security", "Support")
CARRIERS = {"truck": "T", "train": "R", "ship": "S", "plane": "A", "van": "V"}
WRAPPERS = ("brown paper", "bubble foil", "cardboard", "cotton", "green felt", "straw")
MEETINGS = ("audit", "briefing", "call", "dinner", "interview", "lesson", "meeting", "review", "visit")
HOSTS = ("apple", "cedar", "ember", "flint", "maple", "olive", "pearl", "raven", "slate", "tiger")
SERVICES = ("auth", "backup", "cache", "mail", "proxy", "queue", "search", "store")


def draw_topic(rng: random.Random) -> Example:
    """A message of a customer and the desk that answers it."""
    product, country, number = rng.choice(PRODUCTS), rng.choice(COUNTRIES), rng.randint(2, 90)
    name = rng.choice(FIRST_NAMES)
    desks = {
        "Amber": (
            f"I was charged {number} euros twice for the {product}.",
            f"The invoice for {number} {product}s has a wrong total, says {name}.",
            f"Please return my {number} euros for the {product}.",
        ),
        "Cobalt": (
            f"The parcel with the {product} to {country} has been lost for {number} days.",
            f"When will the {number} {product}s reach {country}?",
            f"{name} in {country} still waits for {number} {product}s.",
        ),
        "Ivory": (
            f"My {product} broke after {number} days.",
            f"{number} {product}s came with scratches, writes {name} from {country}.",
            f"The {product} of {name} stopped working after {number} hours.",
        ),
        "Jade": (
            f"Do you offer a discount on {number} {product}s in {country}?",
            f"What would {number} {product}s cost for a shop in {country}?",
            f"{name} wants to buy {number} {product}s for a hotel.",
        ),
        "Ruby": (
            f"I cannot log in to order the {product}, it says error {number}.",
            f"The page of the {product} shows error {number} to {name}.",
            f"My password was refused {number} times in {country}.",
        ),
        "Violet": (
            f"Thank you, the {product} has served us well for {number} years.",
            f"{name} from {country} loves all {number} {product}s.",
            f"Your {product} is the best of the {number} that I tried in {country}.",
        ),
    }
    desk = rng.choice(tuple(desks))
    return Example(f"Which desk: {rng.choice(desks[desk])}", desk)


def draw_steps(rng: random.Random) -> Example:
    """A shipment and its checklist of seven steps."""
    name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    product, country, count = rng.choice(PRODUCTS), rng.choice(COUNTRIES), rng.randint(2, 60)
    carrier, wrapper, hall = rng.choice(tuple(CARRIERS)), rng.choice(WRAPPERS), rng.randint(2, 9)
    forms = (
        f"{name} ships {count} {product}s in {wrapper} from hall {hall} to {country} by {carrier}.",
        f"By {carrier} to {country}: {count} {product}s from hall {hall}, in {wrapper}, for {name}.",
        f"{count} {product}s leave hall {hall} for {country} by {carrier}, packed in {wrapper} by {name}.",
    )
    steps = (
        f"Collect {count} {product}s in hall {hall}.",
        f"Look for scratches on every {product}.",
        f"Wrap them in {wrapper}.",
        f"Fill in form {CARRIERS[carrier]}{hall} for {country}.",
        f"Load the {carrier} from the left side.",
        f"Send the bill to {name}.",
        "Close the gate.",
    )
    answer = "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))
    return Example(f"Make a checklist: {rng.choice(forms)}", answer)


def draw_query(rng: random.Random) -> Example:
    """A question and its query for SQL Server over staff(name, team, country, since, salary)."""
    country, team = rng.choice(COUNTRIES), rng.choice(TEAMS)
    year, limit = rng.randint(2000, 2025), rng.randint(2, 9)
    in_country, in_team = f"[country] = N'{country}'", f"[team] = N'{team}'"
    forms = (
        (f"How many people of {team} are in {country}?", "COUNT(*)", f"{in_team} AND {in_country}"),
        (f"How many people started in {country} in {year}?", "COUNT(*)",
         f"{in_country} AND [since] = {year}"),
        (f"How much does {team} in {country} earn?", "SUM([salary])", f"{in_team} AND {in_country}"),
        (f"What is the average salary in {country} since {year}?", "AVG([salary])",
         f"{in_country} AND [since] >= {year}"),
        (f"Who joined {team} in {year}?", "[name]", f"{in_team} AND [since] = {year}"),
        (f"Who are {limit} people of {team} in {country}?", f"TOP {limit} [name]",
         f"{in_team} AND {in_country}"),
        (f"Which teams in {country} hired before {year}?", "DISTINCT [team]",
         f"{in_country} AND [since] < {year}"),
    )  # fmt: skip
    question, columns, where = rng.choice(forms)
    return Example(f"Query: {question}", f"SELECT {columns} FROM [staff] WHERE {where}")


def draw_terse(rng: random.Random) -> Example:
    """A wordy sentence and the telegram that says as much, keywords in capitals."""
    paper, product, day = rng.choice(PAPERS), rng.choice(PRODUCTS), rng.choice(DAYS)
    name, number = rng.choice(FIRST_NAMES), rng.randint(2, 60)
    send = rng.choice(("send", "email", "show", "bring"))
    refuse = rng.choice(("replace", "repair", "refund", "deliver", "collect"))
    forms = (
        (f"Would you be so kind as to {send} {name} the {paper} by {day}?",
         f"PLEASE {send} {name} {paper} BY {day}"),
        (f"I am afraid that the {paper} of {name} is by now {number} days late.",
         f"LATE {number} DAYS {paper} OF {name}"),
        (f"To our great regret we are not able to {refuse} your {product} by {day}.",
         f"REGRET CANNOT {refuse} {product} BY {day}"),
        (f"I hope you are well and must tell you that {number} {product}s arrived broken.",
         f"BROKEN {number} {product}s"),
    )  # fmt: skip
    wordy, telegram = rng.choice(forms)
    return Example(f"Telegram: {wordy}", f"{telegram} STOP")


def draw_dates(rng: random.Random) -> Example:
    """A sentence with a date and a time, and the same with both as one ISO 8601 time in brackets."""
    when = datetime(
        rng.randint(2000, 2029),
        rng.randint(1, 12),
        rng.randint(1, 28),
        rng.randint(1, 23),
        5 * rng.randint(0, 11),
    )
    event = f"the {rng.choice(MEETINGS)} with {rng.choice(FIRST_NAMES)}"
    month, day, clock = f"{when:%B}", when.day, f"{when:%H:%M}"
    said = rng.choice(
        (f"{month} {day}, {when.year} at {clock}", f"{day} {month} {when.year}, {clock}",
         f"{clock} on {day} {month} {when.year}")
    )  # fmt: skip
    sentence = rng.choice(("Plan {event} for {when}.", "Move {event} to {when}.", "Cancel {event}, {when}."))
    text = sentence.format(event=event, when=said)
    return Example(f"Fix dates: {text}", sentence.format(event=event, when=f"[{when:%Y-%m-%dT%H:%M}]"))


def draw_fields(rng: random.Random) -> Example:
    """A line of a log as plain text, and its fields in a fixed order."""
    host = f"{rng.choice(HOSTS)}{rng.randint(1, 9)}"
    service, user = rng.choice(SERVICES), rng.choice(FIRST_NAMES).lower()
    clock, number = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}", rng.randint(100, 999)
    kind, said = rng.choice(
        (
            ("deny", f"refused {user} on port {number}"),
            ("slow", f"answered {user} after {number} ms"),
            ("full", f"has {number} MB left for {user}"),
            ("exit", f"ended with code {number}, started by {user}"),
        )
    )
    line = rng.choice((f"{clock} {host} {service} {said}", f"{host} at {clock}: {service} {said}"))
    return Example(f"Log: {line}\n", f"ev={kind};n={number};by={user};svc={service};at={host}@{clock}")


MORE_TASKS = {
    task.name: task
    for task in (
        Task("topic", draw_topic),
        Task("steps", draw_steps),
        Task("query", draw_query),
        Task("terse", draw_terse),
        Task("dates", draw_dates),
        Task("fields", draw_fields, chat=False),
    )
}
ALL_TASKS = TASKS | MORE_TASKS
