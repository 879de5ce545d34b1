"""Nothing that PEFT can write into a configuration is unknown here, or left out of the table of rows."""

from __future__ import annotations

import dataclasses
import typing

import peft as typed_peft
import pytest

from formats.table import PLAIN, ROWS
from merged_lora.files.config import FIELDS

peft: typing.Any = typed_peft
CONFIG = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}

OF_NO_MODULE = {
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("runtime_config", "loftq_config", "eva_config", "corda_config", "megatron_core", "qalora_group_size"),
}
"""Fields that PEFT writes by itself, and settings of what other fields switch on."""


def initialisations() -> list[str]:
    """The texts that PEFT's annotation of ``init_lora_weights`` lists."""
    annotation = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    parts = [part for part in typing.get_args(annotation) if part is not bool]
    return [value for part in parts for value in typing.get_args(part)]


def test_every_field_of_peft_s_configuration_is_known() -> None:
    assert CONFIG.keys() <= FIELDS.keys(), (
        "a new release of PEFT has fields of which it is not known what they mean"
    )


def test_every_field_of_peft_s_configuration_is_set_in_a_row() -> None:
    fields = {name for row in ROWS.values() for name in {**PLAIN, **row.config, **row.written}}
    assert CONFIG.keys() - fields == OF_NO_MODULE


@pytest.mark.parametrize("value", initialisations())
def test_every_initialisation_of_peft_is_in_a_row(value: str) -> None:
    rows = {str({**PLAIN, **row.config, **row.written}["init_lora_weights"]) for row in ROWS.values()}
    start = value.partition("[")[0]
    assert any(found == value or ("[" in value and found.startswith(start)) for found in rows)
