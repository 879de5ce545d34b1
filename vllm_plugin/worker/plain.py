"""What a worker needs to know of plain adapters, which vLLM's hooks give it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from merged_lora.adapters import Adapter

Model = TypeVar("Model")


class PlainAdapters(Protocol[Model]):
    """Plain adapters as vLLM reads and holds them."""

    def find(self, path: str) -> Path:
        """The folder of the adapter with this path or this name on the hub."""
        ...

    def read(self, path: str, options: Mapping[str, Any]) -> Model:
        """The adapter as vLLM reads it from disk; raises MergeError if vLLM refuses it."""
        ...

    def fit(self, adapter: Adapter) -> Adapter:
        """The adapter with the model's own names of its modules; raises PlanError if the model lacks one."""
        ...

    def size(self, model: Model) -> int:
        """Bytes of the tensors of an adapter."""
        ...

    def scalings(self, model: Model) -> dict[str, float]:
        """The factor by which vLLM scales each module."""
        ...

    def build(self, number: int, adapter: Adapter, scalings: Mapping[str, float]) -> Model:
        """The adapter as :meth:`read` returns it, under another id; raises PlanError if it would differ."""
        ...

    def copy(self, model: Model, number: int) -> Model:
        """A copy under another id that shares no tensor."""
        ...

    def share(self, model: Model) -> Model:
        """The same merge in an object of its own, which vLLM may change, with the same tensors."""
        ...
