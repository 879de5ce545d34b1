"""vLLM's own loader, of every installed release, reads what we write."""

from pathlib import Path

import pytest
from packaging.version import Version

from making import random_adapter
from merged_lora.engine import merge
from reading_back import Shapes, assert_deltas, deltas_in
from test_versions import INSTALLED

SHAPES: Shapes = {
    **{f"model.layers.{i}.self_attn.q_proj": (32, 32) for i in range(2)},
    **{f"model.layers.{i}.mlp.down_proj": (32, 48) for i in range(2)},
}


@pytest.mark.slow
@pytest.mark.parametrize("release", INSTALLED)
def test_every_installed_release_reads_a_merge_and_since_0_32_patterns(tmp_path: Path, release: str) -> None:
    order = {name: at for at, name in enumerate(SHAPES, start=1)}
    first = {name: shape for name, shape in SHAPES.items() if "q_proj" in name}
    merged = merge("a + b", {"a": random_adapter(first, 4, seed=1), "b": random_adapter(SHAPES, 8, seed=2)})
    scaled = random_adapter(SHAPES, order, scaling={name: 0.5 * at for name, at in order.items()})
    merged.save(tmp_path / "merged")
    scaled.save(tmp_path / "scaled", keep_ranks=True)
    expected = {tmp_path / "merged": merged.modules}
    if Version(release) >= Version("0.32"):  # the first that respects patterns
        expected[tmp_path / "scaled"] = scaled.modules
    found = deltas_in("vllm", list(expected), SHAPES, tmp_path, INSTALLED[release])
    for deltas, modules in zip(found, expected.values(), strict=True):
        assert_deltas(deltas, modules)
