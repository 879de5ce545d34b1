"""The loops that a server compiles when it starts: those of the usual strategies."""

from __future__ import annotations

import torch

from merged_lora.adapters import Adapter
from merged_lora.backends import Backend
from merged_lora.factors import Factors
from merged_lora.planning import make_plan
from merged_lora.spec import parse


def warm_up(backend: Backend) -> None:
    """Make small merges, so that their loops are compiled."""
    for spec in ("ties(a, b)", "dare_linear(a, b)"):
        backend.merge(make_plan(parse(spec), {"a": _adapter(), "b": _adapter()}))


def _adapter() -> Adapter:
    """One module in float32 and two in a 16-bit dtype: all that the loops are compiled for."""
    whole, half = (torch.ones(2, 2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    return Adapter({"x": Factors(whole, whole), "y": Factors(half, half), "z": Factors(half, half)})
