"""``merged-lora merge FOLDER... --strategy NAME``: folders as arguments, weights and options by flag."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from making import SMALL, random_adapter
from merged_lora import cli
from merged_lora.adapters import Adapter
from merged_lora.commands import merging
from merged_lora.engine import merge
from merged_lora.recipe import Option
from merged_lora.strategies import TABLE
from running import Run

VALUES: dict[str, list[str]] = {
    "density": ["0.3", "0.7"],
    "gamma": ["0.05", "0.1"],
    "epsilon": ["0.1", "0.2"],
    "majority_sign_method": ["frequency"],
    "elect": ["weighted"],
    "seed": ["9007199254740993"],
    "select_topk": ["0.4"],
    "scope": ["model"],
    "shrink": ["0.5"],
    "t": ["0.25"],
    "scale": ["-2e-1"],
    "normalize": [],
    "compat": ["lorax"],
}
"""For every option with a flag of its own, values other than its default."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: adapters ``a`` and ``b``, and another ``b`` in a folder ``other``."""
    monkeypatch.chdir(tmp_path)
    random_adapter(SMALL, seed=1).save("a")
    random_adapter(SMALL, seed=2).save("b")
    random_adapter(SMALL, seed=3).save("other/b")
    return tmp_path


def digest(spec: str) -> str:
    """The digest of a merge by its spec."""
    return merge(spec, {"a": "a", "b": "b"}).digest


def asked(*arguments: str) -> tuple[str, dict[str, str]]:
    """The spec that arguments ask for, and the place of each source."""
    spec, named = merging._asked(cli.parser().parse_args(["merge", "--output", "out", *arguments]))
    return str(spec), {name: str(place) for name, place in named}


def test_folders_with_flags_are_merged_as_the_spec_is(run: Run, folder: Path) -> None:
    flags = ("--strategy", "ties", "--weights", "1", "0.5", "--density", "0.3")
    code, out, err = run("merge", "b", "a", *flags, "--output", "out")
    assert (code, err) == (0, "")
    assert Adapter.load("out").digest == digest("ties(b, 0.5*a, density=0.3)")
    assert out.startswith("out: ties(0.5*a, b, density=0.3), rank 4, 4 modules, ")


def test_automatic_weights_are_those_of_the_spec(run: Run, folder: Path) -> None:
    assert run("merge", "a", "b", "--strategy", "sum", "--weights", "auto", "--output", "out")[0] == 0
    assert Adapter.load("out").digest == digest('sum(a, b, weights="auto")')


def test_a_rank_is_the_option_of_strategies_that_have_one(run: Run, folder: Path) -> None:
    assert run("merge", "a", "b", "--strategy", "svd", "--rank", "7", "--output", "out")[0] == 0
    assert Adapter.load("out").rank == 7
    assert Adapter.load("out").digest == digest("svd(a, b, rank=7)")
    assert asked("a", "b", "--strategy", "sum", "--rank", "7")[0] == "sum(a, b)"


def test_every_option_has_a_flag_or_another_way() -> None:
    options = {option.name for strategy in TABLE.values() for option in strategy.options}
    assert options == VALUES.keys() | merging.OWN_FLAGS


@pytest.mark.parametrize("strategy", TABLE)
def test_every_option_of_a_strategy_is_given_by_its_flag(strategy: str, folder: Path) -> None:
    flags, written = [], []
    for option in TABLE[strategy].options:
        if option.name not in VALUES or option.name == "compat":
            continue
        values = VALUES[option.name]
        flags += [f"--{option.name.replace('_', '-')}", *values]
        written.append(f"{option.name}={spec_text(option, values)}")
    spec, _ = asked("b", "a", "--strategy", strategy, *flags)
    names = "b, a" if TABLE[strategy].ordered else "a, b"
    if not TABLE[strategy].ordered:  # sorted by name, with the values of each source
        written = [re.sub(r"\[(.+), (.+)\]", r"[\2, \1]", text) for text in written]
    assert spec == f"{strategy}({', '.join([names, *sorted(written)])})"


