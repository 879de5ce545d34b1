"""The command line becomes the plugin's settings, or an error."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentError, ArgumentParser, Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from merged_lora.errors import MergeError
from merged_lora.vllm_plugin.hooks import command_line
from merged_lora.vllm_plugin.settings import FLAGS, Settings, parse_alias


def parsed(*arguments: str, **more: Any) -> Namespace:
    """Parsed flags of the plugin, with the arguments of vLLM that it changes."""
    parser = command_line.wrap_add_cli_args(lambda parser: parser)(ArgumentParser(exit_on_error=False))
    args: Namespace = parser.parse_args(list(arguments))
    for name, value in ({"additional_config": None, "grpc": False} | more).items():
        setattr(args, name, value)
    return args


def configured(*arguments: str, **more: Any) -> Any:
    """The ``additional_config`` that these arguments lead to."""
    args = parsed(*arguments, **more)
    command_line.wrap_from_cli_args(lambda cls, args: args)(None, args)
    return args.additional_config


def test_backend_and_memory_travel_with_the_rest() -> None:
    flags = ("--merged-lora-backend", "cpu", "--merged-lora-gpu-gib", "0.5")
    assert configured("--enable-merged-lora", *flags, additional_config={"other": 1}) == {
        "other": 1,
        "merged_lora": {"enable": True, "aliases": {}, "backend": "cpu", "gpu_gib": 0.5},
    }


def test_what_is_not_given_is_not_set() -> None:
    assert configured("--enable-merged-lora") == {"merged_lora": {"enable": True, "aliases": {}}}
    assert configured() is None


def test_a_file_may_say_what_a_flag_does_not() -> None:
    given = {"merged_lora": {"enable": True, "gpu_gib": 2}}
    config = configured("--enable-merged-lora", "--merged-lora-backend", "numpy", additional_config=given)
    assert config["merged_lora"] == {"enable": True, "aliases": {}, "backend": "numpy", "gpu_gib": 2.0}


@pytest.mark.parametrize("flag", [("backend", "cpu"), ("gpu-gib", "2"), ("modules", "mix=sum(a, b)")])
def test_a_flag_without_the_plugin_is_an_error(flag: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=f"--merged-lora-{flag[0]} needs --enable-merged-lora"):
        configured(f"--merged-lora-{flag[0]}", flag[1])


def test_two_answers_to_one_question_are_an_error() -> None:
    given = {"merged_lora": {"backend": "numpy"}}
    with pytest.raises(ValueError, match="--merged-lora-backend says cpu, additional_config numpy"):
        configured("--enable-merged-lora", "--merged-lora-backend", "cpu", additional_config=given)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "much"])
def test_a_size_that_is_none_is_refused_where_it_is_read(value: str) -> None:
    with pytest.raises(Exception, match="GiB"):
        parsed("--merged-lora-gpu-gib", value)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("source-dir", "/nope", "must be a folder that exists, got '/nope'"),
        ("max-sources", "999", "must be a whole number from 1 to 256, got '999'"),
        ("max-sources", "2.5", "must be a whole number from 1 to 256, got '2.5'"),
        (
            "allow",
            "s3://*",
            "must be a location, such as hf:org/repo, or the beginning of one with a * behind its last "
            "slash, such as hf:org/*, s3://bucket/adapters/* or https://host/*, got 's3://*'",
        ),
        ("vllm", "all", 'must be "any" or "tested", got \'all\''),
        ("modules", "mix", "must be NAME=SPEC, got 'mix'"),
    ],
)
def test_the_command_line_says_what_a_value_must_be(flag: str, value: str, message: str) -> None:
    with pytest.raises(ArgumentError) as refused:
        parsed(f"--merged-lora-{flag}", value)
    assert str(refused.value) == f"argument --merged-lora-{flag}: {message}"


def test_what_was_said_once_is_not_said_again_in_another_process() -> None:
    args = parsed(
        "--enable-merged-lora", "--merged-lora-modules", "mix=sum(a, b)", "--merged-lora-max-sources", "3"
    )
    for _ in range(2):  # as in the process that starts API servers, then in each of them
        command_line.wrap_from_cli_args(lambda cls, args: args)(None, args)
    settings = Settings.of(args.additional_config)
    assert (list(settings.aliases), settings.max_sources) == (["mix"], 3)


def test_several_patterns_are_allowed_together_and_are_an_affair_of_api_servers() -> None:
    patterns = ("hf:org/*", "https://host/x/*", "hf:org/*")
    config = configured("--enable-merged-lora", "--merged-lora-allow", *patterns)
    assert Settings.of(config).allow == patterns[:2]
    assert Settings.of({"merged_lora": {"allow": list(patterns)}}).allow == patterns[:2]
    assert Settings.of(config).to_config(api_server=False) == {"enable": True}
    with pytest.raises(MergeError, match='"allow" must be patterns'):
        Settings.of({"merged_lora": {"allow": 7}})


def test_replays_are_an_affair_of_api_servers() -> None:
    config = configured("--enable-merged-lora", "--merged-lora-check")
    assert Settings.of(config).check
    assert Settings.of(config).to_config(api_server=False) == {"enable": True}


def test_api_servers_share_a_file_where_aliases_may_change() -> None:
    config = configured("--enable-merged-lora", "--merged-lora-runtime-aliases")["merged_lora"]
    store = Path(config["alias_store"])
    assert store.parent.stat().st_mode & 0o777 == 0o700
    assert Settings.of({"merged_lora": config}).alias_store == str(store)
    assert "alias_store" not in configured("--enable-merged-lora")["merged_lora"]


def test_workers_know_how_many_sources_they_need_room_for() -> None:
    settings = Settings(enable=True, max_sources=3, max_waiting=5)
    assert settings.to_config(api_server=False) == {"enable": True, "max_sources": 3}


def test_every_flag_says_its_default() -> None:
    defaults = Settings()
    for flag in FLAGS:
        value = getattr(defaults, flag.key)
        assert flag.default == value
        if value not in (None, False, ()):
            written = f"{value:.0f}" if isinstance(value, float) else str(value)
            assert re.search(rf"\b{written}\b", flag.help), flag.key


def test_settings_travel_and_leave_behind_what_is_not_for_an_engine(tmp_path: Path) -> None:
    config = {"enable": True, "aliases": {"mix": "ties(b, a)"}, "source_dir": str(tmp_path), "cache_gib": 2}
    settings = Settings.of({"merged_lora": config})
    assert settings.enable
    assert str(settings.aliases["mix"]) == "ties(a, b)"
    assert settings.to_config(api_server=False) == {"enable": True, "cache_gib": 2.0}
    assert Settings.of({"merged_lora": settings.to_config(api_server=True)}) == settings
    assert not Settings.of({}).enable
    assert not Settings.of(None).enable


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"enabled": True}, "some of: enable, aliases"),
        ({"enable": "yes"}, "true or false"),
        ({"aliases": ["mix"]}, "an object"),
        ({"aliases": {"mix": 7}}, "'mix'"),
        (5, "an object"),
        ({"backend": "cuda"}, "must be one of auto, triton, cpu, numpy, got 'cuda'"),
        ({"backend": ["triton"]}, "one of auto"),
        ({"gpu_gib": 0}, "\"gpu_gib\" must be a number of GiB above 0, got '0'"),
        ({"cache_gib": True}, "a number"),
        ({"cache_gib": float("nan")}, "above 0"),
        ({"max_sources": 257}, "\"max_sources\" must be a whole number from 1 to 256, got '257'"),
        ({"max_strength": 0.5}, "must be a number of at least 1, got '0.5'"),
        ({"max_strength": float("inf")}, "a number of at least 1"),
        ({"max_strength": True}, "a number of at least 1"),
        ({"max_strength": "much"}, "a number of at least 1"),
        ({"max_ad_hoc": -1}, "whole number from 0"),
        ({"max_waiting": 1.5}, "whole number"),
        ({"max_spec_length": "many"}, "whole number"),
        ({"source_dir": "/no/such/folder"}, "must be a folder that exists, got '/no/such/folder'"),
        ({"source_dir": "a\0b"}, "a folder that exists"),
        ({"runtime_aliases": 1}, "true or false"),
        ({"check": 1}, "true or false"),
        ({"aliases": {"ties(a, b)": "sum(a)"}}, "'ties\\(a, b\\)' reads as a merge; take another name"),
        ({"aliases": {"a\u200b": "sum(a)"}}, "invisible character, U\\+200B"),
        ({"aliases": {"check": "sum(a)"}}, "POST /v1/merged_lora/check is a route; take another name"),
    ],
)
def test_malformed_settings_are_refused(given: object, words: str) -> None:
    with pytest.raises(MergeError, match=words):
        Settings.of({"merged_lora": given})


@pytest.mark.parametrize(
    "text", ["mix", "=ties(a, b)", "mix=ties(a", "../mix=ties(a, b)", "mix=nothing(a)", "a+b=sum(c)"]
)
def test_a_malformed_alias_is_refused(text: str) -> None:
    with pytest.raises(MergeError):
        parse_alias(text)


def test_a_library_that_an_allowed_place_needs_is_missed_where_the_flag_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    missing = r"s3://bucket/\* needs s3fs, which is not installed; pip install 'vllm-merged-lora\[s3\]'$"
    with pytest.raises(ArgumentError, match=missing):
        parsed("--merged-lora-allow", "https://host/*", "s3://bucket/*")
    with pytest.raises(MergeError, match=missing):
        Settings.of({"merged_lora": {"allow": ["s3://bucket/*"]}})
    assert parsed("--merged-lora-allow", "https://host/*").merged_lora_allow == [("https://host/*",)]


ALIAS = ("--enable-merged-lora", "--merged-lora-modules", "team=sum(sql, tone)")


@pytest.mark.parametrize("names", [(), ("sql", "chat")])
def test_an_alias_of_an_adapter_that_is_not_served_is_found_before_the_engine_starts(
    names: tuple[str, ...],
) -> None:
    modules = [SimpleNamespace(name=name, path=f"/adapters/{name}") for name in names]
    unknown = "tone" if names else "sql"
    with pytest.raises(ValueError, match=rf"^--merged-lora-modules team: unknown adapter '{unknown}'; serve"):
        configured(*ALIAS, lora_modules=modules or None)


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ((), ("sql", "tone")),
        (("--merged-lora-source-dir", "/"), ("sql",)),
        (("--merged-lora-allow", "hf:org/*"), ("sql",)),
    ],
)
def test_an_alias_whose_adapters_are_served_or_may_be_found_later_is_taken(
    more: tuple[str, ...], names: tuple[str, ...]
) -> None:
    modules = [SimpleNamespace(name=name, path=f"/adapters/{name}") for name in names]
    assert configured(*ALIAS, *more, lora_modules=modules)["merged_lora"]["aliases"].keys() == {"team"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bucket/sql", r"s3://bucket/sql needs s3fs, .*\[s3\]'$"),
        ("s3:///sql", "location 's3:///sql' names no bucket; the name of one has"),
    ],
)
def test_an_adapter_that_cannot_be_fetched_is_found_before_the_engine_starts(
    monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    modules = [SimpleNamespace(name="chat", path="/adapters/chat"), SimpleNamespace(name="sql", path=path)]
    with pytest.raises(ValueError, match=f"^--lora-modules sql: {message}"):
        configured("--enable-merged-lora", lora_modules=modules)
    assert configured(lora_modules=modules) is None
