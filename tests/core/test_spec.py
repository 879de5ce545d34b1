"""The grammar: what a text or a JSON object means, and the one canonical text of each meaning."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from merged_lora.errors import SpecError, UnknownAdapterError
from merged_lora.names import checked_name
from merged_lora.recipe import Value
from merged_lora.spec import (
    MAX_TEXT,
    MergeSpec,
    Source,
    canonical,
    from_json,
    is_spec,
    parse,
)
from merged_lora.strategies import TABLE

MEANINGS = {
    # a weight defaults to 1, white space is free
    "ties(a,b)": "ties(a, b)",
    " ties ( a ,\n b ) ": "ties(a, b)",
    "ties(1*a, 1.0*b)": "ties(a, b)",
    "ties(a, b,)": "ties(a, b)",
    # sources are sorted by name, options by name
    "linear(0.3*chat, 0.7*sql)": "linear(0.3*chat, 0.7*sql)",
    "linear(0.7*sql, 0.3*chat)": "linear(0.3*chat, 0.7*sql)",
    "ties(a, b, scale=2, density=0.3)": "ties(a, b, density=0.3, scale=2)",
    # defaults are left out
    'ties(a, b, density=0.5, majority_sign_method="total", elect=unweighted)': "ties(a, b)",
    "sum(a, b, scale=1, normalize=false)": "sum(a, b)",
    "slerp(b, a, t=0.5)": "slerp(b, a)",
    # one value per source follows its source, and equal ones are one value
    "ties(b, a, density=[0.3, 0.7])": "ties(a, b, density=[0.7, 0.3])",
    "ties(b, a, density=[0.3, 0.3])": "ties(a, b, density=0.3)",
    "ties(b, a, density=[0.5, 0.5])": "ties(a, b)",
    "ties(a, density=[0.2])": "ties(a, density=0.2)",
    # order matters to slerp and to LoRAX's rule, which takes the first source's scaling
    "slerp(b, a, t=0.25)": "slerp(b, a, t=0.25)",
    "linear(b, a, compat=lorax)": 'linear(b, a, compat="lorax")',
    "ties(b, a, compat=lorax, density=[0.3, 0.7])": 'ties(b, a, compat="lorax", density=[0.3, 0.7])',
    # sums, signs, numbers
    "0.7*sql + 0.3*chat - 0.2*toxic": "sum(0.3*chat, 0.7*sql, -0.2*toxic)",
    "a - b": "sum(a, -1*b)",
    "-a+b": "sum(-1*a, b)",
    "a": "sum(a)",
    "+ 2 * a": "sum(2*a)",
    "sum(- 2*a, + b)": "sum(-2*a, b)",
    "1e3*a + .5*b + 1E-2*c + 2.*d": "sum(1000*a, 0.5*b, 0.01*c, 2*d)",
    "0*a - 0.0*b": "sum(0*a, 0*b)",
    "0.1*a + 0.30000000000000004*b": "sum(0.1*a, 0.30000000000000004*b)",
    # without commas and asterisks
    "ties(0.7 sql + 0.3 tone; density 0.2)": "ties(0.7*sql, 0.3*tone, density=0.2)",
    "ties(0.7 sql + 0.3 tone; density=0.2)": "ties(0.7*sql, 0.3*tone, density=0.2)",
    "ties(0.7*sql+0.3*tone;density=0.2;)": "ties(0.7*sql, 0.3*tone, density=0.2)",
    " ties ( a + b ;\n density 0.3 ; scale = 2 ) ": "ties(a, b, density=0.3, scale=2)",
    "ties(0.7 sql, 0.3 tone, density=0.2)": "ties(0.7*sql, 0.3*tone, density=0.2)",
    "sum(0.7 sql - 0.3 tone)": "sum(0.7*sql, -0.3*tone)",
    "0.7 sql + 0.3 tone - 1e-1 toxic": "sum(0.7*sql, 0.3*tone, -0.1*toxic)",
    "dare_ties(b + a; density [0.3 0.7]; seed 7)": "dare_ties(a, b, density=[0.7, 0.3], seed=7)",
    "ties(b + a; density=[0.3, 0.7])": "ties(a, b, density=[0.7, 0.3])",
    "ties(a; density 0.2)": "ties(a, density=0.2)",
    "ties(a;)": "ties(a)",
    "ties(- 2 a + b)": "ties(-2*a, b)",
    'ties(0.5 "a, b" + 2 "c*d"; majority_sign_method frequency)': 'ties(0.5*"a, b", 2*"c*d", '
    'majority_sign_method="frequency")',
    'ties("a\\u002cb" + "c\\u002ad")': 'ties("a,b", "c*d")',
    "linear(a + b; normalize true; compat lorax)": 'linear(a, b, compat="lorax", normalize=true)',
    "core_ties(a + b; weights auto)": 'core_ties(a, b, weights="auto")',
    # a number is a weight only if a name follows
    "ties(2 + 3)": "ties(2, 3)",
    "ties(2 - a)": "ties(2, -1*a)",
    "ties(2 2, 3)": "ties(2*2, 3)",
    "ties(2 )": "ties(2)",
    "7b + 13b": "sum(13b, 7b)",
    # names
    "a-b + c": "sum(a-b, c)",
    "org/model:v1.2_x": "sum(org/model:v1.2_x)",
    "2*2": "sum(2*2)",
    "1e5": "sum(1e5)",
    '0.5*"a b" + "ü"': 'sum(0.5*"a b", "\\u00fc")',
    '"plain"': "sum(plain)",
    'ties("a(b)", "c=d, e")': 'ties("a(b)", "c=d, e")',
    "ties(density, seed)": "ties(density, seed)",
    # values
    "svd(a, b, rank=8.0)": "svd(a, b, rank=8)",
    "dare_ties(a, b, seed=9223372036854775807)": "dare_ties(a, b, seed=9223372036854775807)",
    "sum(a, normalize=True)": "sum(a, normalize=true)",
    "sum(a, scale=-2)": "sum(a, scale=-2)",
    "sum(a, scale=-0.0)": "sum(a, scale=0)",
    # patterns of modules are sorted, each once; all modules are the default
    'ties(a, b, modules="*.self_attn.*")': 'ties(a, b, modules="*.self_attn.*")',
    'sum(a, modules="  v_proj q_proj  v_proj ")': 'sum(a, modules="q_proj v_proj")',
    "sum(a, without=lm_head, modules=self_attn)": 'sum(a, modules="self_attn", without="lm_head")',
    'sum(a, modules="*")': "sum(a)",
    'sum(a, modules="q_proj *")': "sum(a)",
    'sum(a, without="*")': 'sum(a, without="*")',
    "sum(a + b; modules self_attn; without layers.0)": 'sum(a, b, modules="self_attn", without="layers.0")',
    'sum(a + b; modules "layers.0 lm_head")': 'sum(a, b, modules="layers.0 lm_head")',
    'sum(a + b; modules "\\u002a.mlp.\\u002a")': 'sum(a, b, modules="*.mlp.*")',
}


@pytest.mark.parametrize("text", MEANINGS, ids=str)
def test_a_text_has_one_canonical_form(text: str) -> None:
    assert canonical(text) == MEANINGS[text]
    assert canonical(MEANINGS[text]) == MEANINGS[text]


def test_the_parts_of_a_call_are_what_it_says() -> None:
    spec = parse('ties(0.7*sql, chat, density=[0.3, 0.7], majority_sign_method="frequency", scale=2)')
    assert spec.strategy == "ties"
    assert spec.sources == (Source("chat", 1.0), Source("sql", 0.7))
    assert spec.names == ("chat", "sql")
    assert spec.weights() == (1.0, 0.7)
    assert spec.per_source("density") == (0.7, 0.3)
    assert spec.option("majority_sign_method") == "frequency"
    assert spec.option("scale") == 2.0


def test_an_option_not_given_has_its_default_for_every_source() -> None:
    spec = parse("ties(a, b)")
    assert spec.option("density") == 0.5
    assert spec.per_source("density") == (0.5, 0.5)
    assert spec.option("elect") == "unweighted"
    assert spec.option("rank") is None


def test_normalized_weights_are_divided_by_their_sum() -> None:
    assert parse("linear(3*a, b, normalize=true)").weights() == (0.75, 0.25)
    assert parse("linear(3*a, b)").weights() == (3.0, 1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ties(a, b)", True),
        ("nosuch(a", True),
        ("a + b", True),
        ("a+b", True),
        ("a - b", True),
        ("0.5*a", True),
        ("-a", True),
        ('"a b"', True),
        ("a", False),
        ("a-b", False),
        ("ties(0.7 a + b; density 0.5)", True),
        ("0.7 a + b", True),
        ("2024 release", False),
        ("7 a", False),
        ("org/model:v1", False),
        ("Qwen2.5-0.5B-Instruct", False),
    ],
)
def test_a_merge_is_told_from_a_plain_name(text: str, expected: bool) -> None:
    assert is_spec(text) is expected


BARE = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_./:-]{0,12}", fullmatch=True)
ANY = st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]), max_size=12)


def is_name(text: str) -> bool:
    """Whether a source may have this name."""
    try:
        checked_name(text)
    except SpecError:
        return False
    return True


NAMES = (BARE | ANY).filter(is_name)
FINITE = st.floats(-1e30, 1e30, allow_subnormal=False)
WEIGHTS = st.just(0.0) | FINITE.filter(lambda w: abs(w) >= 1e-30) | st.integers(-5, 5).map(float)
DENSITIES = st.floats(0, 1, exclude_min=True)
PATTERNS = st.lists(
    st.text(
        st.characters(exclude_categories=["Cc", "Cf", "Cn", "Co", "Cs", "Z"], exclude_characters=","),
        min_size=1,
    ),
    min_size=1,
    max_size=4,
).map(" ".join)
SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "scale": FINITE,
    "normalize": st.booleans(),
    "density": DENSITIES,
    "majority_sign_method": st.sampled_from(["total", "frequency"]),
    "elect": st.sampled_from(["unweighted", "weighted"]),
    "seed": st.integers(0, 2**63 - 1),
    "rank": st.integers(1, 65536),
    "t": st.floats(0, 1),
    "shrink": st.floats(0, 1),
    "compat": st.sampled_from(["none", "lorax"]),
    "gamma": st.floats(0, 1),
    "epsilon": st.floats(0.0, 0.5),
    "select_topk": st.floats(0, 1, exclude_min=True),
    "scope": st.sampled_from(["module", "model"]),
    "weights": st.sampled_from(["given", "auto"]),
    "modules": PATTERNS,
    "without": PATTERNS,
}


@st.composite
def merge_specs(draw: st.DrawFn) -> MergeSpec:
    strategy = draw(st.sampled_from(list(TABLE.values())))
    most = strategy.sources_max or 5
    names = draw(st.lists(NAMES, min_size=strategy.sources_min, max_size=most, unique=True))
    chosen = draw(st.lists(st.sampled_from(strategy.options), unique=True))
    automatic = any(option.name == "weights" for option in chosen)
    sources = tuple(Source(name, 1.0 if automatic else draw(WEIGHTS)) for name in names)
    options: dict[str, Value] = {}
    for option in chosen:
        one = SETTINGS[option.name]
        many = st.tuples(*[one] * len(names))
        options[option.name] = draw(one | many if option.per_source else one)
    try:
        return MergeSpec(strategy.name, sources, tuple(options.items()))
    except SpecError as error:  # what is refused for two options together, each of which is fine
        refused = ("divides by the sum", "density + epsilon", "leave normalize out", 'compat="lorax" changes')
        assume(not any(words in str(error) for words in refused))
        raise


@given(merge_specs())
def test_the_canonical_text_means_the_same_merge(spec: MergeSpec) -> None:
    assert parse(str(spec)) == spec
    assert str(parse(str(spec))) == str(spec)
    assert is_spec(str(spec))
    assert str(spec).isascii()


def gateway_text(spec: MergeSpec) -> str:
    """The merge in the spelling without commas and asterisks; those in quoted text are escaped."""

    def plain(text: str) -> str:
        return json.dumps(text).replace(",", "\\u002c").replace("*", "\\u002a")

    def value(given: Value) -> str:
        if isinstance(given, tuple):
            return "[" + " ".join(map(repr, given)) + "]"
        return plain(given) if isinstance(given, str) else json.dumps(given)

    parts = [f"{abs(source.weight)!r} {plain(source.name)}" for source in spec.sources]
    signs = ["- " if source.weight < 0 else "+ " for source in spec.sources]
    options = [f"; {name} {value(given)}" for name, given in spec.options]
    return f"{spec.strategy}({' '.join(s + p for s, p in zip(signs, parts, strict=True))}{''.join(options)})"


@given(merge_specs())
def test_the_spelling_for_gateways_means_the_same_merge(spec: MergeSpec) -> None:
    text = gateway_text(spec)
    assert not set(text) & {",", "*"}
    assume(len(text) <= MAX_TEXT)
    assert parse(text) == spec
    assert parse(text).digest(dict.fromkeys(spec.names, "1")) == spec.digest(dict.fromkeys(spec.names, "1"))
    assert is_spec(text)


@given(merge_specs())
def test_the_json_form_means_the_same_merge(spec: MergeSpec) -> None:
    assert from_json(json.loads(json.dumps(spec.to_json()))) == spec


@given(merge_specs(), st.randoms())
def test_the_order_of_writing_matters_only_where_the_strategy_says_so(spec: MergeSpec, random: Any) -> None:
    order = list(range(len(spec.sources)))
    random.shuffle(order)
    options = tuple((k, tuple(v[i] for i in order) if isinstance(v, tuple) else v) for k, v in spec.options)
    shuffled = MergeSpec(spec.strategy, tuple(spec.sources[i] for i in order), options)
    ordered = TABLE[spec.strategy].ordered or spec.option("compat") == "lorax"
    assert (shuffled == spec) == (not ordered or order == sorted(order))


Read = Callable[[Any], MergeSpec]


def read_or_refused(read: Read, written: object) -> MergeSpec | None:
    """The merge, or None if it was refused with a message of sensible length."""
    try:
        return read(written)
    except SpecError as error:
        message = str(error)
    assert len(message) < 500
    return None


PIECES = [
    "ties(",
    "sum(",
    ")",
    "a",
    "b",
    "0.5",
    "2",
    "*",
    ",",
    ";",
    "+",
    "-",
    " ",
    "density",
    "=",
    "[",
    "]",
    '"c"',
]
TEXTS = (
    st.text(max_size=60)
    | st.text('abtiesum(),;=+-*.0123[]" \\', max_size=60)
    | st.lists(st.sampled_from(PIECES), max_size=16).map("".join)
)


@given(TEXTS)
def test_any_text_is_a_merge_or_a_spec_error(text: str) -> None:
    spec = read_or_refused(parse, text)
    assert spec is None or parse(str(spec)) == spec


@given(TEXTS)
def test_a_merge_that_could_be_a_plain_name_is_that_name(text: str) -> None:
    spec = read_or_refused(parse, text)
    if spec is not None and not is_spec(text):
        assert spec == MergeSpec("sum", (Source(text.strip()),))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ["ids", "weights", "merge_strategy", "density", "normalize", "nosuch"]


@given(
    JSON | st.dictionaries(st.sampled_from(FIELDS), JSON | st.just(["a", "b"]) | st.sampled_from(list(TABLE)))
)
def test_any_json_is_a_merge_or_a_spec_error(body: object) -> None:
    spec = read_or_refused(from_json, body)
    assert spec is None or from_json(spec.to_json()) == spec


def test_json_takes_the_field_names_of_lorax() -> None:
    body = {
        "ids": ["sql", "chat"],
        "weights": [0.7, 0.3],
        "merge_strategy": "ties",
        "density": 0.3,
        "majority_sign_method": "frequency",
    }
    expected = parse("ties(0.7*sql, 0.3*chat, density=0.3, majority_sign_method=frequency)")
    assert from_json(body) == expected


@pytest.mark.parametrize("strategy", ["linear", "ties", "dare_linear", "dare_ties"])
def test_json_takes_patterns_of_modules_with_every_strategy_of_lorax(strategy: str) -> None:
    body = {"ids": ["a"], "merge_strategy": strategy, "modules": "v_proj q_proj", "without": "layers.0"}
    expected = parse(f'{strategy}(a, modules="q_proj v_proj", without="layers.0")')
    assert from_json(body) == from_json(expected.to_json()) == expected


@pytest.mark.parametrize(
    "absent", [{}, {"weights": None}, {"weights": []}, {"merge_strategy": None, "scale": None}]
)
def test_json_without_weights_and_strategy_is_a_linear_merge_of_weight_one(absent: dict[str, object]) -> None:
    assert from_json({"ids": ["a", "b"], **absent}) == parse("linear(a, b)")


LORAX = ("linear", "ties", "dare_linear", "dare_ties")


@pytest.mark.parametrize("strategy", LORAX)
def test_json_takes_all_fields_of_lorax_with_each_of_its_strategies(strategy: str) -> None:
    used = {option.name for option in TABLE[strategy].options}
    fields: dict[str, Value] = {"density": 0.25, "majority_sign_method": "frequency"}
    expected = MergeSpec(
        strategy,
        (Source("a", 0.7), Source("b", 0.3)),
        tuple((name, value) for name, value in fields.items() if name in used),
    )
    body = {"ids": ["a", "b"], "weights": [0.7, 0.3], "merge_strategy": strategy, **fields}
    assert from_json(body) == expected
    upper = {"merge_strategy": strategy.upper(), "majority_sign_method": "FREQUENCY"}
    assert from_json(body | upper) == expected


@pytest.mark.parametrize("strategy", LORAX)
def test_a_density_of_0_keeps_nothing_as_with_lorax(strategy: str) -> None:
    spec = from_json({"ids": ["a", "b"], "merge_strategy": strategy, "density": 0.0})
    assert spec == parse(f"{strategy}(a, b)" if strategy == "linear" else f"{strategy}(a, b, scale=0)")


def test_a_field_of_lorax_that_its_strategy_uses_still_takes_a_value_per_source() -> None:
    body = {"ids": ["b", "a"], "merge_strategy": "ties", "density": [0.3, 0.7]}
    assert from_json(body) == parse("ties(b, a, density=[0.3, 0.7])")


CONTENTS = {"a": "11", "b": "22"}


def test_the_digest_is_the_same_however_the_merge_is_spelled() -> None:
    expected = parse("ties(a, 0.5*b)").digest(CONTENTS)
    assert parse(" ties(0.50*b,a , density=0.5)").digest(CONTENTS) == expected
    assert (
        from_json({"ids": ["b", "a"], "weights": [0.5, 1], "merge_strategy": "ties"}).digest(CONTENTS)
        == expected
    )
    assert re.fullmatch("[0-9a-f]{32}", expected)


@pytest.mark.parametrize(
    "text",
    ["ties(a, b)", "linear(a, 0.5*b)", "ties(a, 0.5*b, density=0.3)", "ties(a)", "ties(a, 0.5*b, without=x)"],
)
def test_the_digest_changes_with_the_meaning(text: str) -> None:
    assert parse(text).digest(CONTENTS) != parse("ties(a, 0.5*b)").digest(CONTENTS)


@pytest.mark.parametrize("contents", [{"a": "12", "b": "22"}, {"a": "22", "b": "11"}, {"a": "1122", "b": ""}])
def test_the_digest_changes_with_the_content_of_a_source(contents: dict[str, str]) -> None:
    spec = parse("ties(a, 0.5*b)")
    assert spec.digest(contents) != spec.digest(CONTENTS)


def test_the_digest_depends_on_the_sources_alone() -> None:
    spec = parse("ties(a, 0.5*b)")
    assert spec.digest({**CONTENTS, "c": "33"}) == spec.digest(CONTENTS)
    with pytest.raises(UnknownAdapterError, match="source 'b'"):
        spec.digest({"a": "11"})
