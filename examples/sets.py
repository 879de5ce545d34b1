"""Which sets of adapters decide how merges are made, and which only show how good they are.

Written down before any merge of these adapters was measured. Methods, constants and defaults may be
chosen on `CHOOSE`. `REPORT` is for the numbers that pages state: nothing is chosen on it, and a set does
not move to the other list because of its result. `query`, `terse`, `dates` and `fields` are not in
`CHOOSE` at all, except for `query` in one six.
"""

CHOOSE: tuple[tuple[str, ...], ...] = (
    ("sql", "steps"),
    ("json", "tone"),
    ("tone", "topic"),
    ("sql", "json", "tone"),
    ("sql", "json", "steps"),
    ("sql", "tone", "topic"),
    ("json", "topic", "steps"),
    ("tone", "topic", "steps"),
    ("sql", "json", "tone", "topic", "steps", "query"),
)
"""Sets to choose on: pairs, threes and a six."""

REPORT: tuple[tuple[str, ...], ...] = (
    ("sql", "query"),  # overlap
    ("tone", "terse"),  # overlap
    ("dates", "fields"),
    ("json", "fields"),
    ("query", "terse", "dates"),  # rank 8 all three, as in the next four
    ("terse", "dates", "fields"),
    ("query", "dates", "fields"),
    ("sql", "query", "dates"),
    ("tone", "terse", "fields"),
    ("steps", "query", "fields"),  # mixed ranks, as in the next two
    ("topic", "terse", "dates"),
    ("topic", "query", "fields"),
    ("sql", "tone", "query", "terse", "dates", "fields"),  # rank 8 all six
    ("json", "topic", "steps", "query", "dates", "fields"),
    ("sql", "json", "tone", "topic", "steps", "query", "terse", "dates", "fields"),
)
"""Sets to report on: pairs, threes, two sixes and all nine."""
