"""Wrap a function of vLLM; the attribute that attaches our state to vLLM's objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ATTRIBUTE = "merged_lora"
"""The attribute under which our state is attached to vLLM's objects: a manager's worker, a merge's writer."""


def plain(method: Any) -> Callable[..., Any]:
    """The function inside a static method or a class method; any other function as it is."""
    return method.__func__ if isinstance(method, staticmethod | classmethod) else method


def wrap_method(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function of a class or a module by its wrapper, which stays a method of the same kind."""
    original = vars(owner)[name]
    wrapped: Any = wrap(plain(original))
    if isinstance(original, staticmethod | classmethod):
        wrapped = type(original)(wrapped)
    setattr(owner, name, wrapped)
