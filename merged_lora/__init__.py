"""LoRA adapters merged on demand inside vLLM.

``from merged_lora import merge, Adapter, parse`` is the public entry, with ``calibrate`` and ``check``,
and ``inspect``, ``evaluate`` and ``tune``.  Each name is loaded when it is first asked for, because vLLM
imports the plugin in every one of its processes.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapters import Adapter, load_sources
    from .calibrating import calibrate
    from .checking import check
    from .engine import merge
    from .errors import MergeError
    from .judging.evaluating import evaluate
    from .judging.inspecting import inspect
    from .judging.tuning import tune
    from .spec import MergeSpec, parse

__all__ = [
    "Adapter",
    "MergeError",
    "MergeSpec",
    "calibrate",
    "check",
    "evaluate",
    "inspect",
    "load_sources",
    "merge",
    "parse",
    "tune",
]
__version__ = "0.2.0"  # pyproject.toml reads it from here

_HOMES = {
    "Adapter": "adapters",
    "MergeError": "errors",
    "MergeSpec": "spec",
    "calibrate": "calibrating",
    "check": "checking",
    "evaluate": "judging.evaluating",
    "inspect": "judging.inspecting",
    "load_sources": "adapters",
    "merge": "engine",
    "parse": "spec",
    "tune": "judging.tuning",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