def spec_text(option: Option, values: list[str]) -> str:
    """The values of an option as a canonical spec writes them."""
    text = {"-2e-1": "-0.2", "weighted": '"weighted"', "frequency": '"frequency"', "model": '"model"'}
    shown = [text.get(value, value) for value in values] or ["true"]
    return f"[{', '.join(shown)}]" if option.per_source else shown[0]


def test_loraxs_arithmetic_is_chosen_by_a_flag(folder: Path) -> None:
    assert asked("b", "a", "--strategy", "ties", "--compat", "lorax")[0] == 'ties(b, a, compat="lorax")'


@pytest.mark.parametrize(
    ("text", "name", "place"),
    [
        ("a", "a", "a"),
        ("a/", "a", "a"),
        ("./other/../a", "a", "other/../a"),
        ("other/b/adapter_model.safetensors", "b", "other/b/adapter_model.safetensors"),
        ("mine=a", "mine", "a"),
        ("hf:org/repo", "repo", "hf:org/repo"),
        ("hf:org/repo@v1.0/sub/last", "last", "hf:org/repo@v1.0/sub/last"),
        ("s3://bucket/adapters/sql", "sql", "s3://bucket/adapters/sql"),
        ("https://host:8443/x/sql/", "sql", "https://host:8443/x/sql/"),
        ("checkpoint-100", "checkpoint-100", "checkpoint-100"),
    ],
)
def test_a_source_is_called_like_the_last_part_of_its_place(
    folder: Path, text: str, name: str, place: str
) -> None:
    assert asked(text, "--strategy", "sum")[1] == {name: place}


def test_the_current_folder_is_called_by_its_name(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("a")
    assert run("merge", ".", "../b", "--strategy", "sum", "--output", "../out")[0] == 0
    assert Adapter.load("../out").metadata["merged_lora.spec"] == "sum(a, b)"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--strategy", "ties", "--weights", "1", "0.5", "b", "a"),
        ("--strategy", "ties", "b", "a", "--weights", "1", "0.5"),
        ("--weights", "1", "0.5", "b", "a", "--strategy", "ties"),
        ("--strategy", "ties", "--weights", "1", "0.5", "--", "b", "a"),
    ],
)
def test_flags_may_be_on_either_side_of_the_folders(folder: Path, arguments: tuple[str, ...]) -> None:
    assert asked(*arguments) == ("ties(0.5*a, b)", {"a": "a", "b": "b"})


def test_folders_may_follow_automatic_weights_and_switches(folder: Path) -> None:
    assert asked("--strategy", "sum", "--weights", "auto", "b", "a")[0] == 'sum(a, b, weights="auto")'
    assert asked("--strategy", "sum", "--normalize", "b", "a")[0] == "sum(a, b, normalize=true)"


@pytest.mark.parametrize(
    ("text", "weight"), [("-0.5", "-0.5"), ("-1e-3", "-0.001"), ("-.5", "-0.5"), ("-2", "-2")]
)
def test_a_weight_may_be_negative(folder: Path, text: str, weight: str) -> None:
    spec, _ = asked("a", "b", "--strategy", "sum", "--weights", text, "1")
    assert spec == f"sum({weight}*a, b)"


def test_a_folder_with_a_dash_in_front_is_named_behind_two_dashes(run: Run, folder: Path) -> None:
    random_adapter(SMALL, seed=2).save("-b")
    code, _, err = run("merge", "--strategy", "sum", "--output", "out", "--", "a", "-b")
    assert code == 2
    assert "the name '-b' reads as a merge; take another name; name the source: NAME=PATH" in err
    assert run("merge", "--strategy", "sum", "--output", "out", "--", "a", "b=-b")[0] == 0
    assert Adapter.load("out").digest == digest("a + b")


