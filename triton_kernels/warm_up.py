"""The kernels that a server compiles when it starts: for usual strategies, source counts and dtypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from merged_lora.adapters import Adapter
from merged_lora.backends import Slot, SlotBackend
from merged_lora.factors import Factors
from merged_lora.planning import make_plan
from merged_lora.spec import parse
from merged_lora.triton_kernels.kernels.combine import UNROLLED

STRATEGIES = ("sum", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""The usual strategies.  A kernel that only others launch is compiled when it is first asked for."""
COUNTS = range(2, UNROLLED + 2)
"""Source counts with a kernel of their own, and one for all larger counts."""


def warm_up(backend: SlotBackend, dtype: torch.dtype) -> None:
    """Make and place small merges, so that their kernels are compiled.

    dtype: dtype of the slots; the sources are in it and in float32, in which PEFT saves by default.
    """
    dtypes = dict.fromkeys((dtype, torch.float32))
    cases = [(source,) * count for source in dtypes for count in COUNTS]
    if len(dtypes) > 1:
        cases.append(tuple(dtypes))  # one source of each; merges of more that differ are rare
    for sources in cases:
        for strategy in STRATEGIES:
            _merge_once(backend, strategy, sources, dtype)


def _merge_once(
    backend: SlotBackend, strategy: str, sources: Sequence[torch.dtype], dtype: torch.dtype
) -> None:
    """Merge one small source of each of these dtypes into slots of another."""
    adapters = {}
    for name, source in zip("abcdefgh", sources, strict=False):
        factor = torch.ones(8, 8, dtype=source)  # of even shape, like the tensors of real adapters
        adapters[name] = backend.adopt(Adapter({"x": Factors(factor, factor)}))
    plan = make_plan(parse(f"{strategy}({', '.join(adapters)})"), adapters)
    slots = {
        name: Slot(*(torch.empty(shape, dtype=dtype, device=backend.device) for shape, _ in module.results))
        for name, module in plan.modules.items()
    }
    backend.place(backend.stage(plan, dtype), slots)
