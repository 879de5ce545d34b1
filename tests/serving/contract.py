"""A report, as JSON, of how the plugin fits the vLLM that is imported, and what it does if it does not.

    python3 contract.py [CASE ...]

The report has every case unless some are named. Every case is a forked process, so that vLLM's plugins are
loaded for the first time in each.
"""

from __future__ import annotations

import ast
import importlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import vllm
import vllm.plugins
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora import layers
from vllm.lora.model_manager import LoRAModelManager
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from merged_lora.vllm_plugin import register

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


def a_module_that_breaks() -> dict[str, Any]:
    """A hook whose module cannot be used for a reason of its own."""

    class Broken(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("there is no driver")

    sys.modules["vllm.lora.worker_manager"] = Broken("vllm.lora.worker_manager")
    return load_plugins()


def no_function() -> dict[str, Any]:
    """A hook that has become something else than a function."""
    OpenAIServingModels.model_name = property(lambda self: "")
    return load_plugins()


def a_later_release_without_its_head() -> dict[str, Any]:
    """A release to come that has lost a class which the plugin looks up by its name."""
    vllm.__version__ = "0.34.0"
    vars(layers).pop("BaseClassificationHeadWithLoRA", None)
    return load_plugins()


def an_unnamed_build_without_its_head() -> dict[str, Any]:
    """A build that does not say its release and lacks the class that the newest release has."""
    vllm.__version__ = "dev"
    vars(layers).pop("BaseClassificationHeadWithLoRA", None)
    return load_plugins()


def a_later_release_without_a_switch() -> dict[str, Any]:
    """A release to come that has lost a variable of the environment which the plugin asks for."""
    vllm.envs.environment_variables.pop("VLLM_USE_RUST_FRONTEND")
    return load_plugins()


def imported_names() -> list[tuple[str, str]]:
    """The modules of vLLM that the hooks import from, each with a name."""
    spec = find_spec("merged_lora.vllm_plugin.hooks")
    assert spec is not None
    assert spec.origin is not None
    files = sorted(Path(spec.origin).parent.glob("*.py"))
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    found = (node for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0)
    vllm_only = (node for node in found if (node.module or "").partition(".")[0] == "vllm")
    return sorted({(str(node.module), alias.name) for node in vllm_only for alias in node.names})


def lacking(missing: str) -> type[ModuleType]:
    """The class of a module that does not have this name, not even one that it makes when asked."""

    class Lacking(ModuleType):
        def __getattribute__(self, name: str) -> Any:
            if name == missing:
                raise AttributeError(f"no {name}", name=name)
            return super().__getattribute__(name)

    return Lacking


def a_name_less() -> dict[str, Any]:
    """Each name that the hooks import from vLLM, missing: the lines, and whether vLLM is as it was."""
    names = imported_names()
    for module, _ in names:
        importlib.import_module(module)

    def without(module: str, name: str) -> dict[str, Any]:
        sys.modules[module].__class__ = lacking(name)
        if f"{module}.{name}" in sys.modules:
            sys.modules[f"{module}.{name}"] = None  # type: ignore[assignment]
        log, before = Lines(), hooked()
        register()
        return {"lines": log.lines, "untouched": hooked() == before}

    return {f"{module}.{name}": in_child(partial(without, module, name)) for module, name in names}


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
    a_module_that_breaks,
    no_function,
    a_later_release_without_its_head,
    an_unnamed_build_without_its_head,
    a_later_release_without_a_switch,
    a_name_less,
    no_flags_to_add_to,
    where_it_fits,
)


def report(names: list[str]) -> dict[str, Any]:
    """One entry for each fact, and for each case or those that are named."""
    facts = {
        "release": vllm.__version__,
        "file": vllm.__file__,
        "distribution": version("vllm"),
        "entry points": [point.value for point in entry_points(name="merged_lora")],
        "cpu": current_platform.is_cpu(),
    }
    return facts | {case.__name__: in_child(case) for case in CASES if not names or case.__name__ in names}


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1:])))
