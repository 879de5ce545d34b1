"""A report, as JSON, of how the plugin fits the vLLM that is imported, and what it does if it does not.

This is a program, in which every case is a forked process, so that vLLM's plugins are loaded for the first
time in each.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import entry_points, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import vllm
import vllm.plugins
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.model_manager import LoRAModelManager
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

NO_MODEL = str(Path(__file__).parent)  # a folder, so that nothing is looked up elsewhere
FLAGS: tuple[list[str], ...] = ([], ["--enable-merged-lora"], ["--merged-lora-max-sources", "3"])


class Lines(logging.Handler):
    """Keeps the plugin's log lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("vllm.merged_lora").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append(record.getMessage())


def in_child(case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The report of a case, run in a process of its own."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(receive)
            with os.fdopen(send, "w") as out:
                json.dump(case(), out)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(send)
    with os.fdopen(receive) as answer:
        text = answer.read()
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError("a case failed; its traceback is above")
    found: dict[str, Any] = json.loads(text)
    return found


def load_plugins() -> dict[str, Any]:
    """vLLM's command line with its plugins loaded: log lines, options, and what happens to our flags."""
    log = Lines()
    before = hooked()
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    lines = list(log.lines)
    return {
        "lines": lines,
        "options": sorted(parser._option_string_actions),
        "untouched": hooked() == before,
        "refusals": [refusal(parser, flags) for flags in FLAGS],
        "refused offline": refusal_offline(),
        "hooks imported": "merged_lora.vllm_plugin.hooks.table" in sys.modules,
    }


def hooked() -> list[int]:
    """Ids of functions that the plugin wraps, in a server and in a worker; they change when it does."""
    owned = (vars(OpenAIServingModels).get("load_lora_adapter"), vars(LoRAModelManager).get("add_adapter"))
    return [*map(id, owned), id(vars(LoRAModelManager).get("activate_adapter"))]


def refusal(parser: Any, flags: list[str]) -> str:
    """Why these flags are refused; empty if they are accepted."""
    known, unknown = parser.parse_known_args(["--model", NO_MODEL, *flags])
    if unknown:
        return f"unknown: {unknown}"
    try:
        AsyncEngineArgs.from_cli_args(known)
    except ValueError as error:
        return str(error)
    return ""


def refusal_offline() -> str:
    """Why merges are refused in offline inference; empty if they are accepted."""
    args = EngineArgs(model=NO_MODEL, additional_config={"merged_lora": {"enable": True}})
    try:
        args.create_engine_config()
    except Exception as error:
        return str(error) if "merged-lora" in str(error) else ""
    raise AssertionError("there is no model in that folder")


def without_plugins() -> dict[str, Any]:
    """vLLM's own command line."""
    os.environ["VLLM_PLUGINS"] = ""
    return load_plugins()


def an_older_release() -> dict[str, Any]:
    """A release older than the supported ones."""
    vllm.__version__ = "0.24.1"
    return load_plugins()


def a_bad_release() -> dict[str, Any]:
    """A release that is known not to work."""
    from merged_lora.vllm_plugin import releases

    releases.KNOWN_BAD[vllm.__version__] = "its adapters stand on their heads"
    return load_plugins()


def other_parameters() -> dict[str, Any]:
    """A hook with other parameters."""
    OpenAIServingModels.load_lora_adapter = lambda self, request, color: None
    return load_plugins()


def a_function_less() -> dict[str, Any]:
    """A hook that is missing."""
    del LoRAModelManager.activate_adapter
    return load_plugins()


def a_module_moved() -> dict[str, Any]:
    """A hook whose module has moved."""
    sys.modules["vllm.lora.worker_manager"] = None  # type: ignore[assignment]
    return load_plugins()


def no_flags_to_add_to() -> dict[str, Any]:
    """A command line that reads its flags in another way."""
    del EngineArgs.from_cli_args
    log = Lines()
    AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return {"lines": log.lines}


def where_it_fits() -> dict[str, Any]:
    """The release as it is."""
    found = load_plugins()
    from merged_lora.vllm_plugin.hooks.versions import difference

    return found | {"difference": difference()}


class Layer:
    """A layer that records what vLLM does to it."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def reset_lora(self, index: int) -> None:
        """Record it."""
        self.calls.append(f"reset {self.name} {index}")

    def set_lora(self, index: int, *_: object) -> None:
        """Record it."""
        self.calls.append(f"set {self.name} {index}")


def a_slot_filled_by_a_writer() -> dict[str, Any]:
    """vLLM's activation of a merge that has a writer of its own, and of an adapter that has none."""
    load_plugins()
    from merged_lora.vllm_plugin.hooks.wrapping import ATTRIBUTE

    calls: list[str] = []
    ours, theirs, written = Layer("ours", calls), Layer("theirs", calls), SimpleNamespace(id=7)
    writer = SimpleNamespace(
        slot_map=SimpleNamespace(left_to_vllm={"theirs": theirs}),
        write=lambda index: calls.append(f"write {index}"),
    )
    setattr(written, ATTRIBUTE, writer)
    manager = SimpleNamespace(
        modules={"ours": ours, "theirs": theirs},
        lora_index_to_id=[None, None],
        _active_adapters={},
        _registered_adapters={7: written, 8: SimpleNamespace(id=8)},
        _get_lora_layer_weights=lambda lora, name: None,
    )
    activated = [LoRAModelManager.activate_adapter(manager, number) for number in (7, 8, 7)]
    return {
        "activated": activated,
        "ids": manager.lora_index_to_id,
        "active": sorted(manager._active_adapters),
        "calls": calls,
        "modules": list(manager.modules),
    }


CASES = (
    a_slot_filled_by_a_writer,
    without_plugins,
    an_older_release,
    a_bad_release,
    other_parameters,
    a_function_less,
    a_module_moved,
    no_flags_to_add_to,
    where_it_fits,
)


def report() -> dict[str, Any]:
    """One entry for each fact and each case."""
    facts = {
        "release": vllm.__version__,
        "file": vllm.__file__,
        "distribution": version("vllm"),
        "entry points": [point.value for point in entry_points(name="merged_lora")],
        "cpu": current_platform.is_cpu(),
    }
    return facts | {case.__name__: in_child(case) for case in CASES}


if __name__ == "__main__":
    print(json.dumps(report()))
