"""The operators that torch runs, and the memory that they take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the names of all operators, and the most bytes that new tensors held at the same time.

    given: earlier tensors, which are not counted.
    """

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.peak = 0
        self._given = {x.untyped_storage().data_ptr() for x in given}
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(x, torch.Tensor):
                continue
            storage = x.untyped_storage()
            if storage.data_ptr() not in self._given:
                weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._held[storage.data_ptr()] = weak, storage.nbytes()
        self._held = {k: v for k, v in self._held.items() if not v[0].expired()}  # type: ignore[no-untyped-call]
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return result
