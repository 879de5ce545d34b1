"""Forms mean the merges that they were made of, and a mistake is reported at the field that it is in."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merged_lora.errors import SpecError
from merged_lora.playground.forms import MAX_FIELD, FieldError, form_of, spec_of
from merged_lora.recipe import Option, Strategy
from merged_lora.spec import MAX_SOURCES, MergeSpec, Source, parse
from merged_lora.strategies import TABLE


def form(strategy: str = "ties", **changes: object) -> dict[str, Any]:
    """A form of two sources."""
    sources = [{"name": "sql", "weight": "0.7"}, {"name": "chat", "weight": "0.3"}]
    return {"strategy": strategy, "sources": sources, "options": {}, **changes}


def values(option: Option) -> st.SearchStrategy[Any]:
    """Values that an option takes."""
    schema: Any = option.check.schema
    if "enum" in schema:
        return st.sampled_from(list(schema["enum"]))
    if schema["type"] == "boolean":
        return st.booleans()
    if schema["type"] == "integer":
        return st.integers(schema["minimum"], schema["maximum"])
    if schema["type"] == "number":
        return st.floats(0.125, 1.0)
    return st.sampled_from(["q_proj", "q_proj v_proj", "*.self_attn.*"])


@st.composite
def specs(draw: st.DrawFn, strategy: Strategy) -> MergeSpec:
    """Merges of one strategy with one option at a time, which no other option contradicts."""
    count = strategy.sources_max or max(2, strategy.sources_min)
    names = draw(st.lists(st.text("ab _/é\"'<", min_size=1), min_size=count, max_size=count, unique=True))
    weights = draw(st.lists(st.floats(0.01, 9.0), min_size=count, max_size=count))
    option = draw(st.sampled_from([o for o in strategy.options if o.name not in ("weights", "epsilon")]))
    value = draw(values(option))
    if option.per_source and draw(st.booleans()):
        value = tuple(draw(st.lists(st.floats(0.125, 1.0), min_size=count, max_size=count)))
    try:
        sources = tuple(map(Source, (f"n{name}n" for name in names), weights))
        return MergeSpec(strategy.name, sources, ((option.name, value),))
    except SpecError:  # "auto", for one, goes with weights of 1 alone
        return parse(f"{strategy.name}({', '.join('abcdefgh'[:count])})")


@pytest.mark.parametrize("strategy", TABLE.values(), ids=lambda each: each.name)
@settings(max_examples=30)
@given(st.data())
def test_a_form_means_the_merge_that_it_was_made_of(strategy: Strategy, data: st.DataObject) -> None:
    spec = data.draw(specs(strategy))
    made: Any = form_of(spec)
    assert spec_of(json.loads(json.dumps(made))) == spec
    texts = [source["weight"] for source in made["sources"]] + list(made["options"].values())
    assert all(isinstance(text, str) for text in texts)


def test_a_blank_option_has_its_default_and_the_order_of_sources_is_free() -> None:
    assert spec_of(form(options={"density": " ", "rank": ""})) == parse("ties(0.3*chat, 0.7*sql)")
    each = form(options={"density": "[0.2, 0.4]"})
    assert str(spec_of(each)) == "ties(0.3*chat, 0.7*sql, density=[0.4, 0.2])"


def test_a_seed_of_63_bits_stays_exact() -> None:
    seed = 2**63 - 1
    made = form_of(parse(f"dare_ties(a, b, seed={seed})"))
    assert made["options"] == {"seed": str(seed)}
    assert spec_of(made).option("seed") == seed


@pytest.mark.parametrize(
    ("given", "field", "said"),
    [
        (form("tie"), "strategy", "unknown strategy 'tie'"),
        (form("slerp", sources=form()["sources"][:1]), "sources", "slerp takes exactly 2 sources"),
        (form(sources=[]), "sources", "takes at least 1 source"),
        (
            form(sources=[{"name": "a", "weight": "1"}, {"name": "b", "weight": "x"}]),
            "sources.1.weight",
            "the weight of 'b' must be a number, got 'x'",
        ),
        (form(sources=[{"name": "a", "weight": ""}]), "sources.0.weight", "must be a number, got ''"),
        (form(sources=[{"name": "a", "weight": "1e99"}]), "sources.0.weight", "1e-30 to 1e30"),
        (form(sources=[{"name": "a", "weight": "nan"}]), "sources.0.weight", "must be a finite number"),
        (form(sources=[{"name": "a\u202e", "weight": "1"}]), "sources.0.name", "name"),
        (form(sources=[{"name": "a", "weight": "1"}] * 2), "sources", "'a' is named more than once"),
        (form(options={"density": "2"}), "options.density", "density must be over 0 and at most 1, got 2"),
        (form(options={"density": "half"}), "options.density", "must be a number, got 'half'"),
        (form(options={"density": "[0.5]"}), "options.density", "density has 1 values for 2 sources"),
        (form(options={"density": "[0.5, x]"}), "options.density.1", "must be a number, got 'x'"),
        (form(options={"density": "[7, 0.5]"}), "options.density.0", "must be over 0 and at most 1, got 7"),
        (form(options={"normalize": "maybe"}), "options.normalize", "must be true or false"),
        (form(options={"elect": "all"}), "options.elect", 'must be "unweighted" or "weighted"'),
        (form(options={"colour": "red"}), "options.colour", "ties takes no option 'colour'"),
        (form(options={"weights": "auto"}), "options.weights", "give none to the sources"),
        (
            form("della", options={"density": "0.9", "epsilon": "0.15"}),
            "options.density",
            "density - epsilon must be over 0",
        ),
        (
            form("della", options={"density": "0.4", "epsilon": "0.45"}),
            "spec",
            "density - epsilon must be over 0",
        ),
    ],
)
def test_a_mistake_is_reported_at_its_field(given: object, field: str, said: str) -> None:
    with pytest.raises(FieldError) as caught:
        spec_of(given)
    assert caught.value.field == field
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        *(None, [], "ties(a, b)", {}, form(sources="sql"), form(options=[]), {**form(), "strategy": 1}),
        *(form(sources=[1]), form(sources=[{"name": "a"}]), form(options={"density": 0.5})),
        form(options={"density": "0" * (MAX_FIELD + 1)}),
        form(sources=[{"name": str(i), "weight": "1"} for i in range(MAX_SOURCES + 1)]),
    ],
)
def test_what_is_no_form_is_refused(given: object) -> None:
    with pytest.raises(FieldError):
        spec_of(given)
