"""What the command line says becomes the plugin's settings, or an error."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

import pytest

from merged_lora.vllm_plugin import compat


def parsed(*arguments: str, **more: Any) -> Namespace:
    """The arguments of ``vllm serve`` that the plugin adds, in front of those that it changes."""
    parser = compat._with_flags(lambda parser: parser)(ArgumentParser(exit_on_error=False))
    args: Namespace = parser.parse_args(list(arguments))
    for name, value in ({"additional_config": None, "grpc": False} | more).items():
        setattr(args, name, value)
    return args


def configured(*arguments: str, **more: Any) -> Any:
    """What they leave in ``additional_config``."""
    args = parsed(*arguments, **more)
    compat._with_settings(lambda cls, args: args)(None, args)
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
