"""The two factors of a module, whose product is its delta. Knows nothing of files or of merging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WORDS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
"""The integer dtype that holds the bits of each dtype."""


@dataclass(frozen=True, eq=False)
class Factors:
    """One module of an adapter; its delta is ``scaling * b @ a``.

    a:         ``[rank, in]``, float32, float16 or bfloat16, contiguous, on the CPU.
    b:         ``[out, rank]``, likewise.
    scaling:   factor of the product.
    embedding: whether it is an embedding: ``in`` counts tokens, and PEFT applies the delta transposed.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float = 1.0
    embedding: bool = False

    @property
    def rank(self) -> int:
        """The inner dimension of the product."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(out, in)`` of the delta."""
        return self.b.shape[0], self.a.shape[1]

    @cached_property
    def kind(self) -> tuple[object, ...]:
        """All but the values: what is planned for a module depends on nothing else of it."""
        return *self.a.shape, *self.b.shape, self.a.dtype, self.b.dtype, self.scaling, self.embedding

    @cached_property
    def why_zero(self) -> str | None:
        """Why the delta is zero, as the end of a sentence; None if it is not."""
        if not self.scaling:
            return "its scaling is 0 (lora_alpha)"
        if not self.b.any():
            return "its B holds nothing but zeros, as before training"
        return None if self.a.any() else "its A holds nothing but zeros"

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.a.nbytes + self.b.nbytes

    def delta(self) -> torch.Tensor:
        """The delta ``[out, in]`` in float64. It is large: for tests and inspection only."""
        return self.scaling * (self.b.double() @ self.a.double())


def promoted(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype that a merge of these is stored in: the common one, or what torch promotes them to."""
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor of one of DTYPES, as integers of the same shape.

    Unlike its values they distinguish 0.0 from -0.0 and compare equal for the same NaN.
    """
    return tensor.contiguous().view(WORDS[tensor.dtype])
