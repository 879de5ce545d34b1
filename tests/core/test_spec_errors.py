"""What the grammar refuses: every message says what is wrong and what to write instead."""

import json
import math
import re

import pytest

from merged_lora.errors import MergeError, SpecError, UnknownStrategyError
from merged_lora.names import MAX_NAME
from merged_lora.spec import MAX_SOURCES, MAX_TEXT, MergeSpec, Source, from_json, parse
from merged_lora.strategies import TABLE
from running import within_a_second

REFUSALS = {
    # unknown strategy or option: the message lists what there is
    "tie(a, b)": "unknown strategy 'tie'; did you mean ties? There are: sum, cat, svd, slerp, nuslerp,",
    "tie(a b": "unknown strategy 'tie'; did you mean ties? There are:",
    "KNOTS(a, b)": "unknown strategy 'KNOTS'; did you mean knots? There are:",
    "core-ties(a, b)": "unknown strategy 'core-ties'; did you mean core_ties? There are:",
    "weighted(a, b)": "unknown strategy 'weighted'; there are: sum,",
    "a/b(c)": "unknown strategy 'a/b'; there are: sum,",
    "knots(a, b, rank=8)": "normalize, modules, without; its rank is the sum of the sources', or the limit",
    "ties(a, b, rank=8)": "ties takes no option 'rank'; it takes: density",
    "ties(a, b, weights=[1, 2])": "not a list; write a source's weight before its name: 0.5*a",
    "ties(a, b, desnity=0.5)": "ties takes no option 'desnity'; it takes: density, majority_sign_method,",
    "linear(a, b, density=0.5)": "linear takes no option 'density'; it takes: compat, weights,",
    # numbers out of range
    "nan*a + b": "a weight must be a finite number, got nan",
    "ties(inf*a, b)": "a weight must be a finite number, got inf",
    "ties(a, density=0)": "ties: density must be over 0 and at most 1, got 0",
    "ties(a, density=1.1)": "ties: density must be over 0 and at most 1, got 1.1",
    "ties(a, density=1e999)": "ties: density must be a finite number, got inf",
    "ties(a, density=nan)": "ties: density must be a number, got 'nan'",
    "ties(a, density=half)": "ties: density must be a number, got 'half'",
    "ties(a, density=true)": "ties: density must be a number, got True",
    "sum(a, scale=1e999)": "sum: scale must be a finite number, got inf",
    "slerp(a, b, t=1.5)": "slerp: t must be between 0 and 1, got 1.5",
    "svd(a, rank=0)": "svd: rank must be a whole number from 1 to 65536, got 0",
    "svd(a, rank=1.5)": "svd: rank must be a whole number from 1 to 65536, got 1.5",
    "dare_ties(a, seed=9223372036854775808)": "seed must be a whole number from 0 to 9223372036854775807",
    "dare_ties(a, seed=-1)": "seed must be a whole number from 0",
    "ties(a, majority_sign_method=most)": 'majority_sign_method must be "total" or "frequency", got \'most\'',
    "sum(a, normalize=1)": "sum: normalize must be true or false, got 1",
    "1e31*a": "the weight of 'a' must be 0 or a number of size 1e-30 to 1e30",
    "1e-31*a": "the weight of 'a' must be 0 or a number of size 1e-30 to 1e30",
    "1e999*a": "the weight of 'a' must be 0 or a number of size 1e-30 to 1e30",
    "nano*a": "write the weight before the name",
    # lists
    "ties(a, b, density=[0.3])": "ties: density has 1 values for 2 sources",
    "ties(a, b, density=[])": "ties: density has 0 values for 2 sources",
    "ties(a, b, density=[0.3, 2])": "ties: density must be over 0 and at most 1, got 2",
    "sum(a, b, scale=[1, 2])": "sum: scale takes one value, not a list",
    "ties(a, b, density=[0.3 0.7])": "expected ',' or ']'",
    "ties(a, b, density=[x])": "expected a number, found 'x])'",
    # patterns of modules
    'sum(a, modules="")': "sum: modules must be 1 to 64 patterns of module names with a space between them",
    'sum(a, without="q_proj,v_proj")': "with a space between them, and no comma, got 'q_proj,v_proj'",
    'sum(a, without="a\\u0000b")': "sum: without must be patterns of module names",
    "sum(a, modules=3)": "sum: modules must be text: patterns of module names",
    "sum(a, modules=*.q_proj)": "a value (in double quotes, unless it is a word or a number), found '*.q_",
    "sum(a, b, modules=[1, 2])": 'not a list; write all patterns in one text: "q_proj v_proj"',
    # the number of sources
    "slerp(a)": "slerp takes exactly 2 sources, got 1",
    "slerp(a, b, c)": "slerp takes exactly 2 sources, got 3",
    "ties()": "ties takes at least 1 source, got 0",
    "ties(a, 0.5*a)": "source 'a' is named more than once; give it one weight",
    'a + "a"': "source 'a' is named more than once; give it one weight",
    "ties(a, density=0.3, density=0.4)": "option 'density' is given twice; give it once",
    "linear(a, -1*b, normalize=true)": "normalize=true divides by the sum of the weights, which is 0",
    # syntax, with the place and what was expected there
    "": "at character 1 of the spec: expected an adapter's name, found the end",
    "ties(a, b": "at character 10 of the spec: expected ',' or ')', found the end",
    "ties(a b)": "at character 8 of the spec: expected ',' or ')', found 'b)'",
    "ties(a, b) + c": "at character 12 of the spec: expected the end, found '+ c'",
    "ties(a, density=0.3, b)": "expected an option (sources come before options), found 'b)'",
    "ties(a, density=)": "expected a value, found ')'",
    "a -b": "expected '+', or '-' with white space around it, between terms, found '-b'",
    "a b": "expected '+', or '-' with white space around it, between terms, found 'b'",
    "a + ": "expected an adapter's name, found the end",
    "a + - b": "expected an adapter's name, found '- b'",
    "0.5 a": "expected '+'",
    "2024 release": "at character 6 of the spec: expected '+', or '-' with white space around it",
    "0.5 sql": "between terms (a weight is written 0.5*a), found 'sql'",
    "ties(.5a, b)": "expected an adapter's name (a weight is written 0.5*a), found '.5a, b)'",
    "a 5": "white space around it, between terms, found '5'",
    # the spelling without commas and asterisks
    "ties(a + b, c)": "at character 11 of the spec: expected '+', '-' with white space around it, ';' or ')' "
    "(',' does not go with '+' and ';'), found ', c)'",
    "ties(a + b, density=0.3)": "';' or ')' (',' does not go with '+' and ';'), found ', density=0.3)'",
    "ties(a, b + c)": "at character 11 of the spec: expected ',' or ')' ('+' and ';' do not go with ',')",
    "ties(a, b; density 0.3)": "at character 10 of the spec: expected ',' or ')' ('+' and ';' do not go",
    "ties(a, density=0.3; scale 2)": "at character 20 of the spec: expected ',' or ')' ('+' and ';' do not",
    "ties(a + b; density)": "at character 13 of the spec: expected an option and its value, found 'density)'",
    "ties(a + b; density=)": "at character 21 of the spec: expected a value, found ')'",
    "ties(a + b; density 0.3 scale 2)": "at character 25 of the spec: expected ';' or ')', found 'scale 2)'",
    "ties(a + b; density 0.3; density 0.3)": "option 'density' is given twice; give it once",
    "ties(a; b)": "at character 9 of the spec: expected an option and its value, found 'b)'",
    "ties(a;;)": "at character 8 of the spec: expected an option and its value, found ';)'",
    "ties(; density 0.3)": "at character 6 of the spec: expected an adapter's name, found '; density 0.3)'",
    "ties(a + b; density 0.3": "at character 24 of the spec: expected ';' or ')', found the end",
    "ties(a + -b)": "at character 10 of the spec: expected an adapter's name, found '-b)'",
    "ties(a -b)": "at character 8 of the spec: expected '+', '-' with white space around it, ';' or ')'",
    "ties(1 2 a)": "at character 10 of the spec: expected ',' or ')', found 'a)'",
    "ties(a + b; density [0.3-0.7])": "at character 25 of the spec: expected ',' or ']', found '-0.7])'",
    "ties(a + sum(b); scale 2)": "'sum' is used as a merge within a merge; merge it first",
    "a*0.5": "write the weight before the name: 0.5*a",
    "0.7*a-0.3*b": "a '-' between terms needs white space around it ('a-0.3' was read as one name)",
    "ties(sum(a, b), c)": "'sum' is used as a merge within a merge; merge it first and name the result",
    '"a': "expected an adapter's name",
    '"\\q"': "is not a JSON string",
    # names
    "../x + a": "expected an adapter's name, found '../x + a'",
    "a/../b": "adapter name 'a/../b' is a path; use the name under which the adapter is registered",
    '"../x"': "adapter name '../x' is a path",
    '"a\\\\..\\\\b"': "is a path",
    '"/etc/passwd"': "adapter name '/etc/passwd' is a path",
    '"~/x"': "adapter name '~/x' is a path",
    '"\\\\\\\\host"': "is a path",
    "/etc/passwd": "expected an adapter's name, found '/etc/passwd'",
    '"a\\u0000b"': "adapter name 'a\\x00b' holds a control character",
    '"a\\nb"': "holds a control character",
    '"\\u007f"': "holds a control character",
    '"\\ud800"': "holds a control character",
    '"sq\u202el"': "adapter name 'sq\\u202el' holds an invisible character, U+202E",
    '"sql\\u200b"': "adapter name 'sql\\u200b' holds an invisible character, U+200B",
    '"\\u3164"': "holds an invisible character, U+3164",
    "a\0b": "expected '+'",
    '""': "an adapter's name has 1 to 256 characters, '' has 0",
}


