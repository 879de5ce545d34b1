"""What the plugin finds on the vLLM that is imported, and what it does where it does not fit, as JSON.

A program, because each case needs vLLM's plugins to be loaded where they have left no trace yet.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from importlib.metadata import entry_points, version
from typing import Any

import vllm
import vllm.plugins
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser


class Lines(logging.Handler):
    """Keeps the plugin's log lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("vllm.merged_lora").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.lines.append(record.getMessage())


def load_plugins(log: Lines) -> dict[str, list[str]]:
    """The lines that it logs and the options of ``vllm serve`` when vLLM makes its command line."""
    log.lines.clear()
    vllm.plugins.plugins_loaded = False
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return {"lines": list(log.lines), "options": sorted(parser._option_string_actions)}


def report() -> dict[str, Any]:
    """One entry for each fact and each case; the last case is the one where everything fits."""
    log = Lines()
    found: dict[str, Any] = {
        "release": vllm.__version__,
        "file": vllm.__file__,
        "distribution": version("vllm"),
        "entry points": [point.value for point in entry_points(name="merged_lora")],
        "cpu": current_platform.is_cpu(),
    }
    os.environ["VLLM_PLUGINS"] = ""
    found["not loaded"] = load_plugins(log)
    del os.environ["VLLM_PLUGINS"]

    actual, vllm.__version__ = vllm.__version__, "0.24.1"
    found["another release"] = load_plugins(log)
    found["another release"]["hooks imported"] = "merged_lora.vllm_plugin.compat" in sys.modules
    vllm.__version__ = actual

    from merged_lora.vllm_plugin import compat

    def untouched() -> bool:
        return all(vars(hook.owner).get(hook.name) is owned for hook, owned in before.items())

    before = {hook: vars(hook.owner)[hook.name] for hook in compat.HOOKS}
    found["problems"] = compat.problems()
    hooks: dict[str, Any] = {f"{hook.owner.__name__}.{hook.name}": hook for hook in compat.HOOKS}

    def with_another(case: str, name: str, change: Callable[[Any], None]) -> None:
        hook = hooks[name]
        original = before[hook]
        change(hook)
        before[hook] = vars(hook.owner).get(hook.name)
        found[case] = {**load_plugins(log), "untouched": untouched()}
        setattr(hook.owner, hook.name, original)
        before[hook] = original

    def other_parameters(hook: Any) -> None:
        setattr(hook.owner, hook.name, lambda self, request, color: None)

    with_another("other parameters", "OpenAIServingModels.load_lora_adapter", other_parameters)
    with_another(
        "a function less", "LoRAModelManager.activate_adapter", lambda hook: delattr(hook.owner, hook.name)
    )
    found["fits"] = {**load_plugins(log), "untouched": untouched()}
    return found


if __name__ == "__main__":
    print(json.dumps(report()))
