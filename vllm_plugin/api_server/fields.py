"""Fields of a request's body that are meant for a merge and that vLLM would ignore.

vLLM takes unknown fields, so that only well-known ones are refused here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from merged_lora.errors import SpecError

FIELD = "merged_adapters"
_SPELLINGS = {"mergedadapter", "mergedadapters", "mergeadapter", "mergeadapters"}
_NESTS = ("parameters", "extra_body")
"""Where LoRAX's clients and users of the OpenAI client put the field."""


class FieldError(SpecError):
    """A field is misspelt or in the wrong place; ``field`` is its name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def check_fields(fields: Mapping[str, object]) -> None:
    """Raise FieldError for a field that asks for a merge or an adapter where nothing reads it.

    fields: the fields of the body that vLLM does not know.
    """
    for name, value in fields.items():
        _check(name, value, "")
        if name in _NESTS and isinstance(value, Mapping):
            for inner, held in value.items():
                _check(str(inner), held, name)


def _check(name: str, value: object, nest: str) -> None:
    if value is None or (name == FIELD and not nest):
        return
    shown = f"{nest}.{name}" if nest else name
    if re.sub("[^a-z]", "", name.lower()) in _SPELLINGS:
        raise FieldError(
            shown, f'nothing reads "{shown[:64]}"; write "{FIELD}" at the top of the body, beside "model"'
        )
    if name == "adapter_id":
        raise FieldError(shown, f'nothing reads "{shown}"; write the adapter\'s name in "model"')
