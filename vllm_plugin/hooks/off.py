"""The command line of a vLLM on which the plugin stays off: it refuses the plugin's flags with a reason."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from merged_lora.vllm_plugin.settings import KEY

from .command_line import given_flags, wrap_add_cli_args
from .wrapping import wrap_method

_INSTALLED = "merged_lora_off"


def install(reason: str) -> None:
    """Let ``EngineArgs`` take the plugin's flags and refuse them, once per process."""
    if hasattr(EngineArgs, _INSTALLED):
        return
    setattr(EngineArgs, _INSTALLED, reason)

    def refusing(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def from_cli_args(cls: Any, args: Any, *more: Any, **named: Any) -> Any:
            if getattr(args, "enable_merged_lora", False) or given_flags(args):
                raise ValueError(reason)
            return original(cls, args, *more, **named)

        return from_cli_args

    def checking(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            config = (getattr(self, "additional_config", None) or {}).get(KEY)
            if isinstance(config, dict) and config.get("enable"):
                raise ValueError(reason)
            return original(self, *args, **kwargs)

        return create_engine_config

    wraps = {"add_cli_args": wrap_add_cli_args, "from_cli_args": refusing, "create_engine_config": checking}
    for name, wrap in wraps.items():
        if name in vars(EngineArgs):  # a missing one may be why the plugin stays off
            wrap_method(EngineArgs, name, wrap)
