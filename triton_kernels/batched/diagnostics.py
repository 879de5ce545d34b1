"""What a backend reports of groups beside their factors, kept on the device until it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from merged_lora.backends import Result
from merged_lora.factors import Factors

from .lowrank import MergedStack


class Diagnostics:
    """Energies and repeated singular values of merged modules; see :class:`merged_lora.backends.Result`.

    Adding to it does not wait for the device.
    """

    def __init__(self) -> None:
        self._energy: dict[str, torch.Tensor] = {}
        self._repeated: dict[str, torch.Tensor] = {}

    def add(self, names: Sequence[str], merged: MergedStack) -> None:
        """Record the diagnostics of a merged stack.

        names: of its modules.
        """
        if merged.energy is not None:
            self._energy.update(zip(names, merged.energy, strict=True))
        if merged.repeated is not None:
            self._repeated.update(zip(names, merged.repeated, strict=True))

    def result(self, modules: dict[str, Factors]) -> Result:
        """The result with these merged factors, and all that was recorded, copied to the host."""
        norms = torch.stack(list(self._energy.values())).tolist() if self._energy else []
        flags = torch.stack(list(self._repeated.values())).tolist() if self._repeated else []
        energy = {name: (kept, asked) for name, (kept, asked) in zip(self._energy, norms, strict=True)}
        repeated = tuple(name for name, flag in zip(self._repeated, flags, strict=True) if flag)
        return Result(modules, energy, repeated)