MISTAKES: dict[str, tuple[list[str], str]] = {
    "two folders of one name": (
        ["b", "other/b", "--strategy", "sum"],
        "b and other/b would both be called 'b'; name them: NAME=PATH",
    ),
    "one name twice": (["x=a", "x=b", "--strategy", "sum"], "x=a and x=b would both be called 'x'"),
    "a weight too few": (
        ["a", "b", "--strategy", "ties", "--weights", "1"],
        "--weights has 1 value for 2 sources; give one for each",
    ),
    "a weight too many": (
        ["a", "b", "--strategy", "ties", "--weights", "1", "2", "3"],
        "--weights has 3 values for 2 sources",
    ),
    "automatic weights and a number": (
        ["a", "b", "--strategy", "ties", "--weights", "auto", "1"],
        "--weights takes a number for each source, or auto alone; 'auto' is neither",
    ),
    "a weight that is no number": (
        ["a", "b", "--strategy", "ties", "--weights", "1", "half"],
        "or auto alone; 'half' is neither",
    ),
    "a density too many": (
        ["a", "b", "--strategy", "ties", "--density", "0.3", "0.4", "0.5"],
        "ties: density has 3 values for 2 sources",
    ),
    "an epsilon too many": (
        ["a", "b", "--strategy", "della", "--epsilon", "0.1", "0.1", "0.2"],
        "della: epsilon has 3 values for 2 sources",
    ),
    "a word for a number": (
        ["a", "b", "--strategy", "slerp", "--t", "half"],
        "t must be a number, got 'half'",
    ),
    "another strategy's option": (
        ["a", "b", "--strategy", "linear", "--select-topk", "0.5"],
        "--select-topk does not go with linear, which takes --compat, --weights, --scale, --normalize",
    ),
    "a strategy that does not exist": (
        ["a", "b", "--strategy", "tie"],
        "unknown strategy 'tie'; did you mean ties?",
    ),
    "a spec beside a strategy": (
        ["ties(a, b)", "--strategy", "ties"],
        "ties(a, b) is no folder; --strategy goes with folders, and a spec has its strategy in itself",
    ),
    "adapters beside a strategy": (
        ["a", "b", "--strategy", "ties", "--adapter", "a=a"],
        "with --strategy, the sources are given without --adapter",
    ),
    "weights beside a spec": (
        ["a + b", "--adapter", "a=a", "--adapter", "b=b", "--weights", "1", "2"],
        "--weights goes with --strategy and folders; a spec holds its options and weights itself",
    ),
    "an option beside a spec": (
        ["a + b", "--adapter", "a=a", "--adapter", "b=b", "--select-topk", "1"],
        "--select-topk goes with --strategy and folders",
    ),
    "folders without a strategy": (["a", "b"], "folders are merged with --strategy NAME"),
    "nothing to merge": (["--strategy", "ties"], "with --strategy, the folders of the sources"),
    "nothing at all": ([], "say what to merge: a SPEC, or folders and --strategy"),
    "sources in two places": (
        ["--strategy", "ties", "--weights", "1", "0.5", "a", "--density", "0.3", "b"],
        "the sources are in several places, and their order counts",
    ),
    "no such folder": (["a", "nowhere", "--strategy", "sum"], "nowhere: no such adapter folder"),
    "a location that is none": (["hf:org", "--strategy", "sum"], "is not of the form hf:org/repo"),
    "one source for two": (["a", "--strategy", "slerp"], "slerp takes exactly 2 sources, got 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_on_stderr_and_nothing_is_written(run: Run, folder: Path, mistake: str) -> None:
    arguments, message = MISTAKES[mistake]
    code, out, err = run("merge", "--output", "out", *arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"merged-lora: error: [^\n]+\n", err)
    assert message in err
    assert not Path("out").exists()


def test_a_folder_called_like_a_merge_takes_a_name(run: Run, folder: Path) -> None:
    random_adapter(SMALL, seed=2).save("ties(x)")
    code, _, err = run("merge", "a", "ties(x)", "--strategy", "sum", "--output", "out")
    assert code == 2
    assert "the name 'ties(x)' reads as a merge; take another name; name the source: NAME=PATH" in err
    assert run("merge", "a", "b=ties(x)", "--strategy", "sum", "--output", "out")[0] == 0
    assert Adapter.load("out").digest == digest("a + b")
