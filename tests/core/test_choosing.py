"""Which modules a pattern means."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merged_lora.choosing import chosen
from merged_lora.errors import PlanError

LAYERS = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 10)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]
EXPERTS = [f"model.layers.0.mlp.experts.gate_up_proj[{i}]" for i in (0, 1, 10)]
NAMES = [*LAYERS, *EXPERTS, "lm_head"]


def having(*parts: str) -> list[str]:
    """The names with one of these texts in them."""
    return sorted(name for name in NAMES if any(part in name for part in parts))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("*", sorted(NAMES)),
        ("q_proj", having("q_proj")),
        ("q_proj lm_head", having("q_proj", "lm_head")),
        ("self_attn", having("self_attn")),
        ("*.self_attn.*", having("self_attn")),
        ("layers.1", having("layers.1.")),
        ("layers.1?", having("layers.10.")),
        ("layers.1*", having("layers.1")),
        ("layers.0.self_attn.v_proj", having("layers.0.self_attn.v_proj")),
        ("layers.*.mlp", having("mlp")),
        ("model.layers.1.mlp.down_proj", having("layers.1.mlp")),
        ("?_proj", having("q_proj", "v_proj")),
        ("*_proj", having("_proj")),
        ("experts", having("experts")),
        ("gate_up_proj", having("experts")),
        ("gate_up_proj[1]", having("[1]")),
        ("*[0]", having("[0]")),
        ("*proj[1*", having("[1")),
    ],
)
def test_a_pattern_is_a_run_of_whole_parts_of_a_name(patterns: str, expected: list[str]) -> None:
    assert chosen(NAMES, patterns, None) == expected
    if patterns != "*":
        assert chosen(NAMES, "*", patterns) == sorted(set(NAMES) - set(expected))


def test_without_takes_from_what_modules_leaves() -> None:
    assert chosen(NAMES, "self_attn", "layers.0 v_proj") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.10.self_attn.q_proj",
    ]


PARTS = st.from_regex(r"[a-c]{1,2}|[0-2]", fullmatch=True)
MODULES = st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), min_size=1, max_size=6, unique=True)


@given(MODULES, st.lists(PARTS, min_size=1, max_size=2))
def test_a_pattern_without_wildcards_means_names_that_have_its_parts_in_a_row(
    names: list[str], parts: list[str]
) -> None:
    expected = [
        name
        for name in sorted(names)
        if any(name.split(".")[i : i + len(parts)] == parts for i in range(len(name.split("."))))
    ]
    assert_chosen(names, ".".join(parts), expected)


@given(MODULES, st.text("ab.*?", min_size=1, max_size=6))
def test_wildcards_stand_for_any_characters(names: list[str], pattern: str) -> None:
    expression = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    found = re.compile(rf"(?:.*\.)?{expression}(?:\..*)?")
    padded = re.compile(rf".*\.{expression}\..*")  # a pattern may begin or end with a dot, or be one
    expected = [name for name in sorted(names) if found.fullmatch(name) or padded.fullmatch(f".{name}.")]
    assert_chosen(names, pattern, expected)


def assert_chosen(names: list[str], pattern: str, expected: list[str]) -> None:
    """The pattern means the expected names, or is refused if there are none."""
    if expected:
        assert chosen(names, pattern, None) == expected
    else:
        with pytest.raises(PlanError, match="no module of the sources matches"):
            chosen(names, pattern, None)


@pytest.mark.parametrize(
    ("modules", "without", "message"),
    [
        (
            "q_prj",
            None,
            "modules (--only): no module of the sources matches 'q_prj'; near: model.layers.0.self_",
        ),
        ("self_atn.q_proj", None, "near: model.layers.0.self_attn.q_proj, model.layers.0.self_attn.v_proj"),
        ("q_proj nothing", None, "no module of the sources matches 'nothing'; their names end in down_proj,"),
        ("*", "lmhead", "without (--without): no module of the sources matches 'lmhead'; near: lm_head"),
        ("*", "*", 'without="*" leaves no module of the sources; leave out less'),
        ("lm_head", "lm_head", 'without="lm_head" leaves no module of the sources'),
        ("Q_proj.0", None, "near: model.layers.0.self_attn.q_proj"),
    ],
)
def test_what_is_chosen_in_vain_is_refused_with_near_names(
    modules: str, without: str | None, message: str
) -> None:
    with pytest.raises(PlanError, match=re.escape(message)) as caught:
        chosen(NAMES, modules, without)
    assert len(str(caught.value)) < 600


def test_of_many_near_names_a_few_are_shown() -> None:
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(80)]
    with pytest.raises(PlanError, match=r"(, model\S+){4} and 75 more$"):
        chosen(names, "q_prj", None)


def test_a_hostile_pattern_takes_no_longer_than_its_length_warrants() -> None:
    name = "a" * 200
    with pytest.raises(PlanError):
        chosen([name], "*a" * 500 + "b", None)
