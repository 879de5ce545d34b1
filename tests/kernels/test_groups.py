"""Memory that merging a group of modules takes."""

from __future__ import annotations

import pytest
import torch

from kernels.watching import Watch
from making import random_adapter
from merged_lora.planning import make_plan
from merged_lora.spec import parse
from merged_lora.triton_kernels.batched import fused_tiles, groups, tiles

MODULES = 16
SAMPLE = 256


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "shape", "kibibytes"),
    [
        ("core_ties", (300, 400), 512),
        ("knots", (300, 400), 1024),
        ("sce_svd", (40, 48), 1024),
        ("ties_svd", (32, 64), 2048),
        ("della", (300, 400), 1024),
    ],
)
def test_the_workspace_bounds_what_a_group_takes_beside_its_result(
    strategy: str, shape: tuple[int, int], kibibytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = kibibytes << 10
    # Scale down the constants that belong to the real workspace.
    for room in (groups, tiles):
        monkeypatch.setattr(room, "TILE_BYTES", 1 << 15)
    monkeypatch.setattr(groups, "SAMPLE_BYTES", 24 * SAMPLE)
    monkeypatch.setattr(fused_tiles, "SAMPLE", SAMPLE)
    monkeypatch.setattr(fused_tiles, "GATHER_BYTES", 1 << 16)
    shapes = {f"m{i:02}": shape for i in range(MODULES)}
    sources = {name: random_adapter(shapes, 4, seed=i) for i, name in enumerate("ab")}
    (group,) = groups.grouped(make_plan(parse(f"{strategy}(a, b)"), sources))
    factors = [[adapter.modules[name] for name in group.names] for adapter in sources.values()]
    a = tuple(torch.stack([f.a for f in one]) for one in factors)
    b = tuple(torch.stack([f.b for f in one]) for one in factors)
    peaks = []
    for bytes_at_a_time in (workspace, 1 << 30):
        monkeypatch.setattr(groups, "WORKSPACE", bytes_at_a_time)
        with Watch([*a, *b]) as watch:
            merged = groups.merge_group(group, (a, b), {})
        # Twice the result, because at the end it exists both in parts and joined.
        kept = 2 * sum(x.nbytes for x in (merged.a, merged.b, merged.energy) if x is not None)
        peaks.append(watch.peak - kept)
    assert peaks[0] <= workspace < peaks[1]
