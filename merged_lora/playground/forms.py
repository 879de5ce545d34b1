"""A merge as a form: the text of every field of the page, and which field a mistake is in.

Knows nothing of pages, nor of what options mean: ranges, defaults and help are those of the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from merged_lora.checks import number, spelled
from merged_lora.errors import MergeError, SpecError
from merged_lora.names import shortened
from merged_lora.recipe import Value
from merged_lora.spec import MAX_SOURCES, MergeSpec, Source, number_text, value_text
from merged_lora.strategies import find

MAX_FIELD = 4096
"""Characters of one field."""


class FieldError(MergeError):
    """A field of a form does not hold what it must; ``field`` is its name, such as ``options.density``."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def form_of(spec: MergeSpec) -> dict[str, object]:
    """A merge as a form: ``strategy``, ``sources`` with ``name`` and ``weight``, and ``options``.

    All values are texts, so that a client without whole numbers of 63 bits loses nothing.
    """
    return {
        "strategy": spec.strategy,
        "sources": [{"name": source.name, "weight": number_text(source.weight)} for source in spec.sources],
        "options": {
            name: value if isinstance(value, str) else value_text(value) for name, value in spec.options
        },
    }


def spec_of(form: object) -> MergeSpec:
    """The merge in a form such as :func:`form_of` makes; an option whose text is blank has its default.

    Raises FieldError, whose field is ``strategy``, ``sources``, ``sources.0.name``, ``sources.0.weight``,
    ``options.NAME``, ``options.NAME.0`` for the value of one source, or ``spec`` for a mistake that no field
    makes alone.
    """
    strategy, sources, options = _parts(form)
    try:
        find(strategy)
    except SpecError as error:
        raise FieldError("strategy", str(error)) from None
    found = tuple(_source(f"sources.{i}", name, weight) for i, (name, weight) in enumerate(sources))
    given = tuple((name, _value(strategy, name, text)) for name, text in options.items() if text.strip())
    try:
        return MergeSpec(strategy, found, given)
    except SpecError as error:
        raise FieldError(_field_of(strategy, found, given), str(error)) from None


def _parts(form: object) -> tuple[str, Sequence[tuple[str, str]], Mapping[str, str]]:
    """The texts of a form; raises FieldError for anything else."""
    match form:
        case {"strategy": str(strategy), "sources": list(given), "options": dict(options)}:
            sources = [_texts(each) for each in given]
            texts = [strategy, *(text for pair in sources for text in pair), *options, *options.values()]
            if len(sources) <= MAX_SOURCES and all(map(_is_field, texts)):
                return strategy, sources, options
    raise FieldError(
        "spec",
        'a form is {"strategy": "...", "sources": [{"name": "...", "weight": "..."}], "options": {...}}, all '
        f"in texts of at most {MAX_FIELD} characters, with at most {MAX_SOURCES} sources",
    )


def _texts(source: object) -> tuple[str, str]:
    match source:
        case {"name": str(name), "weight": str(weight)}:
            return name, weight
    raise FieldError("sources", 'a source is {"name": "...", "weight": "..."}')


def _is_field(text: object) -> bool:
    return isinstance(text, str) and len(text) <= MAX_FIELD


def _source(field: str, name: str, weight: str) -> Source:
    """A source, which is checked by itself; raises FieldError."""
    try:
        factor = number(spelled(weight))
    except ValueError as error:
        raise FieldError(
            f"{field}.weight", f"the weight of {name!r} {error}, got {shortened(weight)!r}"
        ) from None
    for part, source in (("name", Source(name)), ("weight", Source(name, factor))):
        try:
            MergeSpec("sum", (source,))
        except SpecError as error:
            raise FieldError(f"{field}.{part}", str(error)) from None
    return source


def _value(strategy: str, name: str, text: str) -> Value:
    """The value that a text spells, or the text, which the option's own check refuses."""
    option = find(strategy).option(name)
    kind = option.check.schema["type"] if option is not None else "string"
    if kind == "string":
        return text
    if kind == "boolean":
        return {"true": True, "false": False}.get(text.strip(), text)
    if text.strip().startswith("[") and text.strip().endswith("]"):
        return tuple(spelled(part.strip()) for part in text.strip()[1:-1].split(","))  # type: ignore[misc]
    return spelled(text.strip())  # type: ignore[return-value]  # the option's own check refuses a text


def _field_of(strategy: str, sources: tuple[Source, ...], options: tuple[tuple[str, Value], ...]) -> str:
    """The field of a refused form that is refused by itself too."""
    if not _is_fine(strategy, sources):
        return "sources"
    for name, value in options:
        if _is_fine(strategy, sources, (name, value)):
            continue
        each = enumerate(value) if isinstance(value, tuple) and len(value) == len(sources) else ()
        wrong = (i for i, one in each if not _is_fine(strategy, sources, (name, one)))
        return ".".join(["options", name, *map(str, islice(wrong, 1))])
    return "spec"


def _is_fine(strategy: str, sources: tuple[Source, ...], *options: tuple[str, Value]) -> bool:
    try:
        MergeSpec(strategy, sources, options)
    except SpecError:
        return False
    return True