@pytest.mark.parametrize("text", REFUSALS, ids=repr)
def test_a_malformed_spec_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(SpecError, match=re.escape(REFUSALS[text])):
        parse(text)


def test_an_unknown_strategy_has_its_own_kind() -> None:
    with pytest.raises(UnknownStrategyError):
        parse("tie(a, b)")
    with pytest.raises(UnknownStrategyError):
        MergeSpec("tie", (Source("a"),))
    with pytest.raises(UnknownStrategyError):
        from_json({"ids": ["a"], "merge_strategy": "tie"})


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 10**400])
def test_a_weight_is_a_finite_number(weight: float) -> None:
    with pytest.raises(SpecError, match="the weight of 'a' must be"):
        MergeSpec("sum", (Source("a", weight),))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
@pytest.mark.parametrize(
    ("strategy", "option"),
    [(s.name, o.name) for s in TABLE.values() for o in s.options],
)
def test_no_option_takes_a_number_that_is_not_finite(strategy: str, option: str, value: float) -> None:
    names = [Source("a"), Source("b")]
    with pytest.raises(SpecError, match=f"{strategy}: {option} must be"):
        MergeSpec(strategy, tuple(names), ((option, value),))


@pytest.mark.parametrize(
    "text",
    [
        "a" * 100_000,
        "ties(" + "a, " * 40_000 + "a)",
        "(" * 10_000,
        "ties(" + "(" * 10_000 + ")" * 10_000,
        "ties(" + "(" * (MAX_TEXT - 10),
        "ties(" * (MAX_TEXT // 5),
        "a + " * (MAX_TEXT // 4),
        "-" * MAX_TEXT,
        "9" * MAX_TEXT,
        '"' + "\\" * (MAX_TEXT - 2),
        "ties(a, density=" + "[" * (MAX_TEXT - 20),
        "ties(a, seed=" + "9" * (MAX_TEXT - 20),
        " " * MAX_TEXT,
    ],
    ids=lambda text: f"{text[:12]}... {len(text)}",
)
def test_a_hostile_text_is_refused_at_once_with_a_short_message(text: str) -> None:
    # One pass over 2,048 characters takes well under a millisecond.
    with within_a_second(text[:64]), pytest.raises(SpecError) as caught:
        parse(text)
    assert len(str(caught.value)) < 500


def test_sizes_are_limited_and_the_limits_themselves_are_taken() -> None:
    names = [f"n{i}" for i in range(MAX_SOURCES)]
    assert parse(f"ties({', '.join(names)})").names == tuple(sorted(names))
    with pytest.raises(SpecError, match=f"257 sources; a merge takes at most {MAX_SOURCES}"):
        parse(f"ties({', '.join([*names, 'more'])})")
    assert parse("n" * MAX_NAME).names == ("n" * MAX_NAME,)
    with pytest.raises(SpecError, match=f"1 to {MAX_NAME} characters, 'n+...' has 257"):
        parse("n" * (MAX_NAME + 1))
    padded = "ties(a, b)".ljust(MAX_TEXT)
    assert parse(padded) == parse("ties(a, b)")
    with pytest.raises(SpecError, match=f"{MAX_TEXT + 1} characters; at most {MAX_TEXT} are accepted"):
        parse(padded + " ")


def test_a_merge_whose_canonical_text_could_not_be_read_back_is_refused() -> None:
    names = [chr(0x1F600 + i) * MAX_NAME for i in range(24)]  # every character is escaped as 12
    with pytest.raises(SpecError, match=f"characters; at most {MAX_TEXT} are accepted"):
        from_json({"ids": names})


def test_every_refusal_is_a_merge_error() -> None:
    assert issubclass(SpecError, MergeError)
    assert issubclass(UnknownStrategyError, SpecError)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "must be an object like"),
        ("ties(a, b)", "must be an object like"),
        ({}, '"ids" must be a list of adapter names'),
        ({"ids": "ab"}, '"ids" must be a list of adapter names'),
        ({"ids": [1]}, '"ids" must be a list of adapter names'),
        ({"ids": []}, "takes at least 1 source, got 0"),
        ({"ids": ["a", "b"], "weights": [1]}, '"weights" has 1 values for 2 ids'),
        ({"ids": ["a"], "weights": "1"}, '"weights" must be a list of numbers'),
        ({"ids": ["a"], "weights": ["1"]}, '"weights" must hold numbers only'),
        ({"ids": ["a"], "weights": [True]}, '"weights" must hold numbers only'),
        ({"ids": ["a"], "weights": [math.nan]}, "weight of 'a' must be 0 or a number"),
        ({"ids": ["a"], "weights": [10**400]}, "weight of 'a' must be 0 or a number"),
        ({"ids": ["a"], "merge_strategy": 3}, '"merge_strategy" must be one of sum, cat'),
        ({"ids": ["a"], "merge_strategy": "sum", "density": 0.5}, "sum takes no option 'density'"),
        ({"ids": ["a"], "epsilon": 0.5}, "linear takes no option 'epsilon'; it takes: compat, weights"),
        ({"ids": ["a"], "density": -0.1}, '"density" must be a number from 0 to 1, got -0.1'),
        ({"ids": ["a"], "density": 1.5}, '"density" must be a number from 0 to 1, got 1.5'),
        ({"ids": ["a"], "density": math.nan}, '"density" must be a number from 0 to 1, got nan'),
        ({"ids": ["a"], "density": True}, '"density" must be a number from 0 to 1, got True'),
        ({"ids": ["a"], "density": [0.5]}, '"density" must be a number from 0 to 1, got [0.5]'),
        ({"ids": ["a"], "majority_sign_method": "most"}, '"majority_sign_method" must be "total" or'),
        ({"ids": ["a"], "majority_sign_method": ["total"]}, '"majority_sign_method" must be "total" or'),
        (
            {"ids": ["a"], "merge_strategy": "dare_linear", "majority_sign_method": 1},
            '"total" or "frequency"',
        ),
        ({"ids": ["a"], "merge_strategy": "ties", "density": 1.5}, "density must be over 0 and at most 1"),
        ({"ids": ["a"], "merge_strategy": "TIES_SVD"}, "unknown strategy 'TIES_SVD'"),
        ({"ids": ["a"], "scale": {"x": 1}}, "scale must be a number, got {'x': 1}"),
        ({"ids": ["a"], "scale": [1]}, "scale takes one value, not a list"),
        ({"ids": ["a"], "modules": ["q_proj"]}, "modules takes one value, not a list; write all patterns"),
        ({"ids": ["a"], "without": " ".join(map(str, range(65)))}, "without must be 1 to 64 patterns"),
        ({"ids": ["a"], "merge_strategy": "ties", "density": [[0.5]]}, "density must be a number, got [0.5]"),
    ],
)
def test_malformed_json_is_refused_with_a_reason(body: object, message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        from_json(body)


@pytest.mark.parametrize("option", ["density", "seed", "compat", "ids", "weights", "merge_strategy"])
def test_json_of_any_depth_that_python_can_read_is_refused_without_a_crash(option: str) -> None:
    for depth in range(900, 1000):
        try:
            body = json.loads(
                f'{{"ids": ["a"], "merge_strategy": "dare_ties", "{option}": {"[" * depth}{"]" * depth}}}'
            )
        except RecursionError:
            break
        with pytest.raises(SpecError):
            from_json(body)


def test_weights_that_cancel_but_for_rounding_cannot_be_normalised() -> None:
    with pytest.raises(SpecError, match="sum of the weights, which is 0"):
        parse("linear(0.1*a, 0.2*b, -0.3*c, normalize=true)")


@pytest.mark.parametrize("text", [None, 3, b"ties(a, b)", ["a"]])
def test_a_spec_of_another_type_is_refused_by_name(text: object) -> None:
    with pytest.raises(SpecError, match=f"a spec is text, not {type(text).__name__}"):
        parse(text)  # type: ignore[arg-type]
