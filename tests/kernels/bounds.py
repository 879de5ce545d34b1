"""The bounds that every kernel keeps as each minor release of Triton compiles it.

The numbers are measured with ``python -m merged_lora.bench registers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merged_lora.bench.registers import BOUNDED, TARGETS, Compiled


@dataclass(frozen=True)
class Bounds:
    """The bounds for one minor release of Triton.

    programs: the fewest programs that a multiprocessor must have registers for, by case, on each of TARGETS.
    spilled: the most that a case may spill, by case and target; other cases may not spill.
    """

    programs: Mapping[str, tuple[int, ...]]
    spilled: Mapping[tuple[str, str], int]


def _bounds(*programs: tuple[int, int, int], spilled: Mapping[tuple[str, str], int]) -> Bounds:
    return Bounds(dict(zip(BOUNDED, programs, strict=True)), spilled)


# fmt: off
BOUNDS = {
    "3.6": _bounds(
        (8, 8, 8), (6, 6, 8), (4, 4, 8), (6, 5, 8), (5, 4, 8), (5, 4, 8), (4, 3, 8), (4, 4, 8), (3, 2, 6),
        spilled={
            ("find_thresholds bf16", "sm_80"): 28,
            ("find_thresholds fp16", "sm_80"): 28,
            **{(f"dare_ties_svd times {p}, r=16, 64", "gfx942"): 2 for p in ("tf32", "tf32x3")},
            **{(f"dare_ties_svd transposed {p}, r=16, 64", "gfx942"): 50 for p in ("tf32", "tf32x3")},
        },
    ),
    "3.7": _bounds(
        (8, 8, 8), (6, 6, 8), (4, 3, 8), (6, 6, 8), (4, 4, 8), (5, 5, 8), (3, 3, 8), (4, 4, 8), (3, 2, 6),
        spilled={
            ("dare_ties_svd times tf32, r=256, 128", "sm_80"): 48,
            **{(f"dare_ties_svd transposed {p}, r=16, 64", "gfx942"): 11 for p in ("tf32", "tf32x3")},
        },
    ),
    "3.8": _bounds(
        (8, 8, 8), (6, 6, 8), (4, 3, 8), (8, 6, 8), (5, 6, 8), (8, 5, 8), (4, 4, 8), (4, 4, 8), (3, 3, 5),
        spilled={},
    ),
    "3.9": _bounds(
        (8, 8, 8), (6, 8, 8), (4, 4, 8), (8, 5, 8), (4, 5, 8), (8, 6, 8), (4, 4, 8), (4, 4, 8), (3, 3, 5),
        spilled={},
    ),
}
"""By minor release of Triton, measured: a row's entries in the order of BOUNDED and TARGETS."""
# fmt: on


def find_faults(done: Compiled, bounds: Bounds) -> list[str]:
    """What is wrong with a compiled case: it spills, is too large, or its accesses are not 16 bytes wide."""
    found = []
    if done.spilled > bounds.spilled.get((done.case, done.target), 0):
        found.append(f"{done.spilled} {'registers' if done.target == 'gfx942' else 'bytes'} spilled")
    least = dict(zip(TARGETS, bounds.programs.get(done.case, ()), strict=False)).get(done.target, 1)
    if done.programs < least:
        found.append(f"room for {done.programs} programs, not {least}")
    if done.wide and not done.loads:
        found.append("no load of 16 bytes")
    return found
