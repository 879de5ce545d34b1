"""Fields that ask for a merge where nothing reads them, and the names that a 404 offers instead."""

from __future__ import annotations

import pytest

from merged_lora.vllm_plugin.api_server.fields import FieldError, check_fields
from merged_lora.vllm_plugin.api_server.suggestions import names_instead

MERGE = {"ids": ["a"]}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"merged_adapters": MERGE},
        {"merged_adapter": None, "adapter_id": None, "mergedAdapters": None},
        {"parameters": {"merged_adapters": None, "adapter_id": None, "max_new_tokens": 7}},
        {"parameters": "merged_adapters"},
        {"parameters": [MERGE]},
        {"adapters": ["a"], "adapter": "a", "merged": True, "lora": "a"},  # whoever's they are
        {"kv_transfer_params": {"adapter_id": "a"}},
        {"cache_salt": "x", "return_token_ids": True},
    ],
)
def test_other_unknown_fields_are_left_to_vllm(fields: dict[str, object]) -> None:
    check_fields(fields)


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"merged_adapter": MERGE}, "merged_adapter", 'write "merged_adapters" at the top of the body'),
        (
            {"mergedAdapters": MERGE},
            "mergedAdapters",
            'nothing reads "mergedAdapters"; write "merged_adapters"',
        ),
        ({"merged-adapters": MERGE}, "merged-adapters", '"merged_adapters"'),
        ({"merge_adapters": MERGE}, "merge_adapters", '"merged_adapters"'),
        ({"MergedAdapters": "a"}, "MergedAdapters", '"merged_adapters"'),
        ({"parameters": {"merged_adapters": MERGE}}, "parameters.merged_adapters", 'beside "model"'),
        ({"parameters": {"mergedAdapters": MERGE}}, "parameters.mergedAdapters", 'beside "model"'),
        ({"extra_body": {"merged_adapters": MERGE}}, "extra_body.merged_adapters", 'beside "model"'),
        ({"adapter_id": "sql"}, "adapter_id", 'the adapter\'s name in "model"'),
        ({"parameters": {"adapter_id": "sql"}}, "parameters.adapter_id", 'in "model"'),
    ],
)
def test_a_well_known_mistake_is_refused_with_the_right_place(
    fields: dict[str, object], field: str, words: str
) -> None:
    with pytest.raises(FieldError) as refused:
        check_fields(fields)
    assert refused.value.field == field
    assert words in str(refused.value)


def test_a_wrong_name_gets_the_close_one_and_a_list() -> None:
    assert names_instead("sqll", ["tone", "sql"]) == "Did you mean `sql`? Adapters and merges: sql, tone."
    assert names_instead("SQL", ["sql"]) == "Did you mean `sql`? Adapters and merges: sql."
    assert names_instead("gpt-4", ["tone", "sql"]) == "Adapters and merges: sql, tone."
    assert names_instead("gpt-4", []) == "Adapters and merges: none."


@pytest.mark.parametrize("wrong", ["", "x" * 100_000, "adapter-number-12"])
def test_any_number_of_names_of_any_length_makes_a_short_message(wrong: str) -> None:
    names = [f"adapter-number-{i}" + "x" * (i % 300) for i in range(3000)]
    assert len(names_instead(wrong, names)) < 1000
