"""The division by a count of voters is the correctly rounded one, for every kind of float32."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from agreement.comparing import FAMILIES, entries
from merged_lora.triton_kernels.backend import load
from merged_lora.triton_kernels.kernels.combine import _divide

SIZE = 1 << 15


@triton.jit
def _divide_kernel(x_ptr, out_ptr, count, SOURCES: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    counts = tl.zeros([SIZE], tl.int32) + count
    tl.store(out_ptr + index, _divide(tl.load(x_ptr + index), counts, SOURCES))


def divided(x: torch.Tensor, count: int, sources: int) -> torch.Tensor:
    """``x / max(count, 1)`` as the kernels that merge so many sources divide."""
    device = load().device
    out = torch.full((SIZE,), torch.nan, device=device)
    _divide_kernel[(1,)](x.to(device), out, count, sources, SIZE, enable_fp_fusion=False)
    return out.cpu()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sources", [1, 2, 3, 4, 0])
def test_quotients_are_rounded_as_by_the_hardware(sources: int, family: str) -> None:
    x = entries(family, SIZE, torch.float32, torch.Generator().manual_seed(sources))
    x += 0.0  # a sum that begins with 0.0 is never -0.0
    for count in range((sources or 16) + 1):
        expected = x / max(count, 1)
        assert torch.equal(divided(x, count, sources).view(torch.int32), expected.view(torch.int32)), count
